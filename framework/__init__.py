"""leveret: typed jobs through message queues, with middleware, dead letters and cron."""

from typing import TYPE_CHECKING, Any, Final

from .app import App
from .attempt import Attempt
from .broker import PublisherState, QueueState
from .envelope import Envelope, Receipt
from .errors import (
    BrokerUnavailable,
    ConfigurationError,
    InvalidJob,
    JobAborted,
    JobExpired,
    JobFailed,
    LeveretError,
    MessageTooLarge,
    PublishError,
    PublishManyError,
    PublishTimeout,
    ResultError,
    ResultUnavailable,
    StoreUnavailable,
    Unroutable,
    UnsupportedTopology,
)
from .handle import BlockingHandle, Handle
from .headers import HeaderValue
from .job import Job, JobMeta, Keep, Priority, Queue
from .layer import Consume, ConsumeLayer, Layer, Publish, PublishLayer
from .options import Outgoing, OutgoingOptions, PublishOptions
from .outcome import Bury, Done, Expired, Outcome, Retry, Snooze
from .publishing.publisher import Publisher
from .settings import Settings
from .transactions import AsyncTransaction, Transaction

if TYPE_CHECKING:
    from .consuming.state import Worker, WorkerState
    from .publishing.blocking import BlockingPublisher
    from .status import Status

__version__: Final[str] = "0.1.0"

__all__ = [
    "App",
    "AsyncTransaction",
    "Attempt",
    "BlockingHandle",
    "BlockingPublisher",
    "BrokerUnavailable",
    "Bury",
    "ConfigurationError",
    "Consume",
    "ConsumeLayer",
    "Done",
    "Envelope",
    "Expired",
    "Handle",
    "HeaderValue",
    "InvalidJob",
    "Job",
    "JobAborted",
    "JobExpired",
    "JobFailed",
    "JobMeta",
    "Keep",
    "Layer",
    "LeveretError",
    "MessageTooLarge",
    "Outcome",
    "Outgoing",
    "OutgoingOptions",
    "Priority",
    "Publish",
    "PublishError",
    "PublishLayer",
    "PublishManyError",
    "PublishOptions",
    "PublishTimeout",
    "Publisher",
    "PublisherState",
    "Queue",
    "QueueState",
    "Receipt",
    "ResultError",
    "ResultUnavailable",
    "Retry",
    "Settings",
    "Snooze",
    "Status",
    "StoreUnavailable",
    "Transaction",
    "Unroutable",
    "UnsupportedTopology",
    "Worker",
    "WorkerState",
    "__version__",
]

if not TYPE_CHECKING:  # with this function in sight, a type checker would accept any misspelt name

    def __getattr__(name: str) -> Any:
        # imported on demand: workers and asyncio services don't need the first, publishers don't need the others
        if name == "BlockingPublisher":
            from .publishing.blocking import BlockingPublisher

            return BlockingPublisher
        if name in ("Worker", "WorkerState"):
            from .consuming import state

            return getattr(state, name)
        if name == "Status":
            from .status import Status

            return Status
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
