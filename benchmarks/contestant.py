"""One measurement in a process of its own: `python -m benchmarks.contestant NAME JOBS URL`; prints JSON."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

ONE_BY_ONE = 1000
"""Most jobs that are published one by one: each costs a round trip."""
WARM_UP = 200
CHUNK = 5000
PREFETCH = 200


def cpu_s() -> float:
    """Return user and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Stopwatch:
    """Times a block: rate and CPU a job."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self) -> Self:
        self._cpu, self._begun = cpu_s(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begun
        self.cpu = cpu_s() - self._cpu

    @property
    def row(self) -> dict[str, float]:
        """Return what was measured."""
        return {"per_s": self.jobs / self.seconds, "cpu_us": self.cpu / self.jobs * 1e6}


async def leveret(kind: str, jobs: int, url: str) -> dict[str, Any]:
    """Measure leveret on the broker at `url`."""
    from benchmarks.app import Classic, Quorum, app, count
    from leveret.broker import broker_module
    from leveret.worker import working

    job_class = Classic if kind == "classic" else Quorum
    queue = "bench.classic" if kind == "classic" else "bench.quorum"
    app._broker = url  # pyright: ignore[reportPrivateUsage] - the same app on each broker
    admin = broker_module(url).open_admin(url, app.runtime())
    rows: dict[str, Any] = {}
    async with app.publisher() as publisher:
        await publisher.publish_many([job_class(n) for n in range(WARM_UP)], timeout_s=60)
        some = min(jobs, ONE_BY_ONE)
        with Stopwatch(some) as watch:
            for n in range(some):
                await publisher.publish(job_class(n))
        rows["publish one by one"] = watch.row
        with Stopwatch(jobs) as watch:
            for at in range(0, jobs, CHUNK):
                await publisher.publish_many([job_class(n) for n in range(at, min(jobs, at + CHUNK))], timeout_s=120)
        rows["publish pipelined"] = watch.row
    total = WARM_UP + some + jobs
    count.expect(total)
    begun, used = time.perf_counter(), cpu_s()
    async with working(app, queues=[queue]):
        await count.finished.wait()
        seconds, cpu = time.perf_counter() - begun, cpu_s() - used
    rows["consume"] = {"per_s": total / seconds, "cpu_us": cpu / total * 1e6}
    for found in app.handlers([queue]):
        await admin.purge(found.queue)
    await admin.close()
    return rows


async def aio_pika(kind: str, jobs: int, url: str) -> dict[str, Any]:  # noqa: PLR0915 - as one would write it by hand
    """Measure raw aio-pika: the same messages, confirms, late acks, no framework."""
    import msgspec
    from aio_pika import DeliveryMode, Message, connect
    from aio_pika.abc import AbstractIncomingMessage

    from benchmarks.app import Classic, Quorum

    job_class = Classic if kind == "classic" else Quorum
    arguments: dict[str, Any] = {"x-max-priority": 6} if kind == "classic" else {"x-queue-type": "quorum"}
    name = f"bench.raw.{kind}"
    rows: dict[str, Any] = {}
    publishing, consuming = await connect(url), await connect(url)
    try:
        channel = await publishing.channel(publisher_confirms=True, on_return_raises=True)
        queue = await channel.declare_queue(name, durable=True, arguments=arguments)

        async def publish(n: int) -> None:
            message = Message(
                msgspec.json.encode(job_class(n)), content_type="application/json", delivery_mode=DeliveryMode.PERSISTENT,
                message_id=str(n), type="invoice.send", priority=4 if kind == "classic" else None,
            )
            await channel.default_exchange.publish(message, name, mandatory=True)

        async def pipelined(count: int) -> None:
            window = asyncio.Semaphore(1000)

            async def one(n: int) -> None:
                async with window:
                    await publish(n)

            await asyncio.gather(*(one(n) for n in range(count)))

        await pipelined(WARM_UP)
        some = min(jobs, ONE_BY_ONE)
        with Stopwatch(some) as watch:
            for n in range(some):
                await publish(n)
        rows["publish one by one"] = watch.row
        with Stopwatch(jobs) as watch:
            for at in range(0, jobs, CHUNK):
                await pipelined(min(CHUNK, jobs - at))
        rows["publish pipelined"] = watch.row

        total = left = WARM_UP + some + jobs
        finished = asyncio.Event()

        async def on_message(message: AbstractIncomingMessage) -> None:
            nonlocal left
            msgspec.json.decode(message.body, type=job_class)
            await message.ack()
            left -= 1
            if not left:
                finished.set()

        reader = await consuming.channel()
        await reader.set_qos(PREFETCH)
        source = await reader.get_queue(name)
        with Stopwatch(total) as watch:
            await source.consume(on_message)
            await finished.wait()
        rows["consume"] = watch.row
        await queue.delete(if_unused=False, if_empty=False)
    finally:
        await publishing.close()
        await consuming.close()
    return rows


CONTESTANTS: dict[str, tuple[Callable[[str, int, str], Coroutine[Any, Any, dict[str, Any]]], str]] = {
    "leveret, rabbitmq quorum": (leveret, "quorum"),
    "raw aio-pika, rabbitmq quorum": (aio_pika, "quorum"),
    "leveret, rabbitmq classic priority": (leveret, "classic"),
    "raw aio-pika, rabbitmq classic priority": (aio_pika, "classic"),
    "leveret, sqlite": (leveret, "quorum"),
    "leveret, memory": (leveret, "quorum"),
}


def main() -> None:
    """Run the contestant that the arguments name."""
    import uvloop

    name, jobs, url = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    measure, kind = CONTESTANTS[name]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(measure(kind, jobs, url))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
