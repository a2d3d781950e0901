"""What leveret declares on RabbitMQ: names, arguments, bindings. Pure data; `declare` in rabbitmq_connection carries it out.

    publish ─► lv.jobs ─<queue>.<level>─► <queue>, <queue>.low, .high, .urgent ─rejected, over the limit─► lv.dead ─► <queue>.dead
    delayed ─► lv.delay.<bit> ─ … ─► lv.delay.due ─q/<queue>/<level>─► the same queues
                                          └─ nobody takes it ─► lv.delay.alt ─► lv.lost

A quorum queue is a set of siblings, one a level; a classic one is a single queue in the broker's own order. Arguments
come from one table, the same for every version of the broker, since a queue can't be declared again with others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from leveret.job import LEVELS, Priority, Queue

JOBS = "lv.jobs"
JOBS_ALTERNATE = "lv.jobs.alt"
DEAD = "lv.dead"
DUE = "lv.delay.due"
DUE_ALTERNATE = "lv.delay.alt"
LOST = "lv.lost"

BITS = 24
UNIT_MS = 250
MAX_DELAY_S = 48 * 86_400.0
"""Longest delay, seconds; all 24 bits are 48.5 days."""
_SIGNIFICANT_BITS = 5

PRIORITY_PROPERTY = {Priority.LOW: 3, Priority.NORMAL: 4, Priority.HIGH: 5, Priority.URGENT: 6}
"""AMQP's `priority` of each level, on classic queues. 4 is what brokers take a message without one for."""


class Exchange(msgspec.Struct, frozen=True):
    """A durable exchange to declare."""

    name: str
    kind: Literal["direct", "topic", "fanout"]
    alternate: str | None = None
    """The exchange that gets what this one can't route."""

    @property
    def arguments(self) -> dict[str, object]:
        """As AMQP takes them."""
        return {} if self.alternate is None else {"alternate-exchange": self.alternate}


class PhysicalQueue(msgspec.Struct, frozen=True):
    """A durable queue to declare."""

    name: str
    arguments: dict[str, object]


class Binding(msgspec.Struct, frozen=True):
    """A binding from exchange `source` to a queue, or to an exchange."""

    source: str
    destination: str
    key: str
    to: Literal["queue", "exchange"] = "queue"


Declaration: TypeAlias = Exchange | PhysicalQueue | Binding


# --- names


def physical(queue: Queue, level: Priority) -> str:
    """Return the physical queue that holds `queue`'s jobs of `level`."""
    return sibling(queue.name, level) if queue.type == "quorum" else queue.name


def sibling(name: str, level: Priority) -> str:
    """Return the sibling of quorum queue `name` for `level`; NORMAL's is the name itself."""
    return name if level is Priority.NORMAL else f"{name}.{level.value}"


def physicals(queue: Queue) -> dict[str, tuple[Priority, ...]]:
    """Return each physical queue of `queue`, most urgent first, with the levels that it holds."""
    if queue.type == "classic":
        return {queue.name: queue.levels}
    return {sibling(queue.name, level): (level,) for level in queue.levels}


def level_of(name: str, sibling_name: str) -> Priority | None:
    """Return the level that sibling `sibling_name` of queue `name` holds; None if it is no sibling of it."""
    return next((level for level in LEVELS if sibling(name, level) == sibling_name), None)


def dead_queue(name: str) -> str:
    """Return the dead-letter queue of queue `name`: one for all its levels."""
    return f"{name}.dead"


def job_key(name: str, level: Priority) -> str:
    """Return the routing key on `lv.jobs`."""
    return f"{name}.{level.value}"


def destination(name: str, level: Priority) -> str:
    """Return where a delayed job goes, as one word of a topic key. At most 159 bytes of the 207 that 24 bits leave.

    Logical, never a physical name, so that what waits follows when a queue is replaced.
    """
    return f"q/{name.replace('.', '/')}/{level.value}"


def ladder(kind: str, bit: int) -> str:
    """Return the exchange, and the queue, of one bit of a ladder."""
    return f"lv.delay.{bit}" if kind == "quorum" else f"lv.delay.classic.{bit}"


# --- routes


def delay_units(delay_s: float) -> int:
    """Return `delay_s` in units of 0.25 s, rounded up to five significant bits: at most five hops, at most 6.25 % late.

    Above 47 days five bits would need a 25th: there it takes the fewest that don't. ValueError above 48 days.
    """
    if not 0 < delay_s <= MAX_DELAY_S:
        msg = f"a delay is above 0 s and at most 48 days ({MAX_DELAY_S:.0f} s), not {delay_s} s"
        raise ValueError(msg)
    units = max(1, math.ceil(delay_s * 1000 / UNIT_MS))
    for significant in range(_SIGNIFICANT_BITS, BITS + 1):
        shift = max(0, units.bit_length() - significant)
        rounded = -(-units >> shift) << shift
        if rounded < 1 << BITS:
            return rounded
    raise AssertionError(delay_s)


def route(queue: Queue, level: Priority, delay_s: float) -> tuple[str, str]:
    """Return exchange and routing key for a job of `queue`, now (`delay_s` <= 0) or later."""
    if delay_s <= 0:
        return JOBS, job_key(queue.name, level)
    units = delay_units(delay_s)
    digits = ".".join(format(units, f"0{BITS}b"))
    return ladder(queue.type, units.bit_length() - 1), f"{digits}.{destination(queue.name, level)}"


# --- declarations

_QUORUM: dict[str, object] = {
    "x-queue-type": "quorum",
    # Explicit, since the defaults differ: none on 3.10; on 4.x a job is dropped after 20 returns. -1 means one delivery on 3.10.
    "x-delivery-limit": 1_000_000,
}
_AT_LEAST_ONCE: dict[str, object] = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
_CLASSIC: dict[str, object] = {"x-queue-type": "classic"}


def job_queue_arguments(queue: Queue) -> dict[str, object]:
    """Return the arguments of `queue`'s physical queues."""
    dead: dict[str, object] = {"x-dead-letter-exchange": DEAD, "x-dead-letter-routing-key": queue.name}
    if queue.type == "quorum":
        return _QUORUM | _AT_LEAST_ONCE | dead
    return _CLASSIC | dead | ({"x-max-priority": PRIORITY_PROPERTY[Priority.URGENT]} if queue.priorities else {})


SHARED: tuple[Declaration, ...] = (
    Exchange(DEAD, "direct"),
    Exchange(JOBS_ALTERNATE, "direct"),
    Exchange(JOBS, "direct", alternate=JOBS_ALTERNATE),
    Exchange(LOST, "fanout"),
    PhysicalQueue(LOST, _QUORUM),
    Binding(LOST, LOST, ""),
    Exchange(DUE_ALTERNATE, "topic", alternate=LOST),
    Exchange(DUE, "topic", alternate=DUE_ALTERNATE),
)
"""What all queues share."""

_ANY_BITS = "*." * BITS


def of_queue(queue: Queue) -> tuple[Declaration, ...]:
    """Return what `queue` needs beside `SHARED`, its dead-letter queue first."""
    dead = dead_queue(queue.name)
    declarations: list[Declaration] = [PhysicalQueue(dead, _QUORUM), Binding(DEAD, dead, queue.name)]
    arguments = job_queue_arguments(queue)
    for name, levels in physicals(queue).items():
        declarations.append(PhysicalQueue(name, arguments))
        for level in levels:
            declarations.append(Binding(DUE, name, _ANY_BITS + destination(queue.name, level)))
            # last: once its key routes, all the rest is there
            declarations.append(Binding(JOBS, name, job_key(queue.name, level)))
    return tuple(declarations)


def _pattern(bit: int, digit: str) -> str:
    words = ["*"] * (BITS + 1)
    words[BITS - 1 - bit] = digit
    return ".".join(words)


def of_ladder(kind: str) -> tuple[Declaration, ...]:
    """Return the delay ladder for queues of `kind`: a job waits in the queue of each bit that its key has set.

    One TTL queue can't serve: a message of 1 s behind one of 10 s takes 10 s. Bindings have exactly BITS + 1 words.
    """
    arguments = _QUORUM | _AT_LEAST_ONCE if kind == "quorum" else _CLASSIC
    declarations: list[Declaration] = []
    below = DUE
    for bit in range(BITS):
        name = ladder(kind, bit)
        declarations += (
            Exchange(name, "topic"),
            PhysicalQueue(name, arguments | {"x-dead-letter-exchange": below, "x-message-ttl": UNIT_MS << bit}),
            Binding(name, name, _pattern(bit, "1")),
            Binding(name, below, _pattern(bit, "0"), to="exchange"),
        )
        below = name
    return tuple(declarations)


def queue_names(declarations: Iterable[Declaration]) -> list[str]:
    """Return the physical queues among `declarations`."""
    return [record.name for record in declarations if isinstance(record, PhysicalQueue)]
