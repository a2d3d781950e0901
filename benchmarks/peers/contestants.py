"""Who takes part, and in which setting. Imports none of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import Distribution
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MADE = ROOT / ".venv-peers"
"""Where what isn't Python's is installed and built, too."""
AMQPLIB = "2.3.1"
PACKAGE = "benchmarks.peers"
BOTH = ("quorum", "classic")
"""leveret's queue types; its classic queues have six priorities."""
PEERS = ("quorum", "plain")
"""What peers are measured on: plain is a classic queue without priorities, on which they are a little faster."""
Commands = list[list[str]]


class Server(NamedTuple):
    """A kind of server on which contestants are measured."""

    name: str
    kinds: tuple[str, ...]
    """Its kinds of queues; each belongs to one server."""
    module: str = ""
    """The module of this folder that starts one; empty: there is no server, and a measure makes what it needs."""


RABBITMQ = Server("RabbitMQ", (*BOTH, "plain"), "on_rabbitmq")
SQLITE = Server("SQLite", ("sqlite",))
POSTGRESQL = Server("PostgreSQL", ("postgresql",), "on_postgresql")
REDIS = Server("Redis", ("redis",), "on_redis")
SERVERS = (RABBITMQ, SQLITE, POSTGRESQL, REDIS)
KINDS = tuple(kind for server in SERVERS for kind in server.kinds)


class Contestant(NamedTuple):
    """One of those that are measured."""

    name: str
    file: str
    """The program in this folder."""
    packages: tuple[str, ...]
    """Distributions whose versions are printed."""
    settings: str
    commands: Callable[[int], Commands] | None = None
    """The commands that start so many worker processes; None: a program that measures itself (Node, C)."""
    server: Server = RABBITMQ
    kinds: tuple[str, ...] = BOTH
    """Queue types."""
    imports: tuple[str, ...] = ()
    """What else a worker on RabbitMQ imports, later than its app."""
    peer: bool = False
    """Whether it may be the best peer."""
    times: float = 1
    """How many times the others' jobs it is given where rates are measured: a few seconds' work, not the first tenth of one and not minutes."""
    queues: tuple[str, ...] = ()
    """Endings of the queues that it declares beside the one."""
    delays: tuple[str, ...] = ()
    """Queue types on which it can delay jobs."""
    broker_held: tuple[str, ...] = ()
    """Those where they wait in the broker rather than in a worker."""
    real_retry: bool = True
    """Whether a retry is counted and published anew; False: the message is requeued."""
    retry_delay_s: float = 0.0
    """The shortest wait of a retry."""
    wake: str = ""
    """An exchange that a message is sent to for its last acks to leave: an idle worker keeps them until its event loop wakes."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """The commands that make its tables."""
    waiting: str = ""
    """What its server is asked for the number of jobs that wait or run: a query, or a script of Redis. RabbitMQ knows by itself."""
    results: bool = False
    """Whether it takes part where results are kept; on RabbitMQ beside a store on Redis."""
    apart: str = ""
    """The folder in MADE that has its packages, where they contradict the others'."""

    @property
    def module(self) -> str:
        """What to import for it."""
        return f"{PACKAGE}.{self.file.removesuffix('.py')}"

    @property
    def versions(self) -> str:
        """Its packages with their versions."""
        if self.file.endswith(".mjs"):
            return f"Node {_output('node', '--version')}, amqplib {AMQPLIB}"
        if self.file.endswith(".c"):
            return f"librabbitmq {_output('pkg-config', '--modversion', 'librabbitmq')}"
        return ", ".join(f"{name} {self.version(name)}" for name in self.packages)

    def version(self, package: str) -> str | None:
        """Return the version of a package as it finds it; None where it isn't installed."""
        path = [str(MADE / self.apart)] if self.apart else sys.path
        found = next(iter(Distribution.discover(name=package, path=path)), None)
        return found.version if found is not None else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "of unknown version"


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _leveret(processes: int) -> Commands:
    return [
        _python(
            "leveret", "work", f"{PACKAGE}.with_leveret:app", "--processes", str(processes), "--log-level", "warning"
        )
    ]


def _aio_pika(processes: int) -> Commands:
    return [_python(f"{PACKAGE}.with_aio_pika")] * processes


def _celery(processes: int) -> Commands:
    plain = ("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR")
    return [
        _python("celery", "-A", f"{PACKAGE}.with_celery", "worker", "-P", "solo", "-n", f"bench{n}@%h", *plain)
        for n in range(processes)
    ]


def _dramatiq(processes: int) -> Commands:
    return [_python("dramatiq", f"{PACKAGE}.with_dramatiq", "--processes", str(processes), "--threads", "8")]


def _taskiq(processes: int) -> Commands:
    limits = (
        "--max-async-tasks",
        "100",
        "--max-prefetch",
        "100",
        "--ack-type",
        "when_executed",
        "--log-level",
        "CRITICAL",
    )
    return [_python("taskiq", "worker", f"{PACKAGE}.with_taskiq:broker", "--workers", str(processes), *limits)]


def _faststream(processes: int) -> Commands:
    return [
        _python(
            "faststream",
            "run",
            f"{PACKAGE}.with_faststream:app",
            "--workers",
            str(processes),
            "--log-level",
            "critical",
        )
    ]


def _procrastinate(processes: int) -> Commands:
    options = ("--concurrency", "100", "--delete-jobs", "always")
    return [_python("procrastinate", "--app", f"{PACKAGE}.with_procrastinate.app", "worker", *options)] * processes


def _pgqueuer(processes: int) -> Commands:
    options = ("--batch-size", "200", "--log-level", "ERROR")
    return [_python("pgqueuer", "run", f"{PACKAGE}.with_pgqueuer:worker", *options)] * processes


def _saq(processes: int) -> Commands:
    return [_python("saq", f"{PACKAGE}.with_saq.settings", "--workers", str(processes))]


def _arq(processes: int) -> Commands:
    return [_python("arq", f"{PACKAGE}.with_arq.Settings", "--custom-log-dict", f"{PACKAGE}.with_arq.LOG")] * processes


def _streaq(processes: int) -> Commands:
    return [_python("streaq", "run", f"{PACKAGE}.with_streaq:worker", "--workers", str(processes))]


def _huey(processes: int) -> Commands:
    return [
        _python("huey.bin.huey_consumer", f"{PACKAGE}.with_huey.huey", "-w", "1", "-k", "thread", "-q", "-g", "TERM")
    ] * processes


LEVERET = Contestant(
    "leveret",
    "with_leveret.py",
    ("leveret", "pamqp", "asyncpg", "hiredis", "msgspec", "uvloop"),
    "Tracing (no SDK), Retries, a RateLimit that never binds, Timeout; `leveret work`, concurrency 100, prefetch 200; publish_many; retries wait 0.25 s",
    _leveret,
    times=5,
    imports=("leveret.process.main", "leveret.brokers.rabbitmq"),
    queues=(".low", ".high", ".urgent", ".dead", ".suspects"),
    delays=BOTH,
    broker_held=BOTH,
    retry_delay_s=0.25,
    results=True,
)
AIO_PIKA = Contestant(
    "raw aio-pika",
    "with_aio_pika.py",
    ("aio-pika", "aiormq"),
    "no framework: on_return_raises, persistent, mandatory, 1 000 publishes in flight, msgspec, a task a message, prefetch 200, ack after the "
    "handler, uvloop; delays by one TTL queue; a retry is a requeue",
    _aio_pika,
    queues=(".wait",),
    delays=BOTH,
    broker_held=BOTH,
    real_retry=False,
)
CELERY = Contestant(
    "Celery",
    "with_celery.py",
    ("celery", "kombu", "amqp", "redis"),
    "confirm_publish, acks_late, results off (kept: its Redis backend, shared by the threads; ResultSet.join_native), solo pool (prefork costs twice "
    "the CPU a job), prefetch 200, no gossip, mingle or heartbeat events; pipelined = 8 threads; "
    "ETAs: native delayed delivery on quorum, in the worker on classic; retry(countdown=0)",
    _celery,
    imports=("kombu.transport.pyamqp", "celery.apps.worker"),
    kinds=PEERS,
    peer=True,
    delays=PEERS,
    broker_held=("quorum",),
    results=True,
    wake="celery.pidbox",  # with heartbeat events it wakes by itself, but then 2 000 ETAs on a classic queue ran 70 s late (measured)
)
DRAMATIQ = Contestant(
    "Dramatiq",
    "with_dramatiq.py",
    ("dramatiq", "pika"),
    "confirm_delivery, 8 threads, dramatiq_queue_prefetch=200, default middleware; classic only (it declares no quorum queue); "
    "pipelined = 8 threads; delayed jobs are held by the worker; min_backoff=max_backoff=1 ms",
    _dramatiq,
    kinds=("plain",),
    peer=True,
    queues=(".DQ", ".XQ"),
    delays=("plain",),
    retry_delay_s=0.001,
)
TASKIQ = Contestant(
    "Taskiq",
    "with_taskiq.py",
    ("taskiq", "taskiq-aio-pika", "taskiq-redis", "orjson"),
    "--max-async-tasks 100 --max-prefetch 100 --ack-type when_executed, qos 200, ORJSONSerializer, 1 000 kiq() in flight; its delay queue (TTL); "
    "SimpleRetryMiddleware (published anew at once); results kept: RedisAsyncResultBackend, orjson, gather(periodicity=0.01)",
    _taskiq,
    kinds=PEERS,
    peer=True,
    queues=(".dead_letter", ".delay"),
    delays=PEERS,
    broker_held=PEERS,
    results=True,
)
FASTSTREAM = Contestant(
    "FastStream",
    "with_faststream.py",
    ("faststream", "pydantic", "orjson"),
    "persist=True, mandatory, confirms, 1 000 publishes in flight, prefetch 200, plain dict, orjson, ack after the handler; "
    "no delays; a retry is NACK_ON_ERROR (a requeue)",
    _faststream,
    kinds=PEERS,
    peer=True,
    real_retry=False,
)
NODE = Contestant(
    "Node amqplib",
    "with_amqplib.mjs",
    (),
    "raw: confirm channel, persistent, mandatory, 1 000 in flight, prefetch 200, JSON.parse, each message acked",
    times=5,
)
C = Contestant(
    "C librabbitmq",
    "with_librabbitmq.c",
    (),
    "raw: confirms, persistent, mandatory, 1 000 in flight, prefetch 200, body not decoded, one ack for each 50",
    times=5,
)
HUEY = Contestant(
    "huey",
    "with_huey.py",
    ("huey",),
    "SqliteHuey(fsync=True), WAL, results off, one worker thread; it has no batch API and pops a job before it runs",
    _huey,
    SQLITE,
    SQLITE.kinds,
)
LEVERET_ON_POSTGRESQL = LEVERET._replace(
    server=POSTGRESQL,
    kinds=POSTGRESQL.kinds,
    prepare=((*_python("leveret", "migrate", f"{PACKAGE}.with_leveret:app"),),),
    waiting="SELECT count(*) FROM leveret.jobs",
)
PROCRASTINATE = Contestant(
    "Procrastinate",
    "with_procrastinate.py",
    ("procrastinate", "psycopg", "psycopg-pool"),
    "PsycopgConnector, pool of 4 to 20, `procrastinate worker` with concurrency 100, delete_jobs=always, notices; batch_defer_async of 1 000",
    _procrastinate,
    POSTGRESQL,
    POSTGRESQL.kinds,
    peer=True,
    times=0.1,
    prepare=((*_python("procrastinate", "--app", f"{PACKAGE}.with_procrastinate.app", "schema", "--apply"),),),
    waiting="SELECT count(*) FROM procrastinate_jobs",
)
PGQUEUER = Contestant(
    "PgQueuer",
    "with_pgqueuer.py",
    ("pgqueuer", "asyncpg", "orjson"),
    "AsyncpgDriver, durable tables, `pgq autovac`, `pgq run` with batch size 200 on uvloop, orjson; enqueue of 1 000",
    _pgqueuer,
    POSTGRESQL,
    POSTGRESQL.kinds,
    peer=True,
    prepare=((*_python("pgqueuer", "install"),), (*_python("pgqueuer", "autovac"),)),
    waiting="SELECT count(*) FROM pgqueuer",
)
SAQ = Contestant(
    "SAQ",
    "with_saq.py",
    ("saq", "psycopg", "psycopg-pool", "redis", "hiredis", "orjson"),
    "concurrency 100, ttl=-1 (finished jobs are deleted), orjson; it has no batch API: 1 000 enqueue() in flight; on PostgreSQL a pool of 4 to 20 and "
    "notices; on Redis uvloop, and results are awaited by job.refresh(until_complete=…), which is told of them",
    _saq,
    POSTGRESQL,
    POSTGRESQL.kinds,
    peer=True,
    times=0.1,
    prepare=((*_python(f"{PACKAGE}.with_saq"),),),
    waiting="SELECT count(*) FROM saq_jobs",
)
LEVERET_ON_REDIS = LEVERET._replace(
    server=REDIS,
    kinds=REDIS.kinds,
    waiting="""
local base, jobs = 'lv:{' .. ARGV[1] .. '}:', 0
for _, level in ipairs({'urgent', 'high', 'normal', 'low'}) do jobs = jobs + redis.call('LLEN', base .. level) end
for _, held in ipairs(redis.call('KEYS', base .. 'held:*')) do jobs = jobs + redis.call('HLEN', held) end
return jobs + redis.call('ZCARD', base .. 'delayed')
""",
)
SAQ_ON_REDIS = SAQ._replace(
    server=REDIS,
    kinds=REDIS.kinds,
    times=0.2,
    prepare=(),
    waiting="return redis.call('ZCARD', 'saq:' .. ARGV[1] .. ':incomplete')",
    results=True,
)
ARQ = Contestant(
    "arq",
    "with_arq.py",
    ("arq", "redis", "hiredis", "uvloop"),
    "max_jobs 100, poll_delay 5 ms (0.5 s by default, which would be its latency), keep_result 0, uvloop, redis-py 5 (its newest); it has no batch API: "
    "1 000 enqueue_job() in flight; a result is asked for every 5 ms",
    _arq,
    REDIS,
    REDIS.kinds,
    peer=True,
    times=0.25,
    waiting="return redis.call('ZCARD', ARGV[1])",
    results=True,
    apart="arq",
)
STREAQ = Contestant(
    "streaq",
    "with_streaq.py",
    ("streaq", "coredis", "anyio", "uvloop"),
    "concurrency 100 (prefetch as many), ttl=0 (no results), silent, uvloop; enqueue_many of 1 000",
    _streaq,
    REDIS,
    REDIS.kinds,
    peer=True,
    times=0.1,
    waiting="return redis.call('XLEN', 'streaq:' .. ARGV[1] .. ':queues:normal')",
    results=True,
)
CONTESTANTS = (
    *(LEVERET, AIO_PIKA, CELERY, DRAMATIQ, TASKIQ, FASTSTREAM, NODE, C),
    *(LEVERET._replace(server=SQLITE, kinds=SQLITE.kinds), HUEY),
    *(LEVERET_ON_POSTGRESQL, PROCRASTINATE, PGQUEUER, SAQ),
    *(LEVERET_ON_REDIS, SAQ_ON_REDIS, ARQ, STREAQ),
)


def missing(contestant: Contestant) -> str | None:
    """Return why it can't take part here, or None; Node's package is installed and the C program built at first use."""
    if contestant is NODE:
        return _install_amqplib()
    if contestant is C:
        return _build_c()
    for name in contestant.packages:
        if contestant.version(name) is None:
            return f"no {name} in {sys.prefix}: `make bench-peers` installs it"
    return None


def _install_amqplib() -> str | None:
    if not (shutil.which("node") and shutil.which("npm")):
        return "no node and npm here"
    if (MADE / "node" / "node_modules" / "amqplib").exists():
        return None
    (MADE / "node").mkdir(parents=True, exist_ok=True)
    command = [
        "npm",
        "install",
        "--silent",
        "--no-fund",
        "--no-audit",
        "--prefix",
        str(MADE / "node"),
        f"amqplib@{AMQPLIB}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return f"npm install failed: {done.stderr.strip()[-200:]}" if done.returncode else None


def allocations_library() -> str:
    """Build what counts allocations, at first use; return its path, or nothing where it can't be built."""
    return "" if _build("allocations.c", "allocations.so", "-shared", "-fPIC") else str(MADE / "allocations.so")


def _build_c() -> str | None:
    return _build(C.file, "with_librabbitmq", "-lrabbitmq")


def _build(file: str, made: str, *options: str) -> str | None:
    compiler, source, binary = shutil.which("cc"), HERE / file, MADE / made
    if compiler is None:
        return "no cc here"
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return None
    MADE.mkdir(exist_ok=True)
    command = [compiler, "-O2", str(source), "-o", str(binary), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return (
        f"it doesn't build (Debian: apt install librabbitmq-dev): {done.stderr.strip()[:200]}"
        if done.returncode
        else None
    )


def environment(
    contestant: Contestant,
    *,
    url: str,
    kind: str,
    mode: str = "plain",
    size: int = 200,
    processes: int = 1,
    slots: Path | None = None,
    store: str = "",
) -> dict[str, str]:
    """Return the environment that tells a contestant's processes what to do."""
    # a package that pip installs has its bytecode: whoever runs from a checkout writes it at the first run
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    apart = {"PYTHONPATH": str(MADE / contestant.apart)} if contestant.apart else {}
    counting = {"LD_PRELOAD": allocations_library(), "PYTHONMALLOC": "malloc"} if mode == "allocations" else {}
    return {
        **inherited,
        **apart,
        **counting,
        "BENCH_URL": url,
        "BENCH_STORE": store,
        "PGDSN": url,  # where `pgq` looks
        "BENCH_KIND": kind,
        "BENCH_QUEUE": queue(contestant, kind),
        "BENCH_MODE": mode,
        "BENCH_BYTES": str(size),
        "BENCH_PROCESSES": str(processes),
        "BENCH_SLOTS": str(slots or ""),
        "BENCH_NODE": str(MADE / "node"),
        "dramatiq_queue_prefetch": "200",
        "PYTHONWARNINGS": "ignore",
    }


def queue(contestant: Contestant, kind: str) -> str:
    """Return the name of its queue."""
    return f"bench.{contestant.file.removeprefix('with_').split('.')[0]}.{kind}"
