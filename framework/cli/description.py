"""An app's parts as records: handlers with their folded chains, queues, schedules, broker.

The description makes every check that a worker makes before it connects, so a configuration that a worker would refuse is
refused here. It imports the app's modules and has no other effect.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from ..app import App
from ..broker import Features
from ..chain import bind
from ..consuming.handler import Handler, check_limits
from ..consuming.limits import Limits, limits_of
from ..consuming.returns import check_results
from ..cron.schedule import Schedule
from ..errors import ConfigurationError
from ..job import Queue
from ..layer import AnyLayer, RetryWaits, facts_of, is_consume_layer, is_publish_layer, name_of, starts_per_s_of
from ..settings import redact_url

MOST_WAITS = 32
"""At most this many waits are listed per entry; by then any cap is reached."""
SLOTS = 3
"""How many of the next slots are listed per schedule."""


class BrokerRecord(msgspec.Struct, frozen=True):
    """What the broker promises for every queue; see `Features`."""

    durable: bool
    shared: bool
    counts_redelivery: bool
    durability: str = ""


class LayerRecord(msgspec.Struct, frozen=True):
    """One middleware of a chain, and which sides it wraps."""

    name: str
    consume: bool
    publish: bool


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """How a failure is retried."""

    on: str | None
    """The failures that this entry is for; None: those that no other entry matches."""
    max_attempts: int | None
    """Runs in total; then the job is buried. None: `stop` decides."""
    immediate: int
    """Further tries in place, within one attempt."""
    ceilings_s: list[float]
    """The longest wait after each attempt, seconds; at most the first `MOST_WAITS`. Empty: `wait` computes the waits."""
    wait: str | None
    stop: str | None


class KeepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the job store keeps of a job; see `Keep`."""

    result_s: float
    failed_s: float
    required: bool
    max_bytes: int
    body: bool


class HandlerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A handler with its middleware and limits."""

    handler: str
    """module.function"""
    job: str
    version: int
    job_class: str
    """module:Class"""
    queue: str
    runs: str
    """"on the loop" (async def) or "in a thread" (def)."""
    concurrency: int
    """Jobs at once per process, without options of `leveret work`."""
    concurrency_from: str
    """The place that sets the concurrency: "default", "code" or "LEVERET_CONCURRENCY"."""
    timeout_s: float | None
    starts_per_s: float | None
    """The lowest rate limit of the handler's middleware, for one `leveret work`."""
    expires_s: float | None
    expired: str
    """What becomes of an expired job: "drop" or "dead"."""
    layers: list[LayerRecord]
    """Outermost first."""
    remember: bool
    """Whether a redelivery is settled by an earlier run in the same process."""
    keep: KeepRecord | None
    """None: the job has no record, and no result."""
    retries: list[Waits]
    """The first entry that matches applies; empty: any failure buries the job at once."""


class QueueRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A queue for which the app has handlers."""

    name: str
    type: str
    type_ignored: bool
    """Whether this broker ignores the queue type."""
    levels: list[str]
    """Most urgent first."""
    order: str
    """How the queue's levels are served."""
    physical: list[str]
    """The physical queues on this broker; empty if the broker has none."""


class ScheduleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A recurring job."""

    name: str
    expression: str
    tz: str
    enabled: bool
    next: list[str]
    """The next slots, ISO 8601, in the schedule's time zone."""


class AppRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An app's parts."""

    app: str
    broker: str
    """The broker's URL, without its password."""
    features: BrokerRecord
    handlers: list[HandlerRecord]
    queues: list[QueueRecord]
    schedules: list[ScheduleRecord]
    publish_layers: list[str]
    """The middleware around every publish, outermost first."""
    outbox: str | None
    """The outbox's URL, without its password; None if the app has none."""
    store: str | None
    """The job store's URL, without its password; None if the app has none."""


async def describe(app: App[Any], now: datetime) -> AppRecord:
    """Return the parts of `app`, its schedules as seen from `now` (aware), without connecting to the broker.

    Raises ConfigurationError for everything that a worker would refuse.
    """
    app.import_modules()
    handlers = app.handlers()
    if not handlers and not app.schedules:
        msg = f"app {app.name!r} has no handler and no schedule; list their modules in App(modules=[…])"
        raise ConfigurationError(msg)
    names = list(dict.fromkeys(handler.queue.name for handler in handlers))
    limits = limits_of(app.concurrency(), served=names, known=names, app=app.name)
    runtime = app.runtime()
    bind((layer for handler in handlers for layer in handler.layers), runtime)
    bind(app.layers, runtime)
    outbox = app.outbox_url()
    app.open_outbox(runtime)
    store = app.open_store(runtime)
    check_results(handlers, stored=store is not None)
    broker = app.open_broker(runtime)
    try:
        features = broker.features()
        queues = {handler.queue.name: (handler.queue, broker.features(handler.queue)) for handler in handlers}
        for handler in handlers:
            check_limits(handler, broker.features(handler.queue))
    finally:
        await broker.close()
        if store is not None:
            await store.close()
    return AppRecord(
        app=app.name,
        broker=redact_url(app.broker_url() or ""),
        features=BrokerRecord(features.durable, features.shared, features.counts_redelivery, features.durability),
        handlers=[_handler(handler, limits) for handler in handlers],
        queues=[_queue(queue, own) for queue, own in queues.values()],
        schedules=[_schedule(schedule, now) for schedule in app.schedules],
        publish_layers=[name_of(layer) for layer in app.layers if _sides(layer).publish],
        outbox=None if outbox is None else redact_url(outbox),
        store=None if store is None else redact_url(store.what),
    )


def _sides(layer: AnyLayer) -> LayerRecord:
    publish = is_publish_layer(layer)
    return LayerRecord(name_of(layer), is_consume_layer(layer) or not publish, publish)


def _handler(handler: Handler, limits: Limits) -> HandlerRecord:
    spec = handler.spec
    in_threads = not handler.is_async
    where = f"handler {handler.name}"
    facts = [facts_of(layer, where) for layer in handler.layers]
    rates = [starts_per_s_of(layer, where) for layer in handler.layers]
    return HandlerRecord(
        handler=handler.name,
        job=spec.name,
        version=spec.version,
        job_class=f"{handler.job_class.__module__}:{handler.job_class.__qualname__}",
        queue=handler.queue.name,
        runs="on the loop" if handler.is_async else "in a thread",
        concurrency=limits.of(handler.queue.name, in_threads=in_threads),
        concurrency_from=limits.origin_of(handler.queue.name, in_threads=in_threads),
        timeout_s=min((one.limit_s for one in facts if one.limit_s is not None), default=None),
        starts_per_s=min((rate for rate in rates if rate is not None), default=None),
        expires_s=spec.expires_s,
        expired="dead" if spec.keeps_expired else "drop",
        layers=[_sides(layer) for layer in handler.layers],
        remember=handler.remember,
        keep=None if spec.keep is None else KeepRecord(**msgspec.structs.asdict(spec.keep)),
        retries=[_waits(waits) for one in facts for waits in one.retries],
    )


def _waits(waits: RetryWaits) -> Waits:
    count = MOST_WAITS if waits.max_attempts is None else min(waits.max_attempts - 1, MOST_WAITS)
    return Waits(
        on=waits.on,
        max_attempts=waits.max_attempts,
        immediate=waits.immediate,
        ceilings_s=[*waits.ceilings_s, *waits.ceilings_s[-1:] * count][:count],
        wait=waits.wait,
        stop=waits.stop,
    )


def _queue(queue: Queue, features: Features) -> QueueRecord:
    if not queue.priorities:
        order = "one level, first in, first out"
    elif not features.window_per_level:
        order = "strict priority: lower levels can starve"
    else:
        order = "by level, with ageing: no level starves"
    return QueueRecord(
        name=queue.name,
        type=queue.type,
        type_ignored=features.queue_type is None,
        levels=[level.value for level in queue.levels],
        order=order,
        physical=list(features.physical),
    )


def _schedule(schedule: Schedule, now: datetime) -> ScheduleRecord:
    slots: list[str] = []
    slot = schedule.next(now)
    while slot is not None and len(slots) < SLOTS:
        slots.append(slot.astimezone(ZoneInfo(schedule.tz)).isoformat())
        slot = schedule.next(slot)
    return ScheduleRecord(
        name=schedule.name, expression=schedule.expression, tz=schedule.tz, enabled=schedule.enabled, next=slots
    )
