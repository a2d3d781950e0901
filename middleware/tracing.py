"""The middleware `Tracing`: OpenTelemetry spans for publishes and runs. Only `spans` imports OpenTelemetry.

The API of OpenTelemetry costs 3 MB and 30 ms, which a worker without tracing must not pay.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, ClassVar, Literal, final

from leveret.attempt import Attempt
from leveret.envelope import Envelope, Receipt
from leveret.layer import Consume, Publish
from leveret.outcome import Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from .spans import Spans


@final
class Tracing:
    """Makes OpenTelemetry spans for publishes and runs, linked over retries; costs nothing without an SDK.

    The global propagator writes the trace context into the job's headers (by default W3C `traceparent`; `OTEL_PROPAGATORS`
    changes the format). A run is a child span of its publish, in the same trace. After a retry, a snooze or a replay, a run
    is a child of the attempt before, and linked to that attempt. A retry doesn't have a producer span. List `Tracing`
    first: the outermost middleware sees every ending, and the middleware inside it runs within the span.

    Args:
        tracer_provider: The provider of the spans. Default: None, the global provider, whenever it is set.
    """

    once: ClassVar[Literal[True]] = True

    def __init__(self, *, tracer_provider: TracerProvider | None = None) -> None:
        self._provider = tracer_provider
        self._spans: Spans | None = None
        # Read once: each read of the environment takes a microsecond, a fifteenth of the time per job.
        self._chosen = "OTEL_PYTHON_TRACER_PROVIDER" in os.environ

    def __repr__(self) -> str:
        return "Tracing()"

    def _found(self) -> Spans | None:
        """Return the spans; None while nothing in this process has imported OpenTelemetry, so that no provider or context exists."""
        if self._spans is None and (self._chosen or "opentelemetry.context" in sys.modules):
            return self._loaded()
        return self._spans

    def _loaded(self) -> Spans:
        from .spans import Spans

        self._spans = Spans(self._provider)
        return self._spans

    def passes_publish(self) -> bool:
        """Return whether there is neither an SDK nor a context to pass on."""
        spans = self._found()
        return spans is None or spans.passes_publish()

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        """Publish with the context of a new producer span; a retry, snooze or burial, with the context of its last run."""
        spans = self._found()
        return await (proceed(envelope) if spans is None else spans.publish(envelope, proceed))

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job within a consumer span, a child of the publish."""
        spans = self._found()
        if spans is None and attempt.envelope.headers:
            spans = self._loaded()  # they may hold a context for the jobs that the handler publishes
        return await (proceed(attempt) if spans is None else spans.consume(attempt, proceed))
