"""What is measured: each unit is one kind of work, done by each contestant in turn."""

from __future__ import annotations

import sqlite3
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.peers.contestants import (
    CONTESTANTS,
    HUEY,
    LEVERET,
    NODE,
    POSTGRESQL,
    RABBITMQ,
    REDIS,
    SQLITE,
    C,
    Contestant,
    Server,
    allocations_library,
)
from benchmarks.peers.harness import Keeper, Refused, Worker, embedded_file, import_ms, outbox, program, publish
from benchmarks.peers.servers import Queue, Running
from benchmarks.peers.shape import PREFETCH

Row = dict[str, float]


class Context(NamedTuple):
    """Where and how large."""

    servers: Mapping[Server, Running]
    arguments: Namespace

    def queue(self, contestant: Contestant, kind: str) -> Queue:
        """Return the contestant's queue, without jobs."""
        return self._cleared(contestant.server, contestant, kind)

    def store(self, contestant: Contestant, kind: str) -> str:
        """Return the URL of a Redis that keeps the results, beside the contestant's server; without any yet."""
        return self._cleared(REDIS, contestant, kind).url

    def _cleared(self, server: Server, contestant: Contestant, kind: str) -> Queue:
        queue = self.servers[server].queue(contestant, kind)
        queue.clear()
        return queue


class Unit(NamedTuple):
    """One kind of work."""

    measure: str
    """What `--measure` selects."""
    name: str
    metrics: dict[str, str]
    """Key of a row → heading; the first is the one that is compared and drawn."""
    run: Callable[[Context, Contestant, str], Row]
    enters: Callable[[Contestant, str], bool]
    """Whether a contestant takes part with that queue type."""
    rising: bool = False
    """Whether more is better."""
    most: int = 1000
    """Most rounds: it takes long, and hardly varies or isn't compared."""
    compared: str = "as fast"
    """What follows a ratio of the first metric: 1.33 × as fast, 0.76 × the p50."""
    servers: tuple[Server, ...] = (RABBITMQ,)
    """Whose contestants take part."""
    beside: tuple[Server, ...] = ()
    """Servers that are needed beside the contestant's."""


RATE = {"per_s": "/s", "cpu_us": "CPU µs"}
LATE = {"p50_ms": "p50 ms", "p99_ms": "p99 ms", "p999_ms": "p99.9 ms", "max_ms": "max ms"}


def percentiles(late_ns: list[int]) -> Row:
    """Return p50, p99, p99.9 and the maximum in ms."""
    late = sorted(late_ns)

    def at(share: float) -> float:
        return late[min(len(late) - 1, int(len(late) * share))] / 1e6

    return {"p50_ms": at(0.5), "p99_ms": at(0.99), "p999_ms": at(0.999), "max_ms": late[-1] / 1e6}


def publishing(how: str, size: int = 200) -> Callable[[Context, Contestant, str], Row]:
    """Publish and check that the queue holds all of it."""

    def run(context: Context, contestant: Contestant, kind: str) -> Row:
        queue = context.queue(contestant, kind)
        jobs = sized(int(context.arguments.jobs * contestant.times), size)
        jobs = min(jobs, context.arguments.one_by_one) if how == "one" else jobs
        row = publish(contestant, queue.url, kind, how, jobs, size=size)
        queue.expect(int(row["sent"]))
        queue.clear()
        return {key: row[key] for key in RATE}

    return run


def sized(jobs: int, size: int) -> int:
    """Return fewer jobs where they are large: at most 100 MB of bodies (a quorum queue of 3.10 keeps them in memory)."""
    return max(100, min(jobs, 100_000_000 // size)) if size > 200 else jobs


def consuming(processes: int, size: int = 200) -> Callable[[Context, Contestant, str], Row]:
    """Consume what waits; from the first handler's start to the last's."""

    def run(context: Context, contestant: Contestant, kind: str) -> Row:
        queue = context.queue(contestant, kind)
        jobs = max(
            sized(int(context.arguments.jobs * contestant.times), size), 2 * PREFETCH * (processes - 1) + 200
        )  # each process gets some
        if contestant.commands is None:
            jobs = int(publish(contestant, queue.url, kind, "many", jobs, size=size)["sent"])
            queue.expect(jobs)
            row = program(contestant, queue.url, kind, "consume", jobs, size=size)
            found = {key: row[key] for key in RATE}
        else:
            queue.fill(jobs, size)
            queue.expect(jobs)
            with Worker(contestant, queue.url, kind, processes=processes, size=size) as worker:
                worker.wait(jobs)
                cpu_ns = worker.cpu_ns()
                found = {"per_s": jobs / ((worker.last_ns - worker.first_ns) / 1e9), "cpu_us": cpu_ns / jobs / 1e3}
                worker.finish(jobs)
        queue.expect(0)
        return found

    return run


def latency(per_s: int) -> Callable[[Context, Contestant, str], Row]:
    """Publish at a steady rate to an idle worker; from the call of publish to the handler's start."""

    def run(context: Context, contestant: Contestant, kind: str) -> Row:
        queue, seconds = context.queue(contestant, kind), context.arguments.seconds
        jobs = int(per_s * seconds)
        if contestant is C:
            row = program(C, queue.url, kind, "latency", jobs, seconds)
            late, reached = row["late_ns"], row["per_s"]
        else:
            with Worker(contestant, queue.url, kind, mode="samples") as worker:
                publish(contestant, queue.url, kind, "one", 1)
                worker.wait(1)
                reached = publish(contestant, queue.url, kind, "paced", jobs, seconds)["per_s"]
                worker.wait(jobs + 1)
                late = worker.samples()[1:]
                worker.finish(jobs + 1)
        queue.expect(0)
        if reached < 0.95 * per_s and not context.arguments.toy:  # a toy is too short for rates
            msg = f"it publishes {reached:.0f}/s, not {per_s}/s"
            raise Refused(msg)
        return percentiles(late[len(late) // 20 :])  # the first twentieth warms up

    return run


def spread(context: Context, contestant: Contestant, kind: str) -> Row:
    """Delay each job by 5 s, published evenly over 5 s; how late it runs."""
    return _late(context, contestant, kind, "spread", context.arguments.delayed, 5.0)


def delayed(context: Context, contestant: Contestant, kind: str) -> Row:
    """Delay each job by 5 s, published as fast as it goes; how late it runs."""
    return _late(context, contestant, kind, "delayed", context.arguments.delayed, 5.0)


def due(context: Context, contestant: Contestant, kind: str) -> Row:
    """Let many jobs fall due evenly within one second; how late they run."""
    jobs = context.arguments.due
    return _late(context, contestant, kind, "due", jobs, 5.0 + jobs / 400)


def _late(context: Context, contestant: Contestant, kind: str, how: str, jobs: int, seconds: float) -> Row:
    queue = context.queue(contestant, kind)
    with Worker(contestant, queue.url, kind, mode="samples") as worker:
        publish(contestant, queue.url, kind, "one", 1)
        worker.wait(1)
        sent = int(publish(contestant, queue.url, kind, how, jobs, seconds)["sent"])
        worker.wait(sent + 1)
        late = worker.samples()[sent + 1 - jobs :]  # those that warmed up ran first
        worker.finish(sent + 1)
    queue.expect(0)
    if (early := -min(late) / 1e9) > 0.05:
        msg = f"a job ran {early:.2f} s before it was due"
        raise Refused(msg)
    return percentiles(late)


def failing(context: Context, contestant: Contestant, kind: str) -> Row:
    """Let every job fail once; from the first run to the last success, and the same without the nominal delay."""
    queue, jobs = context.queue(contestant, kind), context.arguments.fails
    queue.fill(jobs)
    with Worker(contestant, queue.url, kind, mode="fails") as worker:
        worker.wait(jobs)
        seconds = (worker.last_ns - worker.first_ns) / 1e9
        worker.finish(jobs)
    queue.expect(0)
    return {"net_s": seconds - contestant.retry_delay_s, "seconds": seconds}


def memory(context: Context, contestant: Contestant, kind: str) -> Row:
    """Resident memory of the worker process: after one job and 2 s, and after many more."""
    queue = context.queue(contestant, kind)
    jobs = int(context.arguments.memory_jobs * min(1, contestant.times))
    queue.fill(1)
    with Worker(contestant, queue.url, kind) as worker:
        worker.wait(1)
        time.sleep(2)
        idle = worker.rss_mb()
        for begun in range(0, jobs, 20_000):
            queue.fill(min(20_000, jobs - begun))
            worker.wait(1 + begun)  # the broker never holds more than two such fills
        worker.wait(1 + jobs)
        time.sleep(2)
        after = worker.rss_mb()
        worker.finish(1 + jobs)
    queue.expect(0)
    return {"idle_mb": idle, "after_mb": after}


def allocating(context: Context, contestant: Contestant, kind: str) -> Row:
    """Calls of malloc, calloc and realloc a consumed job, Python's own allocator off; what its free lists serve isn't in it."""
    jobs = min(context.arguments.jobs, 2000)
    if not allocations_library():
        msg = "allocations.c doesn't build here: it needs cc and glibc"
        raise Refused(msg)
    queue = context.queue(contestant, kind)
    queue.fill(jobs)
    with Worker(contestant, queue.url, kind, mode="allocations") as worker:
        worker.wait(jobs)
        found = worker.allocations / (jobs - 1)
        worker.finish(jobs)
    queue.expect(0)
    return {"allocations": found}


def start(context: Context, contestant: Contestant, kind: str) -> Row:
    """From the start of the worker's command to the start of its first job's handler."""
    queue = context.queue(contestant, kind)
    queue.fill(1)
    with Worker(contestant, queue.url, kind) as worker:
        worker.wait(1)
        found = (worker.first_ns - worker.begun_ns) / 1e6
        worker.finish(1)
    queue.expect(0)
    return {"start_ms": found}


def importing(context: Context, contestant: Contestant, kind: str) -> Row:
    """Import the app with its broker."""
    return {"import_ms": import_ms(contestant, context.servers[contestant.server].url, kind)}


def awaiting(context: Context, contestant: Contestant, kind: str) -> Row:
    """Publish to an idle worker and wait for the result, then the next; from the call of publish to the result."""
    queue, jobs = context.queue(contestant, kind), context.arguments.one_by_one
    with Worker(contestant, queue.url, kind, mode="results") as worker:
        publish(contestant, queue.url, kind, "results", 1, mode="results")
        took = publish(contestant, queue.url, kind, "results", jobs, mode="results")["took_ns"]
        worker.finish(jobs + 1)
    queue.expect(0)
    return percentiles(took[len(took) // 20 :])  # the first twentieth warms up


def keeping(context: Context, contestant: Contestant, kind: str) -> Row:
    """Publish jobs whose results a store keeps, work them off, then read all results; the rate is that of the three in turn."""
    queue, store = context.queue(contestant, kind), context.store(contestant, kind)
    with Keeper(contestant, queue.url, kind, int(context.arguments.kept * contestant.times), store) as keeper:
        sent = keeper.published()
        jobs = int(sent["sent"])
        queue.expect(jobs)
        with Worker(contestant, queue.url, kind, mode="results", store=store) as worker:
            worker.wait(jobs)
            work_per_s = jobs / ((worker.last_ns - worker.first_ns) / 1e9)
            read = keeper.read()  # while the worker lives: the last results may still be on their way
            cpu_ns = worker.cpu_ns()
            worker.finish(jobs)
    queue.expect(0)
    rates = {"publish_per_s": sent["per_s"], "work_per_s": work_per_s, "read_per_s": read["per_s"]}
    together = 1 / sum(1 / rate for rate in rates.values())
    return {"per_s": together, **rates, "cpu_us": sent["cpu_us"] + cpu_ns / jobs / 1e3 + read["cpu_us"]}


def relaying(context: Context, contestant: Contestant, kind: str) -> Row:
    """Publish within a transaction into an outbox, and relay it; beside `publish_many` to the same broker."""
    urls = {
        "LEVERET_TEST_AMQP": context.servers[RABBITMQ].url,
        "LEVERET_TEST_POSTGRES": context.servers[POSTGRESQL].url,
    }
    return outbox(context.arguments.jobs, urls)


def sqlite(context: Context, contestant: Contestant, kind: str) -> Row:
    """Publish into a new file, then consume it."""
    jobs = int(context.arguments.sqlite_jobs * contestant.times)
    with embedded_file(context.arguments.folder) as url:
        path = Path(url.removeprefix("sqlite:///"))
        sent = publish(contestant, url, kind, "many", jobs)
        _expect_rows(contestant, path, int(sent["sent"]))
        total = int(sent["sent"])
        with Worker(contestant, url, kind) as worker:
            worker.wait(total)
            cpu_ns = worker.cpu_ns()
            seconds = (worker.last_ns - worker.first_ns) / 1e9
            worker.finish(total)
        _expect_rows(contestant, path, 0)
    return {
        "publish_per_s": sent["per_s"],
        "per_s": total / seconds,
        "publish_cpu_us": sent["cpu_us"],
        "cpu_us": cpu_ns / total / 1e3,
    }


def _expect_rows(contestant: Contestant, path: Path, expected: int) -> None:
    connection = sqlite3.connect(path)
    try:
        (found,) = connection.execute(f"SELECT count(*) FROM {'task' if contestant is HUEY else 'jobs'}").fetchone()
    finally:
        connection.close()
    if found != expected:
        msg = f"the file holds {found} jobs, not {expected}"
        raise Refused(msg)


def _anyone(contestant: Contestant, kind: str) -> bool:
    return True


def _workers(contestant: Contestant, kind: str) -> bool:
    return contestant.commands is not None


def _one_kind(contestant: Contestant, kind: str) -> bool:
    """Quorum where there is a choice: the type hardly matters."""
    return contestant.commands is not None and kind == contestant.kinds[0]


def _one_kind_or_limit(contestant: Contestant, kind: str) -> bool:
    return kind == contestant.kinds[0]


def _workers_or_c(contestant: Contestant, kind: str) -> bool:
    return contestant is not NODE and kind == contestant.kinds[0]


def _leveret(contestant: Contestant, kind: str) -> bool:
    return contestant.name == LEVERET.name


def _delays(contestant: Contestant, kind: str) -> bool:
    return kind in contestant.delays


def _results(contestant: Contestant, kind: str) -> bool:
    return contestant.results and kind == contestant.kinds[0]


BROKERS = (RABBITMQ, POSTGRESQL, REDIS)
UNITS = (
    Unit("publish", "publish one by one", RATE, publishing("one"), _anyone, rising=True, servers=BROKERS),
    Unit("publish", "publish pipelined", RATE, publishing("many"), _anyone, rising=True, servers=BROKERS),
    Unit("consume", "consume, one process", RATE, consuming(1), _anyone, rising=True, servers=BROKERS),
    Unit("consume", "consume, two processes", RATE, consuming(2), _workers, rising=True, servers=(RABBITMQ, REDIS)),
    Unit(
        "allocations",
        "allocations a consumed job",
        {"allocations": "a job"},
        allocating,
        _one_kind,
        most=1,
        compared="the allocations",
    ),
    Unit("latency", "latency at 200/s", LATE, latency(200), _workers_or_c, compared="the p50", servers=BROKERS),
    Unit("latency", "latency at 2 000/s", LATE, latency(2000), _one_kind, most=3, compared="the p50"),
    Unit("start", "import", {"import_ms": "ms"}, importing, _one_kind, compared="the time"),
    Unit("start", "start to first job", {"start_ms": "ms"}, start, _one_kind, compared="the time"),
    Unit(
        "memory",
        "memory",
        {"idle_mb": "idle MB", "after_mb": "MB after"},
        memory,
        _one_kind,
        most=1,
        compared="the memory",
        servers=BROKERS,
    ),
    Unit("delayed", "delayed by 5 s, spread out, lateness", LATE, spread, _delays, compared="the p50"),
    Unit("delayed", "delayed by 5 s, lateness", LATE, delayed, _delays, compared="the p50"),
    Unit("delayed", "due within one second, lateness", LATE, due, _delays, most=3, compared="the p50"),
    Unit(
        "retries",
        "jobs that fail once",
        {"net_s": "s, the retry's delay taken off", "seconds": "s"},
        failing,
        _workers,
        compared="the time",
    ),
    Unit("payload", "publish pipelined, 4 KB", RATE, publishing("many", 4096), _one_kind_or_limit, rising=True, most=3),
    Unit("payload", "consume, 4 KB", RATE, consuming(1, 4096), _one_kind_or_limit, rising=True, most=3),
    Unit(
        "payload",
        "publish pipelined, 256 KB",
        RATE,
        publishing("many", 262_144),
        _one_kind_or_limit,
        rising=True,
        most=3,
    ),
    Unit("payload", "consume, 256 KB", RATE, consuming(1, 262_144), _one_kind_or_limit, rising=True, most=3),
    Unit(
        "sqlite",
        "SQLite",
        {
            "publish_per_s": "publish_many /s",
            "per_s": "consume /s",
            "publish_cpu_us": "publish CPU µs",
            "cpu_us": "consume CPU µs",
        },
        sqlite,
        _anyone,
        rising=True,
        servers=(SQLITE,),
    ),
    Unit(
        "results",
        "a result awaited one by one, on Redis",
        LATE,
        awaiting,
        _results,
        compared="the p50",
        servers=(REDIS,),
    ),
    Unit(
        "results",
        "jobs with results, kept by Redis",
        {
            "per_s": "all three /s",
            "publish_per_s": "publish /s",
            "work_per_s": "work /s",
            "read_per_s": "read /s",
            "cpu_us": "CPU µs",
        },
        keeping,
        _results,
        rising=True,
        servers=(RABBITMQ,),
        beside=(REDIS,),
    ),
    Unit(
        "relay",
        "relay of an outbox",
        {
            "share": "of publish_many",
            "per_s": "relay /s",
            "cpu_us": "relay CPU µs",
            "publish_per_s": "publish_many /s",
            "within_per_s": "in a transaction /s",
        },
        relaying,
        _leveret,
        rising=True,
        servers=(POSTGRESQL,),
        beside=(RABBITMQ,),
    ),
)
MEASURES = tuple(dict.fromkeys(unit.measure for unit in UNITS))


def entrants(unit: Unit) -> list[tuple[Contestant, str]]:
    """Return who takes part, with each queue type."""
    return [
        (one, kind) for one in CONTESTANTS if one.server in unit.servers for kind in one.kinds if unit.enters(one, kind)
    ]
