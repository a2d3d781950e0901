"""How a worker logs an ending, once it is true: settled, or published and confirmed."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from ..attempt import Attempt
from ..attemptlog import duration, log_attempt, when
from ..broker import Delivery
from ..envelope import ALONE_FROM, Envelope
from ..outcome import (
    Aborted,
    Bury,
    Done,
    Ending,
    Expired,
    ExpiredOnArrival,
    Retry,
    Snooze,
    Suspect,
    Undecodable,
    WorkerLost,
)
from ..texts import named, one_line
from ..tracebacks import exc_info
from .remembered import Past

logger = logging.getLogger("leveret.consumer")  # for readers of logs, the consumer settles


class Run(msgspec.Struct):
    """A delivery that ended, for its settlement and its log record."""

    delivery: Delivery
    attempt: Attempt[Any] | None
    """None if the delivery didn't run."""
    envelope: Envelope
    """The delivery's envelope, with the time of its first delivery."""
    error: BaseException | None
    """The error that led to the ending."""
    took_s: float
    past: Past | None = None
    """For a redelivery that doesn't run: how the earlier run ended."""


def say(run: Run, ending: Ending) -> None:
    """Log an ending that is true now: settled, or published and confirmed. The middleware `Logs` logs the runs that ended well."""
    attempt, dead, took = run.attempt, f"{run.delivery.queue.name}.dead", f"after {duration(run.took_s)}"
    match ending:
        case Undecodable(reason) | Bury(reason) if attempt is None:
            logger.error("%s is buried in %s: %s", what(run.envelope), dead, one_line(reason))
        case WorkerLost():
            logger.error("%s is buried in %s: %s", what(run.envelope), dead, ending.reason)
        case Suspect():
            crashes = run.envelope.crashes + 1
            level = logging.WARNING if crashes >= ALONE_FROM else logging.DEBUG  # neighbours of a crash come back once
            logger.log(level, "%s came back; workers that may have died of it: %d", what(run.envelope), crashes)
        case Retry(delay_s):
            ended = "ended" if run.error is None else "failed"
            said = f"{ended} {took}, retried {when(delay_s)}"
            log(run, logging.WARNING, "retry", said, run.error, delay_s=delay_s)
        case Bury(reason):
            error = run.error or ending.__cause__  # the second is the error of a retry that can't be published
            log(run, logging.ERROR, "buried", f"buried in {dead} {took}", error, reason=one_line(reason))
        case Expired(keep):
            becomes = f"buried in {dead}" if keep else "dropped"
            log(run, logging.WARNING, "expired", f"{why_expired(run, ending)}; the job is {becomes}")
        case Aborted() if attempt is None:
            logger.info("%s is aborted, so it doesn't run", what(run.envelope))
        case Aborted():
            log(run, logging.INFO, "aborted", f"aborted {took}")
        case _:
            pass


def say_postponed(run: Run, ending: Ending) -> None:
    """Log a job that ended, and that can't be buried yet."""
    dead = f"{run.delivery.queue.name}.dead"
    waits = f"{dead} takes no letter now, so the job waits in the broker to be buried"
    error = run.error or (ending.__cause__ if isinstance(ending, BaseException) else None)
    reason = one_line(_why(run, ending))
    if run.attempt is None:
        logger.error("%s: %s: %s", what(run.envelope), waits, reason)
    else:
        log(run, logging.ERROR, "bury", f"ended after {duration(run.took_s)}; {waits}", error, reason=reason)


def _why(run: Run, ending: Ending) -> str:
    match ending:
        case Undecodable(reason) | Bury(reason):
            return reason
        case Expired():
            return why_expired(run, ending)
        case _:
            return ending.kind.value


def say_cut_off(run: Run, ending: Ending) -> None:
    """Log a run that was cut off, unless it ended well nevertheless: the middleware `Logs` logs those."""
    if not isinstance(ending, (Done, Snooze)):
        took = duration(run.took_s)
        log(run, logging.WARNING, "cut off", f"cut off after {took}, so the broker delivers the job again", run.error)


def log(run: Run, level: int, outcome: str, said: str, error: BaseException | None = None, **fields: object) -> None:
    """Log the ending of a run, with its error and the traceback; nothing for a delivery that didn't run."""
    if run.attempt is None:
        return
    if error is not None:
        fields["error"] = named(error)
    why = fields.get("reason") or fields.get("error")
    said = f"{said}: {why}" if why else said
    log_attempt(level, run.attempt, outcome, run.took_s, said, None if error is None else exc_info(error), **fields)


def why_expired(run: Run, ending: Expired) -> str:
    """Return why a job expired. Before its first delivery, its age is by the publisher's clock, the delivery by this one."""
    if not isinstance(ending, ExpiredOnArrival):
        return "expired before it ran"
    envelope = run.envelope
    arrived_ms, expires_at_ms = envelope.first_seen_ms or 0, envelope.expires_at_ms or 0
    age = (
        f"was {arrived_ms / 1000 - envelope.created_s:.0f} s old by its time stamp"
        if envelope.created_s
        else "had no time stamp"
    )
    return (
        f"had expired {(arrived_ms - expires_at_ms) / 1000:.0f} s before it first arrived, when it {age}: either it waited in the queue, "
        "or the clocks of its publisher and of this worker differ"
    )


def what(envelope: Envelope) -> str:
    """Return the name of a job in log lines."""
    return f"{envelope.job or 'a job without a name'} {envelope.job_id} (queue {envelope.queue}, attempt {envelope.attempt})"


def at_debug(error: BaseException | None) -> BaseException | None:
    """Return `exc_info` for a log record: a traceback at debug level, otherwise None for one line."""
    return error if logger.isEnabledFor(logging.DEBUG) else None
