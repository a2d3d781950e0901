"""The middleware that comes with leveret, and the protocols that your own may implement besides `consume` and `publish`. Times are in seconds."""

from leveret.layer import Bound, Bypass, LayerFacts, Readiness, RetryWaits, Stated
from leveret.runtime import Runtime

from .logs import Logs
from .ratelimit import RateLimit
from .retries import On, Retries, Rule
from .timeout import Timeout
from .tracing import Tracing

__all__ = [
    "Bound",
    "Bypass",
    "LayerFacts",
    "Logs",
    "On",
    "RateLimit",
    "Readiness",
    "Retries",
    "RetryWaits",
    "Rule",
    "Runtime",
    "Stated",
    "Timeout",
    "Tracing",
]
