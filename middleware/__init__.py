"""The layers that come with leveret; all times in seconds. First in a list of layers is outermost."""

from .logs import Logs
from .ratelimit import RateLimit
from .retries import On, Retries, Rule
from .timeout import Timeout
from .tracing import Tracing

__all__ = ["Logs", "On", "RateLimit", "Retries", "Rule", "Timeout", "Tracing"]
