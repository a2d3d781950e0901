"""leveret: typed jobs through real queues, a chain of middleware, dead letters and cron."""

from typing import Final

from .app import App
from .attempt import Attempt
from .blocking import BlockingPublisher
from .chain import Consume, ConsumeLayer, Layer, Publish, PublishLayer
from .envelope import Envelope, HeaderValue, Receipt
from .errors import (
    BrokerUnavailable,
    ConfigurationError,
    InvalidJob,
    LeveretError,
    MessageTooLarge,
    PublishError,
    PublishManyError,
    PublishTimeout,
    Unroutable,
    UnsupportedTopology,
)
from .job import Job, JobMeta, Priority, Queue
from .outcome import Bury, Done, Expired, Outcome, Retry, Snooze
from .publisher import Outgoing, Publisher
from .settings import Settings

__version__: Final[str] = "0.1.0"

__all__ = [
    "App",
    "Attempt",
    "BlockingPublisher",
    "BrokerUnavailable",
    "Bury",
    "ConfigurationError",
    "Consume",
    "ConsumeLayer",
    "Done",
    "Envelope",
    "Expired",
    "HeaderValue",
    "InvalidJob",
    "Job",
    "JobMeta",
    "Layer",
    "LeveretError",
    "MessageTooLarge",
    "Outcome",
    "Outgoing",
    "Priority",
    "Publish",
    "PublishError",
    "PublishLayer",
    "PublishManyError",
    "PublishTimeout",
    "Publisher",
    "Queue",
    "Receipt",
    "Retry",
    "Settings",
    "Snooze",
    "Unroutable",
    "UnsupportedTopology",
    "__version__",
]
