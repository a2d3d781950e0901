"""Spans beside the contrib instrumentor of aio-pika, on a real broker."""

import asyncio
from collections.abc import Iterator

import aio_pika
import pytest
from opentelemetry.instrumentation.aio_pika import AioPikaInstrumentor  # pyright: ignore[reportMissingTypeStubs]

from leveret import App, Attempt, Job, Queue
from leveret.middleware import Retries, Tracing
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw
from tests.unit.middleware.test_tracing import Spans, id_of, links_of, parent_of

pytestmark = pytest.mark.rabbit

traced = Queue("tests.traced", priorities=False)


class Greet(Job, name="traced.greet", queue=traced):
    """A job that fails once."""


@pytest.fixture
def spans() -> Iterator[Spans]:
    """What leveret and the contrib instrumentor record together."""
    made = Spans()
    AioPikaInstrumentor().instrument(tracer_provider=made.provider)
    yield made
    AioPikaInstrumentor().uninstrument()
    made.provider.shutdown()


async def test_no_span_is_there_twice_beside_the_contrib_instrumentor(rabbit: Rabbit, raw: Raw, spans: Spans) -> None:
    """Whoever instruments all they have would see each publish and each run twice, and a retry below the wrong one."""
    connection = await aio_pika.connect(rabbit.url, timeout=20)
    async with connection:
        async with asyncio.timeout(20):
            channel = await connection.channel()
            control = await channel.declare_queue(exclusive=True)
            await channel.default_exchange.publish(aio_pika.Message(b""), routing_key=control.name)
    assert len(spans.all()) == 1  # it is on
    app = App(
        "traced",
        broker=rabbit.url,
        middleware=[Tracing(tracer_provider=spans.provider), Retries(base_s=0.01, cap_s=0.01)],
    )
    ended = asyncio.Event()

    @app.handler
    async def greet(job: Greet, attempt: Attempt[None]) -> None:
        if attempt.number == 1:
            raise ValueError
        ended.set()

    try:
        async with asyncio.timeout(60), app.worker(queues=[traced.name]):
            async with app.publisher() as publisher, asyncio.timeout(20):
                await publisher.publish(Greet(), timeout_s=15)
            await ended.wait()
    finally:
        for name in (traced.name, f"{traced.name}.dead"):
            await raw.delete(name)
    _, sent, first, second = sorted(spans.all(), key=lambda span: span.start_time or 0)
    assert [span.name for span in (sent, first, second)] == [
        "send tests.traced",
        "process tests.traced",
        "process tests.traced",
    ]
    assert [parent_of(first), parent_of(second)] == [id_of(sent), id_of(first)]
    assert links_of(second) == [id_of(first)]
