"""The spans of `Tracing`, on OpenTelemetry's API only; the program chooses an SDK. Imported once there is something to trace.

    send emails                     PRODUCER  the publisher's; its context goes into the job's headers
    └── process emails              CONSUMER  attempt 1, failed; its context replaces the publisher's in the retry
        └── process emails          CONSUMER  attempt 2, linked to attempt 1
            └── send pdf            PRODUCER  a publish by the handler

Names and attributes are those of the semantic conventions for messaging (in development), 1.27 and later.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal, final

from opentelemetry import context as otel
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NoOpTracerProvider,
    ProxyTracerProvider,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
)
from opentelemetry.util.types import AttributeValue

from leveret import __version__
from leveret.attempt import Attempt
from leveret.envelope import Envelope, Receipt
from leveret.layer import Consume, Publish
from leveret.outcome import Bury, Outcome, Retry, Snooze
from leveret.texts import named, said_by

# The broker isn't known here; the names and ids belong to leveret.
SYSTEM = "leveret"
_LOOK_EVERY_S = 0.5
"""Seconds between two looks for an SDK: the spans of a program that sets its SDK after its first job begin this late."""
MESSAGING_SYSTEM = "messaging.system"
OPERATION_NAME = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
CONVERSATION_ID = "messaging.message.conversation_id"
BODY_SIZE = "messaging.message.body.size"
ERROR_TYPE = "error.type"
JOB = "leveret.job"
ATTEMPT = "leveret.attempt"
OUTCOME = "leveret.outcome"

# The job whose run ended last in this task, and the context of the run. The job's retry, snooze or burial is published right after.
_ended: ContextVar[tuple[str, Context] | None] = ContextVar("leveret_tracing_ended", default=None)


@final
class Spans:
    """Makes the spans of a `Tracing` once there is an SDK; passes contexts on until then."""

    def __init__(self, tracer_provider: TracerProvider | None) -> None:
        self._provider = tracer_provider
        self._made: Tracer | None = None
        self._look_again = 0.0

    @property
    def _tracer(self) -> Tracer | None:
        """The tracer, or None without an SDK. A process sets its SDK at most once, at any time, so that a tracer stays."""
        if self._made is None:
            # The API reads the environment at each look, so look only now and then.
            now = time.monotonic()
            if now < self._look_again:
                return None
            self._look_again = now + _LOOK_EVERY_S
            provider = self._provider or trace.get_tracer_provider()
            if isinstance(provider, (ProxyTracerProvider, NoOpTracerProvider)):
                return None
            self._made = provider.get_tracer("leveret", __version__)
        return self._made

    def passes_publish(self) -> bool:
        """Return whether there is neither an SDK nor a context to pass on."""
        return self._tracer is None and not otel.get_current()

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        """Publish with the context of a new producer span; a retry, snooze or burial, with the context of its last run."""
        if envelope.cause is not None:
            ended = _ended.get()
            # With another job's context in `_ended`, this job never got to its chain, and keeps the context it came with.
            return await proceed(
                envelope if ended is None or ended[0] != envelope.job_id else _injected(envelope, ended[1])
            )
        tracer = self._tracer
        if tracer is None:
            current = otel.get_current()
            return await proceed(_injected(envelope, current) if current else envelope)
        attributes = _attributes("send", envelope)
        span = tracer.start_span(f"send {envelope.queue}", kind=SpanKind.PRODUCER, attributes=attributes)
        current = trace.set_span_in_context(span)
        token = otel.attach(current)
        try:
            return await proceed(_injected(envelope, current))
        except Exception as error:
            _record(span, error)
            raise
        finally:
            otel.detach(token)
            span.end()

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job within a consumer span, a child of the publish."""
        tracer, envelope = self._tracer, attempt.envelope
        if tracer is None:
            if not envelope.headers:
                return await proceed(attempt)
            token = otel.attach(_extracted(envelope.headers))
            try:
                return await proceed(attempt)
            finally:
                otel.detach(token)
        parent = _extracted(envelope.headers)
        before = trace.get_current_span(parent).get_span_context()
        again = before.is_valid and (envelope.passes > 0 or attempt.number > 1)
        attributes = _attributes("process", envelope)
        attributes[ATTEMPT] = attempt.number
        span = tracer.start_span(
            f"process {envelope.queue}",
            context=parent,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=[Link(before)] if again else None,
        )
        current = trace.set_span_in_context(span, parent)
        _ended.set((envelope.job_id, current))
        token = otel.attach(current)
        try:
            outcome = await proceed(attempt)
        except (Retry, Snooze, Bury) as said:
            _conclude(span, said)
            raise
        except Exception as error:
            span.set_attribute(OUTCOME, "bury")  # with this middleware outermost, the consumer buries the job
            _record(span, error)
            raise
        else:
            _conclude(span, outcome)
            return outcome
        finally:
            otel.detach(token)
            span.end()


def _attributes(operation: Literal["send", "process"], envelope: Envelope) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {
        MESSAGING_SYSTEM: SYSTEM,
        OPERATION_NAME: operation,
        OPERATION_TYPE: operation,
        DESTINATION: envelope.queue,
        MESSAGE_ID: envelope.job_id,
        BODY_SIZE: len(envelope.body),
        JOB: envelope.job,
    }
    if envelope.correlation_id is not None:
        attributes[CONVERSATION_ID] = envelope.correlation_id
    return attributes


def _injected(envelope: Envelope, context: Context) -> Envelope:
    headers: dict[str, str] = {}
    propagate.inject(headers, context)
    return envelope.with_headers(headers) if headers else envelope


def _extracted(headers: Mapping[str, object]) -> Context:
    # Begin with an empty context: the jobs of a worker inside a program must not become children of the span that started it.
    # Pass only strings: other programs publish too, and a propagator fails on a number.
    return propagate.extract({name: value for name, value in headers.items() if isinstance(value, str)}, Context())


def _conclude(span: Span, outcome: Outcome) -> None:
    span.set_attribute(OUTCOME, outcome.kind.value)
    if not isinstance(outcome, BaseException):
        return
    if outcome.__cause__ is not None:
        _record(span, outcome.__cause__)
    elif isinstance(outcome, Bury):
        span.set_attribute(ERROR_TYPE, "Bury")
        span.set_status(Status(StatusCode.ERROR, outcome.reason))


def _record(span: Span, error: BaseException) -> None:
    kind = type(error).__qualname__
    try:
        span.record_exception(error)
    except Exception:  # noqa: BLE001 - a user's __str__
        span.add_event("exception", {"exception.type": kind, "exception.message": said_by(error)})
    span.set_attribute(ERROR_TYPE, kind)
    span.set_status(Status(StatusCode.ERROR, named(error)))
