"""`leveret describe`: show an app's parts, as text or as JSON."""

from __future__ import annotations

from datetime import datetime, timezone

import click

from ..process.loading import load_app
from .description import (
    MOST_WAITS,
    AppRecord,
    BrokerRecord,
    HandlerRecord,
    KeepRecord,
    QueueRecord,
    ScheduleRecord,
    Waits,
)
from .description import describe as describe_app
from .output import json_option, lines, print_json, print_text, seconds
from .target import app_options, app_path, run

_RUNS = {"on the loop": "an async def, on the event loop", "in a thread": "a def, in a thread"}


@click.command(short_help="Show an app's handlers, middleware, queues and schedules.")
@app_options
@json_option
def describe(app: str | None, as_json: bool) -> None:
    """Show the parts of APP (module:attribute, default LEVERET_APP).

    The parts are: handlers with their middleware, limits and retry waits; queues with their physical queues on the broker;
    schedules with their next slots.

    The command makes every check that a worker makes before it connects. A wrong annotation, middleware, expression or URL prints
    one line, and the exit code is 2. The command doesn't connect, so it doesn't check whether the broker is up.

    \b
    Example:
      leveret describe shop:app
    """  # noqa: D301
    record = run(describe_app(load_app(app_path(app)), datetime.now(timezone.utc)))
    if as_json:
        print_json(record)
    else:
        print_text(lines(text_of(record)))


def text_of(record: AppRecord) -> str:
    """Return `record` as text for people."""
    parts = [f"app {record.app} on {record.broker} ({_features(record.features)})"]
    if record.publish_layers:
        parts.append(f"  every publish passes: {' → '.join(record.publish_layers)} → broker")
    if record.outbox is not None:
        parts.append(f"  a publish with connection= goes to the outbox {record.outbox} → leveret relay → broker")
    if record.store is not None and any(handler.keep for handler in record.handlers):
        parts.append(f"  states and results are in {record.store}")
    for queue in record.queues:
        parts += ["", *_queue(queue)]
        for handler in record.handlers:
            if handler.queue == queue.name:
                parts += _handler(handler)
    if record.schedules:
        parts += ["", "schedules"]
        for schedule in record.schedules:
            parts += _schedule(schedule)
    return "\n".join(parts)


def _features(features: BrokerRecord) -> str:
    durable = "durable" if features.durable else "not durable: jobs are lost when the process ends"
    return ", ".join(
        (
            features.durability or durable,
            "shared by processes" if features.shared else "one process only",
            "marks redelivered jobs" if features.counts_redelivery else "doesn't mark redelivered jobs",
        )
    )


def _queue(queue: QueueRecord) -> list[str]:
    kind = f"type {queue.type}, ignored by this broker" if queue.type_ignored else queue.type
    text = [f"queue {queue.name} ({kind}; {', '.join(queue.levels)}; {queue.order})"]
    if queue.physical:
        text.append(f"  physical queues: {', '.join(queue.physical)}")
    return text


def _handler(handler: HandlerRecord) -> list[str]:
    version = f" version {handler.version}" if handler.version > 1 else ""
    chain = [layer.name for layer in handler.layers if layer.consume]
    limits = [f"{handler.concurrency} at once per process ({handler.concurrency_from})"]
    if handler.timeout_s is not None:
        limits.append(f"time limit {seconds(handler.timeout_s)}")
    if handler.starts_per_s is not None:
        limits.append(f"{handler.starts_per_s:g} starts per second")
    if handler.expires_s is not None:
        limits.append(f"expires {seconds(handler.expires_s)} after the publish")
    if handler.expired == "dead":
        limits.append("expired jobs become dead letters")
    if not handler.remember:
        limits.append("runs again when redelivered (remember=False)")
    text = [
        f"  job {handler.job}{version} ({handler.job_class}), {_RUNS[handler.runs]}",
        f"    chain    {' → '.join([*chain, handler.handler])}",
        f"    limits   {'; '.join(limits)}",
    ]
    if handler.keep is not None:
        text.append(f"    keep     {_keep(handler.keep)}")
    if not handler.retries:
        text.append("    retries  none: a failure buries the job at once")
    for number, waits in enumerate(handler.retries):
        text.append(f"    {'retries ' if number == 0 else '        '} {_waits(waits, alone=len(handler.retries) == 1)}")
    return text


def _keep(keep: KeepRecord) -> str:
    said = [
        f"a result for {seconds(keep.result_s)}, at most {keep.max_bytes} bytes",
        f"a failure for {seconds(keep.failed_s)}",
    ]
    if keep.body:
        said.append("the body too")
    if keep.required:
        said.append("acknowledged only once the store has the result")
    return "; ".join(said)


def _waits(waits: Waits, *, alone: bool) -> str:
    what = "" if alone else f"{waits.on or 'any other failure'}: "
    tries = "try" if waits.immediate == 1 else "tries"
    first = f"{waits.immediate} more {tries} in place, then " if waits.immediate else ""
    if waits.max_attempts == 1:
        return f"{what}{first}buried at once"
    end = "by " + waits.stop if waits.stop else f"after {waits.max_attempts} runs"
    if waits.wait:
        return f"{what}{first}waits by {waits.wait}, then buried ({end})"
    ceilings = waits.ceilings_s
    shown: list[str] = []
    for number, ceiling in enumerate(ceilings):
        if ceiling == ceilings[-1] and len(ceilings) - number > 2:
            shown.append(f"≤{seconds(ceiling)} each time")
            break
        shown.append(f"≤{seconds(ceiling)}")
    else:
        if waits.max_attempts is None or waits.max_attempts - 1 > MOST_WAITS:
            shown.append("…")
    return f"{what}{first}waits of {', '.join(shown)}, then buried ({end})"


def _schedule(schedule: ScheduleRecord) -> list[str]:
    state = "" if schedule.enabled else " (off)"
    slots = ", ".join(schedule.next) or "none: the schedule has no further slot"
    return [f"  {schedule.name}{state}: {schedule.expression} in {schedule.tz}", f"    next     {slots}"]
