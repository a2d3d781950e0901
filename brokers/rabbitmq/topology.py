"""Exchanges, queues and bindings on RabbitMQ, with names and arguments. Pure data; `session.declare` declares them.

    publish ─► lv.jobs ─<queue>.<level>─► <queue>, <queue>.low, .high, .urgent ─rejected, over the limit─► lv.dead ─► <queue>.dead
    delayed ─► lv.delay.digit.<place> ─► lv.delay.<time> ─ … ─► lv.delay.due ─q/<queue>/<level>─► the same queues
                                                                     └─ nobody takes it ─► lv.delay.alt ─► lv.lost

A quorum queue is a set of siblings, one per level; a classic queue is a single queue that the broker orders by priority.
Arguments are the same for every version of RabbitMQ, since a queue can't be declared again with other arguments.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from leveret.job import LEVELS, Priority, Queue
from leveret.outcome import MAX_DELAY_S

JOBS = "lv.jobs"
JOBS_ALTERNATE = "lv.jobs.alt"
DEAD = "lv.dead"
_DELAY = "lv.delay."
DUE = "lv.delay.due"
DUE_ALTERNATE = "lv.delay.alt"
LOST = "lv.lost"
PROBE = "lv.probe"

UNIT_MS = 250
PLACES = 8
"""Octal digits of a delay in units: up to 48.5 days, more than `MAX_DELAY_S`. Base 2 needs the fewest queues and base 16 the
fewest hops. But a topic exchange looks at each word of the key: a key of 24 bits took RabbitMQ twice the time of a key of
8 digits (docs/design.md)."""
_SIGNIFICANT_BITS = 7

PRIORITY_PROPERTY = {Priority.LOW: 3, Priority.NORMAL: 4, Priority.HIGH: 5, Priority.URGENT: 6}
"""AMQP's `priority` per level, on classic queues. Brokers treat a message without a priority as 4."""


class Exchange(msgspec.Struct, frozen=True):
    """A durable exchange to declare."""

    name: str
    kind: Literal["direct", "topic", "fanout"]
    alternate: str | None = None
    """The exchange that gets the messages that this one can't route."""

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of the AMQP declaration."""
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


class Ladder(NamedTuple):
    """The lowest places of the delay ladder that is named by a level: a job needs no place above its highest digit."""

    level: Priority
    places: int

    def lower(self) -> list[Ladder]:
        """Return this ladder and each shorter one, which it contains."""
        return [Ladder(self.level, places) for places in range(1, self.places + 1)]


Declaration: TypeAlias = Exchange | PhysicalQueue | Binding


def physical(queue: Queue, level: Priority) -> str:
    """Return the physical queue that holds the jobs of `queue` at `level`."""
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
    """Return the level that sibling `sibling_name` of queue `name` holds; None if it isn't a sibling."""
    return next((level for level in LEVELS if sibling(name, level) == sibling_name), None)


def dead_queue(name: str) -> str:
    """Return the dead-letter queue of queue `name`: one for all its levels."""
    return f"{name}.dead"


def suspects_queue(name: str) -> str:
    """Return the queue of the jobs of queue `name` that crashed workers, at any level."""
    return f"{name}.suspects"


def consumed(queue: Queue) -> dict[str, tuple[Priority, ...]]:
    """Return each physical queue that a worker of `queue` consumes, with the levels that it holds; none for the suspects."""
    return {**physicals(queue), suspects_queue(queue.name): ()}


def job_key(name: str, level: Priority) -> str:
    """Return the routing key on `lv.jobs`."""
    return f"{name}.{level.value}"


def destination(name: str, level: Priority) -> str:
    """Return the destination of a delayed job, as one word of a topic key. At most 159 bytes of the 239 that the digits leave.

    The destination is a logical name, not a physical one, so that waiting jobs follow when a queue is replaced.
    """
    return f"q/{name.replace('.', '/')}/{level.value}"


def ladder_of(queue: Queue, level: Priority) -> Priority:
    """Return the level that names the ladder in which jobs of `queue` at `level` wait; most wait in that of NORMAL.

    A quorum queue of RabbitMQ 4.x orders by AMQP's `priority`, which only jobs of classic queues have. In one ladder, an urgent job
    would hold up the others of its delay queue. A job without the property counts as NORMAL.
    """
    return level if queue.type == "classic" and queue.priorities else Priority.NORMAL


def _delay(ladder: Priority, rest: str) -> str:
    return f"{_DELAY}{rest}" if ladder is Priority.NORMAL else f"{_DELAY}{ladder.value}.{rest}"


def digit(ladder: Priority, place: int) -> str:
    """Return the exchange that routes by the digit at `place`."""
    return _delay(ladder, f"digit.{place}")


def waiting(ladder: Priority, ttl_ms: int) -> str:
    """Return the queue in which jobs wait for `ttl_ms`: `lv.delay.250ms`, `lv.delay.16s`."""
    return _delay(ladder, f"{ttl_ms}ms" if ttl_ms % 1000 else f"{ttl_ms // 1000}s")


def delay_units(delay_s: float) -> int:
    """Return `delay_s` in units of 0.25 s, rounded up to seven significant bits: at most three hops, at most 1.6 % late.

    ValueError from a second above 48 days on: a delay of 48 days may be longer here, by a rounded millisecond or a clock that was set back.
    """
    if not 0 < delay_s < MAX_DELAY_S + 1:
        msg = f"a delay must be above 0 s and at most 48 days ({MAX_DELAY_S:.0f} s), not {delay_s} s"
        raise ValueError(msg)
    units = max(1, math.ceil(delay_s * 1000 / UNIT_MS))
    shift = max(0, units.bit_length() - _SIGNIFICANT_BITS)
    return -(-units >> shift) << shift


def route(queue: Queue, level: Priority, delay_s: float) -> tuple[str, str, Ladder | None]:
    """Return the exchange and routing key for a job of `queue`, now (`delay_s` <= 0) or later, and the ladder on its way."""
    if delay_s <= 0:
        return JOBS, job_key(queue.name, level), None
    digits = format(delay_units(delay_s), f"0{PLACES}o")
    ladder = Ladder(ladder_of(queue, level), len(digits.lstrip("0")))
    return digit(ladder.level, ladder.places - 1), f"{'.'.join(digits)}.{destination(queue.name, level)}", ladder


_QUORUM: dict[str, object] = {
    "x-queue-type": "quorum",
    # Explicit, since the defaults differ: no limit on 3.10; 4.x drops a job after 20 returns. On 3.10, -1 means one delivery.
    "x-delivery-limit": 1_000_000,
}
_AT_LEAST_ONCE: dict[str, object] = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
_CLASSIC: dict[str, object] = {"x-queue-type": "classic"}


def job_queue_arguments(queue: Queue) -> dict[str, object]:
    """Return the arguments of `queue`'s physical queues."""
    dead = _dead_arguments(queue)
    if queue.type == "quorum":
        return _QUORUM | _AT_LEAST_ONCE | dead
    return _CLASSIC | dead | ({"x-max-priority": PRIORITY_PROPERTY[Priority.URGENT]} if queue.priorities else {})


def _dead_arguments(queue: Queue) -> dict[str, object]:
    return {"x-dead-letter-exchange": DEAD, "x-dead-letter-routing-key": queue.name}


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
"""The declarations that all queues share."""

_ANY_DELAY = ("*." * PLACES, "*." * 24)
"""The keys of jobs that fall due. Keys of 24 words are from 0.1.0, which delayed by up to 48 days in a ladder of bits."""


OF_PROBE: tuple[Declaration, ...] = (PhysicalQueue(PROBE, _QUORUM),)
"""A quorum queue to which nobody publishes: only a node that reaches its cluster can say that it is empty (`probe`)."""


def of_queue(queue: Queue) -> tuple[Declaration, ...]:
    """Return the declarations of `queue` besides `SHARED`, its dead-letter queue first."""
    dead = dead_queue(queue.name)
    suspects = suspects_queue(queue.name)
    declarations: list[Declaration] = [
        PhysicalQueue(dead, _QUORUM),
        Binding(DEAD, dead, queue.name),
        PhysicalQueue(suspects, _QUORUM | _AT_LEAST_ONCE | _dead_arguments(queue)),
        Binding(JOBS, suspects, suspects),
    ]
    arguments = job_queue_arguments(queue)
    for name, levels in physicals(queue).items():
        declarations.append(PhysicalQueue(name, arguments))
        for level in levels:
            declarations += (Binding(DUE, name, delay + destination(queue.name, level)) for delay in _ANY_DELAY)
            # last: once this key routes, everything else is declared
            declarations.append(Binding(JOBS, name, job_key(queue.name, level)))
    return tuple(declarations)


def way(ladder: Ladder) -> tuple[str, ...]:
    """Return the exchanges that a delayed job may pass in `ladder`."""
    return (DUE, *(digit(ladder.level, place) for place in range(ladder.places)))


def delay_queues() -> tuple[tuple[str, ...], ...]:
    """Return the names of the delay queues of each ladder, in the order in which they are declared.

    The last is the former ladder of classic queues, which is only counted.
    """
    ladders = {
        level: tuple(record.name for record in of_ladder(Ladder(level, PLACES)) if isinstance(record, PhysicalQueue))
        for level in LEVELS
    }
    former = tuple(name.replace(_DELAY, f"{_DELAY}classic.") for name in ladders[Priority.NORMAL])
    return (*ladders.values(), former)


def _pattern(place: int, value: int) -> str:
    words = ["*"] * (PLACES + 1)
    words[PLACES - 1 - place] = str(value)
    return ".".join(words)


def of_ladder(ladder: Ladder) -> tuple[Declaration, ...]:
    """Return the declarations of a delay ladder: a job waits once per digit of its key that isn't 0.

    A single TTL queue isn't enough: a message of 1 s behind one of 10 s would take 10 s. Bindings have exactly PLACES + 1 words.
    The delay queues are quorum queues for classic queues too: a classic queue dead-letters at most once, and a crash loses jobs.
    """
    declarations: list[Declaration] = []
    below = DUE
    for place in range(ladder.places):
        exchange = digit(ladder.level, place)
        declarations += (Exchange(exchange, "topic"), Binding(exchange, below, _pattern(place, 0), to="exchange"))
        for value in range(1, 8):
            ttl_ms = value * 8**place * UNIT_MS
            name = waiting(ladder.level, ttl_ms)
            declarations += (
                PhysicalQueue(
                    name, _QUORUM | _AT_LEAST_ONCE | {"x-dead-letter-exchange": below, "x-message-ttl": ttl_ms}
                ),
                Binding(exchange, name, _pattern(place, value)),
            )
        below = exchange
    return tuple(declarations)
