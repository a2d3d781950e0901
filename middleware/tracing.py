"""OpenTelemetry spans for publishes and runs: the layer. What needs OpenTelemetry is in `spans`.

Its API alone is 3 MB and 30 ms, which a worker that traces nothing needn't have.
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
    """OpenTelemetry spans for publishes and runs, linked over retries; costs nothing without an SDK.

    The trace context travels in the job's headers, as the global propagator writes it (W3C `traceparent` unless
    `OTEL_PROPAGATORS` says otherwise). A run is a child of what published it, in the same trace; after a retry, a
    snooze or a replay it is a child of the attempt before, and linked to it. A retry has no producer span of its own.
    Outermost it sees every ending, and layers inside it run within the span.

    Args:
        tracer_provider: Where spans are made; None: the global one, whenever it is set.
    """

    once: ClassVar[Literal[True]] = True

    def __init__(self, *, tracer_provider: TracerProvider | None = None) -> None:
        self._provider = tracer_provider
        self._spans: Spans | None = None
        # asked once: each look into the environment takes a microsecond, a fifteenth of what a job does
        self._chosen = "OTEL_PYTHON_TRACER_PROVIDER" in os.environ

    def __repr__(self) -> str:
        return "Tracing()"

    def _found(self) -> Spans | None:
        """None while nothing in this process has OpenTelemetry: then there is neither a provider nor a context."""
        if self._spans is None and (self._chosen or "opentelemetry.context" in sys.modules):
            return self._loaded()
        return self._spans

    def _loaded(self) -> Spans:
        from .spans import Spans

        self._spans = Spans(self._provider)
        return self._spans

    def passes_publish(self) -> bool:
        """Whether there is no SDK, and no context to pass on."""
        spans = self._found()
        return spans is None or spans.passes_publish()

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        """Send it with the context of its own producer span; what leveret publishes anew, with its last run's."""
        spans = self._found()
        return await (proceed(envelope) if spans is None else spans.publish(envelope, proceed))

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run it within a consumer span, child of what published it."""
        spans = self._found()
        if spans is None and attempt.envelope.headers:
            spans = self._loaded()  # a context may be among them, for what the handler publishes
        return await (proceed(attempt) if spans is None else spans.consume(attempt, proceed))
