"""When a recurring job is due: cron expressions in a time zone, as pure functions of an instant.

When the clocks change, an expression whose hour is a number or a list (daily or less often) follows these rules:

- A time that doesn't exist (spring) uses the offset from before the change: 02:30 becomes 03:30 summer time.
- A time that occurs twice (autumn) fires only the first time.

An expression whose hour is `*` or a step (`*/2`), or that has seconds, is an interval. An interval fires in both passes of a
repeated hour, and skips times that don't exist.
"""

from __future__ import annotations

import heapq
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone
from operator import itemgetter
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from ..ids import slot_job_id
from ..job import Job
from ..options import Outgoing

_NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")
_RANGES = {
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "day of month": (1, 31),
    "month": (1, 12),
    "day of week": (0, 7),
}
_WORDS = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "day of week": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
_ITEM = re.compile(r"(?:\*|(\w+)(?:-(\w+))?)(?:/(\d+))?\Z", re.ASCII)
_NTH = re.compile(r"(\w+)#[1-5]\Z|L(\w+)\Z", re.ASCII | re.IGNORECASE)
_NEAREST = re.compile(r"(\d+)W\Z", re.ASCII | re.IGNORECASE)
_INTERVAL = re.compile(r"(\*|\?)(/\d+)?\Z")
MAX_NAME = 80


class Schedule(msgspec.Struct, frozen=True):
    """A recurring job."""

    name: str
    """The name given, or else the function's; part of the ids of the schedule's jobs."""
    expression: str
    tz: str
    emit: Callable[..., Job | Outgoing | None]
    """Returns the job to publish."""
    takes_slot: bool
    enabled: bool
    """A disabled schedule publishes nothing, but stays listed."""

    def next(self, after: datetime) -> datetime | None:
        """Return the first slot after `after`, in UTC; None if there is none."""
        return next_slot(self.expression, self.tz, after)

    def job(self, slot: datetime) -> Job | Outgoing | None:
        """Call the schedule's function for `slot` and return its job. The function gets `slot` in the schedule's time zone."""
        return self.emit(slot.astimezone(ZoneInfo(self.tz))) if self.takes_slot else self.emit()

    def outgoing(self, app: str, slot: datetime) -> Outgoing | None:
        """Return the job of `slot` with its options, the slot's id included unless the function gave one; None for no job."""
        emitted = self.job(slot)
        if emitted is None:
            return None
        outgoing = emitted if isinstance(emitted, Outgoing) else Outgoing(emitted)
        options = outgoing.options.copy()
        if options.get("job_id") is None:
            options["job_id"] = slot_job_id(app, self.name, slot)
        return Outgoing(outgoing.job, **options)


def make_schedule(expression: str, emit: Callable[..., Any], *, name: str | None, tz: str, enabled: bool) -> Schedule:
    """Return a schedule.

    Raises ValueError for a wrong name, expression or time zone, and TypeError for a function of a wrong shape.
    """
    called = name if name is not None else getattr(emit, "__name__", "")
    if not isinstance(called, str) or not 0 < len(called) <= MAX_NAME or not _NAME.match(called):  # pyright: ignore[reportUnnecessaryIsInstance]
        msg = f"a schedule's name must have 1 to {MAX_NAME} characters of [A-Za-z0-9_.-], not {called!r}"
        raise ValueError(msg)
    check_expression(expression)
    try:
        ZoneInfo(tz)
    except Exception:  # noqa: BLE001 - zoneinfo raises KeyError, ValueError, IsADirectoryError …
        msg = f"schedule {called!r}: {tz!r} isn't a known IANA time zone, such as Europe/Berlin (is tzdata installed?)"
        raise ValueError(msg) from None
    if inspect.iscoroutinefunction(emit) or inspect.isgeneratorfunction(emit):
        msg = f"schedule {called!r}: a cron function must be a plain def that returns the job; do the work in the job's handler"
        raise TypeError(msg)
    parameters = [p for p in inspect.signature(emit).parameters.values() if p.default is p.empty]
    if len(parameters) > 1:
        msg = f"schedule {called!r}: a cron function takes no parameter or one, the slot, not ({', '.join(p.name for p in parameters)})"
        raise TypeError(msg)
    return Schedule(called, expression, tz, emit, bool(parameters), enabled)


def slots(schedules: Iterable[Schedule], after: datetime, until: datetime) -> Iterator[tuple[datetime, Schedule]]:
    """Yield the slots after `after` up to and with `until`, in order, each with its schedule."""

    def of(schedule: Schedule) -> Iterator[tuple[datetime, Schedule]]:
        slot = schedule.next(after)
        while slot is not None and slot <= until:
            yield slot, schedule
            slot = schedule.next(slot)

    return heapq.merge(*map(of, schedules), key=itemgetter(0))


def check_expression(expression: str) -> None:
    """Raise ValueError that names the field, unless `expression` has five or six fields of the right shape and range.

    The check works without croniter, which would slow down the start of workers that import an app with schedules.
    """
    fields = expression.split() if isinstance(expression, str) else []  # pyright: ignore[reportUnnecessaryIsInstance]
    names = list(_RANGES)[6 - len(fields) :] if len(fields) in (5, 6) else []
    if not names:
        msg = f"cron expression {expression!r}: expected five fields (minute hour day-of-month month day-of-week), or six with seconds first"
        raise ValueError(msg)
    for name, field in zip(names, fields, strict=True):
        if not _is_field(name, field):
            low, high = _RANGES[name]
            words = {"month": " or JAN to DEC", "day of week": " or MON to SUN"}.get(name, "")
            msg = f"cron expression {expression!r}: {name} must be {low} to {high}{words}, *, a list, a range or a step, not {field!r}"
            raise ValueError(msg)


def _is_field(name: str, field: str) -> bool:
    if name == "day of month" and (nearest := _NEAREST.match(field)):
        return _is_value(name, nearest[1])
    return (field == "?" and name in ("day of month", "day of week")) or all(
        _is_item(name, item) for item in field.split(",")
    )


def _is_item(name: str, item: str) -> bool:
    if name == "day of week" and (nth := _NTH.match(item)):
        return _is_value(name, nth[1] or nth[2])
    if name == "day of month" and item in ("L", "l"):
        return True
    found = _ITEM.match(item)
    return (
        found is not None
        and all(_is_value(name, value) for value in found.group(1, 2) if value)
        and int(found[3] or 1) > 0
    )


def _is_value(name: str, value: str) -> bool:
    low, high = _RANGES[name]
    return low <= int(value) <= high if value.isdecimal() else value.lower() in _WORDS.get(name, ())


def next_slot(expression: str, tz: str, after: datetime) -> datetime | None:
    """Return the first slot of `expression` in time zone `tz` after `after` (aware), in UTC; None if there is none.

    The slot follows from the expression alone, never from the last sleep, so slots don't drift. croniter gets local times without
    a zone, and decides nothing about clock changes: by itself, croniter 7.0.0 fires 02:30 twice in autumn (measured).
    """
    zone = ZoneInfo(tz)
    return (
        _next_of_interval(expression, zone, after)
        if _is_interval(expression)
        else _next_of_times(expression, zone, after)
    )


def _next_of_interval(expression: str, zone: ZoneInfo, after: datetime) -> datetime | None:
    local = after.astimezone(zone)
    for naive in _local_slots(expression, local.replace(tzinfo=None)):
        instant = _utc(naive, zone, fold=local.fold)
        change = _change_between(after, instant, zone)
        if change is not None:
            # the clocks change before this slot: the first slot after the change comes first
            begins = change.astimezone(zone)
            first = next(_local_slots(expression, begins.replace(tzinfo=None) - timedelta(microseconds=1)), None)
            return None if first is None else _utc(first, zone, fold=begins.fold)
        if instant > after:
            return instant
    return None


def _next_of_times(expression: str, zone: ZoneInfo, after: datetime) -> datetime | None:
    # the times of a skipped hour are due after the change: start from the time that the clock would show without the change
    yesterday = (after - timedelta(days=1)).astimezone(zone).utcoffset()
    start = min(
        after.astimezone(zone).replace(tzinfo=None),
        (after.astimezone(timezone.utc) + (yesterday or timedelta())).replace(tzinfo=None),
    )
    best: datetime | None = None
    for naive in _local_slots(expression, start):
        if best is not None and naive > best.astimezone(zone).replace(tzinfo=None):
            return best
        instant = _utc(naive, zone, fold=0)
        if instant > after and (best is None or instant < best):
            best = instant
    return best


def _is_interval(expression: str) -> bool:
    fields = expression.split()
    return len(fields) == 6 or bool(_INTERVAL.match(fields[-4]))


def _local_slots(expression: str, start: datetime) -> Any:
    from croniter import CroniterBadDateError, croniter

    try:
        slots = croniter(expression, start, second_at_beginning=True)
        while True:
            yield slots.get_next(datetime)
    except CroniterBadDateError:
        return


def _utc(naive: datetime, zone: ZoneInfo, *, fold: int) -> datetime:
    return naive.replace(tzinfo=zone, fold=fold).astimezone(timezone.utc)


def _change_between(after: datetime, until: datetime, zone: ZoneInfo) -> datetime | None:
    """Return the first second after `after`, at most `until`, at which the offset differs from that of `after`; None if none does."""
    low, high = int(after.timestamp()), int(until.timestamp())
    offset = datetime.fromtimestamp(low, zone).utcoffset()
    if datetime.fromtimestamp(high, zone).utcoffset() == offset:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if datetime.fromtimestamp(middle, zone).utcoffset() == offset:
            low = middle
        else:
            high = middle
    return datetime.fromtimestamp(high, timezone.utc)
