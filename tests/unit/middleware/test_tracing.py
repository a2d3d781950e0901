"""`Tracing`: one trace from the publisher to the last retry, whatever carries the job."""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from leveret import App, Attempt, Bury, Envelope, Job, Outcome, Queue, Receipt, Retry, Snooze
from leveret.middleware import Retries, Tracing
from leveret.testing import running
from tests.unit.runs import Greet, attempt, chain

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Follow(Job, name="follow", queue=Queue("follow")):
    """What a handler publishes."""


class Spans:
    """A provider of its own, and what it recorded."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, **options)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        """Finished spans of that name, in the order in which they started."""
        return sorted((span for span in self.all() if span.name == name), key=lambda span: span.start_time or 0)

    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    yield made
    made.provider.shutdown()


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


def links_of(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


async def published(layer: Tracing, envelope: Envelope) -> Envelope:
    """Send it through the layer; return what would reach the broker."""
    sent: list[Envelope] = []

    async def broker(envelope: Envelope) -> Receipt:
        sent.append(envelope)
        return Receipt(envelope.job_id)

    await layer.publish(envelope, broker)
    return sent[0]


def envelope(**fields: Any) -> Envelope:
    return Envelope(**{"job_id": "id-1", "job": "greet", "queue": "emails", "body": b"{}", **fields})


async def test_one_trace_from_the_request_over_two_failures_to_what_the_handler_publishes(spans: Spans) -> None:
    """The trace would break at the queue, or each retry would be a trace of its own: unlinked siblings of nothing."""
    app = App("shop", middleware=[Tracing(tracer_provider=spans.provider), Retries(max_attempts=5)])

    @app.handler
    async def greet(job: Greet, attempt: Attempt[None]) -> None:
        if attempt.number < 3:
            raise ValueError(f"no {attempt.number}")
        await attempt.publish(Follow())

    @app.handler
    async def follow(job: Follow) -> None: ...

    async with running(app) as lab:
        with spans.tracer.start_as_current_span("request") as request:
            await lab.publish(Greet())
        await lab.drain()

    assert {span.context.trace_id for span in spans.all() if span.context} == {request.get_span_context().trace_id}
    (sent,) = spans.named("send emails")
    first, second, third = spans.named("process emails")
    (child,), (last,) = spans.named("send follow"), spans.named("process follow")
    assert parent_of(sent) == request.get_span_context().span_id
    assert [parent_of(first), parent_of(second), parent_of(third)] == [id_of(sent), id_of(first), id_of(second)]
    assert [links_of(first), links_of(second), links_of(third)] == [[], [id_of(first)], [id_of(second)]]
    assert [parent_of(child), parent_of(last)] == [id_of(third), id_of(child)]
    assert [span.status.status_code for span in (first, second, third)] == [
        StatusCode.ERROR,
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    assert [span.attributes["leveret.attempt"] for span in (first, second, third) if span.attributes] == [1, 2, 3]
    assert [span.attributes["leveret.outcome"] for span in (first, second, third) if span.attributes] == [
        "retry",
        "retry",
        "done",
    ]
    assert first.status.description == "ValueError: no 1"
    assert [event.name for event in first.events] == ["exception"]


async def test_a_burial_carries_the_context_of_its_last_attempt(spans: Spans) -> None:
    """A replay would start a trace without a past."""
    app = App("shop", middleware=[Tracing(tracer_provider=spans.provider), Retries(max_attempts=2)])

    @app.handler
    async def greet(job: Greet) -> None:
        raise ValueError

    async with running(app) as lab:
        await lab.publish(Greet())
        await lab.drain()
    _, last = spans.named("process emails")
    assert last.attributes is not None
    assert (last.attributes["leveret.outcome"], last.attributes["error.type"]) == ("bury", "ValueError")

    layer = Tracing(tracer_provider=spans.provider)
    buried = await settled(layer, attempt(2), Bury("no"), cause="bury")
    (_, _, burying) = spans.named("process emails")
    replayed = attempt(1, passes=3, headers=buried.headers)
    await chain(layer, handler=say(None))(replayed)
    again = spans.named("process emails")[-1]
    assert (parent_of(again), links_of(again)) == (id_of(burying), [id_of(burying)])


def say(outcome: Outcome | BaseException | None) -> Any:
    async def handler(_: Attempt[Any]) -> Outcome | None:
        if isinstance(outcome, BaseException) and not isinstance(outcome, (Retry, Snooze, Bury)):
            raise outcome
        return outcome

    return handler


async def settled(layer: Tracing, run: Attempt[Any], outcome: Outcome, **changes: Any) -> Envelope:
    """Run it, then publish it anew as the consumer does, in the same task."""
    await chain(layer, handler=say(outcome))(run)
    return await published(layer, envelope(job_id=run.job_id, headers=run.envelope.headers, **changes))


@pytest.mark.parametrize(("outcome", "cause"), [(Retry(1), "retry"), (Snooze(1), "snooze"), (Bury("no"), "bury")])
async def test_what_is_published_anew_carries_its_attempts_context_and_has_no_span(
    spans: Spans, outcome: Outcome, cause: str
) -> None:
    """The next attempt would hang below a span of the broker's, or below the publisher's: not below the attempt before."""
    layer = Tracing(tracer_provider=spans.provider)
    sent = await settled(layer, attempt(headers={"traceparent": PARENT, "x-tenant-id": 7}), outcome, cause=cause)
    (run,) = spans.all()
    assert sent.headers["traceparent"] == f"00-{PARENT[3:35]}-{id_of(run):016x}-01"
    assert sent.headers["x-tenant-id"] == 7


async def test_a_burial_of_a_job_that_never_ran_keeps_the_context_that_it_came_with(spans: Spans) -> None:
    """An undecodable job settled in a task that ran another job would be put into that job's trace."""
    layer = Tracing(tracer_provider=spans.provider)
    await chain(layer, handler=say(None))(attempt(job_id="another"))
    sent = await published(layer, envelope(cause="bury", headers={"traceparent": PARENT}))
    assert sent.headers == {"traceparent": PARENT}


async def test_a_run_is_a_child_of_what_published_it(spans: Spans) -> None:
    """Any publisher that writes W3C headers takes part, leveret or not."""
    await chain(Tracing(tracer_provider=spans.provider), handler=say(None))(
        attempt(headers={"traceparent": PARENT, "tracestate": "a=b"})
    )
    (run,) = spans.all()
    assert (f"{run.context.trace_id:032x}" if run.context else "", f"{parent_of(run) or 0:016x}") == (
        PARENT[3:35],
        PARENT[36:52],
    )
    assert run.kind is SpanKind.CONSUMER
    assert links_of(run) == []
    assert run.context is not None
    assert run.context.trace_state.get("a") == "b"


@pytest.mark.parametrize(
    "wrong", [7, b"\xff", ["a"], None, "not-a-context", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é" * 9000]
)
async def test_a_context_that_cannot_be_read_is_none(spans: Spans, wrong: object) -> None:
    """Others publish too: a header of the wrong type must not bury the job."""
    await chain(Tracing(tracer_provider=spans.provider), handler=say(None))(
        attempt(headers={"traceparent": wrong, "tracestate": wrong, "baggage": wrong})
    )
    (run,) = spans.all()
    assert run.parent is None


async def test_a_worker_inside_a_program_does_not_hang_its_jobs_below_the_span_that_started_it(spans: Spans) -> None:
    """Every job that comes without a context would be part of one trace that never ends."""
    with spans.tracer.start_as_current_span("boot"):
        await chain(Tracing(tracer_provider=spans.provider), handler=say(None))(attempt())
    (run,) = spans.named("process emails")
    assert run.parent is None


async def test_the_context_is_there_before_user_code_and_gone_after(spans: Spans) -> None:
    """Logs and spans of the handler would belong to nothing, or to the job before."""
    seen: list[int] = []

    async def handler(_: Attempt[Any]) -> None:
        seen.append(trace.get_current_span().get_span_context().span_id)

    await chain(Tracing(tracer_provider=spans.provider), handler=handler)(attempt())
    assert seen == [id_of(span) for span in spans.all()]
    assert not trace.get_current_span().get_span_context().is_valid


async def test_baggage_travels(spans: Spans) -> None:
    """It is the global propagator's affair what travels; W3C baggage does by default."""
    token = otel.attach(baggage.set_baggage("tenant", "acme"))
    layer = Tracing(tracer_provider=spans.provider)
    sent = await published(layer, envelope())
    otel.detach(token)
    seen: list[object] = []

    async def handler(_: Attempt[Any]) -> None:
        seen.append(baggage.get_baggage("tenant"))

    await chain(layer, handler=handler)(attempt(headers=sent.headers))
    assert seen == ["acme"]


async def test_attributes_follow_the_semantic_conventions(spans: Spans) -> None:
    """Back-ends draw their messaging views from these names."""
    layer = Tracing(tracer_provider=spans.provider)
    sent = await published(layer, envelope(correlation_id="id-0"))
    await chain(layer, handler=say(None))(attempt(correlation_id="id-0", headers=sent.headers))
    common = {
        "messaging.system": "leveret",
        "messaging.destination.name": "emails",
        "messaging.message.id": "id-1",
        "messaging.message.conversation_id": "id-0",
        "leveret.job": "greet",
    }
    (send,), (process,) = spans.named("send emails"), spans.named("process emails")
    assert send.kind is SpanKind.PRODUCER
    assert dict(send.attributes or {}) == common | {
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.message.body.size": 2,
    }
    assert dict(process.attributes or {}) == common | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.message.body.size": 13,
        "leveret.attempt": 1,
        "leveret.outcome": "done",
    }


async def test_constants_are_those_of_the_conventions_package() -> None:
    """A misspelt attribute is an attribute that nobody finds."""
    from opentelemetry.semconv._incubating.attributes import error_attributes, messaging_attributes

    from leveret.middleware import spans

    assert spans.MESSAGING_SYSTEM == messaging_attributes.MESSAGING_SYSTEM
    assert spans.OPERATION_NAME == messaging_attributes.MESSAGING_OPERATION_NAME
    assert spans.OPERATION_TYPE == messaging_attributes.MESSAGING_OPERATION_TYPE
    assert spans.DESTINATION == messaging_attributes.MESSAGING_DESTINATION_NAME
    assert spans.MESSAGE_ID == messaging_attributes.MESSAGING_MESSAGE_ID
    assert spans.CONVERSATION_ID == messaging_attributes.MESSAGING_MESSAGE_CONVERSATION_ID
    assert spans.BODY_SIZE == messaging_attributes.MESSAGING_MESSAGE_BODY_SIZE
    assert spans.ERROR_TYPE == error_attributes.ERROR_TYPE


@pytest.mark.parametrize("error", [ValueError("no"), Bury("no such customer")])
async def test_a_failed_run_is_an_error(spans: Spans, error: BaseException) -> None:
    """Nobody would find it among a million good ones."""
    step = chain(Tracing(tracer_provider=spans.provider), handler=say(error))
    if isinstance(error, Bury):
        await step(attempt())
    else:
        with pytest.raises(ValueError, match="no"):
            await step(attempt())
    (run,) = spans.all()
    assert run.status.status_code is StatusCode.ERROR
    assert run.attributes is not None
    assert (run.attributes["leveret.outcome"], run.attributes["error.type"]) == ("bury", type(error).__name__)


async def test_an_error_whose_text_cannot_be_made_is_recorded_all_the_same(spans: Spans) -> None:
    """The span would raise outside of `Retries`, and bury the job at its first attempt."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    async def handler(_: Attempt[Any]) -> Outcome:
        raise Mute

    outcome = await chain(Tracing(tracer_provider=spans.provider), Retries(), handler=handler)(attempt())
    (span,) = spans.named("process emails")
    assert isinstance(outcome, Retry)
    assert span.status.status_code is StatusCode.ERROR
    assert (span.status.description or "").endswith("Mute: the message can't be shown: __str__ raises")
    assert [event.name for event in span.events] == ["exception"]


async def test_a_snooze_and_a_run_that_is_cut_off_are_no_errors(spans: Spans) -> None:
    """A rate limit or a deploy would look like an outage."""
    layer = Tracing(tracer_provider=spans.provider)
    await chain(layer, handler=say(Snooze(3)))(attempt())
    with pytest.raises(asyncio.CancelledError):
        await chain(layer, handler=say(asyncio.CancelledError()))(attempt())
    assert [span.status.status_code for span in spans.all()] == [StatusCode.UNSET] * 2


async def test_a_publish_that_fails_is_an_error(spans: Spans) -> None:
    """A trace would show a job as sent that no queue has."""

    async def broker(_: Envelope) -> Receipt:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await Tracing(tracer_provider=spans.provider).publish(envelope(), broker)
    (send,) = spans.all()
    assert (send.status.status_code, send.status.description) == (StatusCode.ERROR, "ConnectionError: gone")


async def test_a_trace_that_is_not_sampled_still_travels() -> None:
    """The next service decides by it, and would sample half a trace."""
    spans = Spans(sampler=ALWAYS_OFF)
    sent = await published(Tracing(tracer_provider=spans.provider), envelope())
    assert int(str(sent.headers["traceparent"])[-2:], 16) & 1 == 0
    assert not spans.all()


async def test_publishing_at_once_keeps_each_context_its_own(spans: Spans) -> None:
    """`publish_many` runs many in one loop; a context that leaks makes one job the parent of another."""
    layer = Tracing(tracer_provider=spans.provider)

    async def slow(envelope: Envelope) -> Receipt:
        await asyncio.sleep(0)
        assert f"{trace.get_current_span().get_span_context().span_id:016x}" in str(envelope.headers["traceparent"])
        return Receipt(envelope.job_id)

    await asyncio.gather(*(layer.publish(envelope(job_id=str(n)), slow) for n in range(20)))
    assert all(span.parent is None for span in spans.all())
    assert len(spans.all()) == 20


def test_without_an_sdk_nothing_is_made_and_a_context_passes_on() -> None:
    """A worker without an SDK in the middle would cut the trace in two; and it must cost next to nothing."""
    program = f"""
        import asyncio
        from opentelemetry import trace
        from leveret.middleware import Tracing
        from tests.unit.runs import attempt, chain
        from tests.unit.middleware.test_tracing import envelope, published, say

        layer = Tracing()
        seen = []

        async def handler(_):
            seen.append(trace.get_current_span().get_span_context())
            seen.append((await published(layer, envelope(job_id="child"))).headers)

        async def main():
            plain = envelope()
            assert await published(layer, plain) is plain
            await chain(layer, handler=handler)(attempt())
            assert (seen[0].is_valid, seen[1]) == (False, {{}}), seen
            await chain(layer, handler=handler)(attempt(headers={{"traceparent": "{PARENT}", "n": 1}}))
            assert seen[3] == {{"traceparent": "{PARENT}"}}, seen
            again = envelope(cause="retry", headers={{"traceparent": "{PARENT}"}})
            assert await published(layer, again) is again
            assert not trace.get_current_span().get_span_context().is_valid

        asyncio.run(main())
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60, cwd=Path(__file__).parents[3]
    )


def test_the_layers_import_nothing_of_opentelemetry() -> None:
    """A worker that traces nothing would pay 3 MB and 30 ms for it, in every process."""
    program = "import sys, leveret.middleware; print([name for name in sys.modules if 'opentelemetry' in name or 'importlib.metadata' in name])"
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


_TRACED = """
import asyncio, sys
from leveret.middleware import Tracing
from tests.unit.runs import attempt, chain


async def handler(_): ...


async def main():
    step = chain(Tracing(), handler=handler)
    if not NAMED:
        await step(attempt())
        assert not [name for name in sys.modules if "opentelemetry" in name]
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        trace.set_tracer_provider(TracerProvider())
    await step(attempt())    # it finds the SDK
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    exporter = InMemorySpanExporter()
    trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
    await step(attempt())
    print([span.name for span in exporter.get_finished_spans()])


asyncio.run(main())
"""


@pytest.mark.parametrize("named", [False, True], ids=["set by the program, late", "named by the environment"])
def test_an_sdk_is_found_wherever_it_comes_from(named: bool) -> None:
    """The layer looks whether OpenTelemetry is there at all: one that it overlooked would record nothing, without a word."""
    environment = os.environ | ({"OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"} if named else {})
    done = subprocess.run(
        [sys.executable, "-c", _TRACED.replace("NAMED", str(named))],
        env=environment,
        cwd=Path(__file__).parents[3],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "['process emails']"), done.stderr
