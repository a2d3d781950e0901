"""`leveret dead`: list, show, replay or drop dead letters."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import click
import msgspec

from ..admin import DeadLetter, DeadLetters
from ..envelope import Envelope
from ..errors import BrokerUnavailable, ConfigurationError, LeveretError
from ..failure import Failure, failures_of
from ..headers import MOST
from ..settings import redact, redact_url
from .letter import LetterRecord, Summary, show_letter, summary_of
from .output import ask, at_least_1, counted, json_option, moment, print_json, print_table, print_text, progress
from .short_ids import is_too_short, may_be_short, short_forms, whole_id
from .target import Target, run, target_options
from .together import Together

_T = TypeVar("_T")
_REPLAY_S = 10.0
_MOST = 500
"""At most this many letters are replayed or dropped at once."""
_MOST_BYTES = 32 << 20
"""The limit for their bodies, in bytes."""
_SHOWN = 100


class Wanted(msgspec.Struct, frozen=True):
    """Which dead letters a command is for."""

    job: str | None = None
    error: str | None = None
    ids: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def narrow(self) -> bool:
        """Whether some letters may be left out."""
        return bool(self.job is not None or self.error is not None or self.ids)

    def __contains__(self, letter: DeadLetter) -> bool:
        """Whether the command is for this letter."""
        if self.ids and letter.job_id not in self.ids:
            return False
        if self.job is not None and letter.envelope.job != self.job:
            return False
        return self.error is None or _has_error(failures_of(letter.envelope)[-1:], self.error)


def _has_error(failures: list[Failure], text: str) -> bool:
    """Whether the last failure is of the class `text`, or has `text` in its message."""
    return any(
        text in (failure.error, failure.error.rpartition(".")[2]) or text.lower() in failure.message.lower()
        for failure in failures
    )


def wanted_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the filter options; the command receives them as `wanted`."""

    @click.option("--job", metavar="NAME", help="Only jobs with this name, such as invoice.send.")
    @click.option(
        "--error",
        metavar="CLASS-OR-TEXT",
        help="Only jobs whose last error has this class, or this text in its message.",
    )
    @click.option(
        "--id", "ids", metavar="ID", multiple=True, help="Only this job; the beginning of a UUID is enough. Repeatable."
    )
    @click.option("--limit", metavar="N", type=at_least_1, help="At most N dead letters, oldest first.")
    @functools.wraps(command)
    def with_wanted(
        *args: Any, job: str | None, error: str | None, ids: tuple[str, ...], limit: int | None, **options: Any
    ) -> _T:
        return command(*args, wanted=Wanted(job, error, ids, limit), **options)

    return with_wanted


def dead_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the options of its target, and --outbox, which is in `target`."""

    @target_options
    @click.option("--outbox", is_flag=True, help="The dead letters of the app's outbox, instead of the broker's.")
    @functools.wraps(command)
    def with_dead(*args: Any, target: Target, outbox: bool, **options: Any) -> _T:
        return command(*args, target=msgspec.structs.replace(target, dead_of_outbox=outbox), **options)

    return with_dead


class _Reading:
    """Iterates over the wanted dead letters of a queue and shows progress."""

    def __init__(self, letters: DeadLetters, wanted: Wanted, step: Callable[[], None]) -> None:
        self.letters = letters
        self.ids = set[str]()
        """The ids of all letters that were read, wanted or not."""
        self._wanted = wanted
        self._step = step

    async def __aiter__(self) -> AsyncGenerator[DeadLetter, None]:
        count = 0
        async for letter in self.letters:
            self._step()
            self.ids.add(letter.job_id)
            if letter in self._wanted:
                yield letter
                count += 1
                if count == self._wanted.limit:
                    return


@asynccontextmanager
async def _reading(target: Target, name: str, wanted: Wanted, what: str) -> AsyncGenerator[_Reading, None]:
    if target.dead_of_outbox:
        async with target.outbox_admin() as outbox, outbox.dead(target.queue(name)) as letters:
            with progress(what, sum(row.dead for row in await outbox.depths() if row.queue == name)) as step:
                yield _Reading(letters, wanted, step)
        return
    async with target.admin() as admin:
        depth = await target.depth_of(admin, name)
        async with admin.dead(target.queue(name)) as letters:
            with progress(what, depth.dead) as step:
                yield _Reading(letters, wanted, step)


def _with_whole_ids(target: Target, queue: str, wanted: Wanted) -> Wanted:
    """Return `wanted` with whole ids in place of beginnings, for which the command reads the ids of all dead letters first."""

    async def read() -> set[str]:
        async with _reading(target, queue, Wanted(), "looking up") as reading:
            return {letter.job_id async for letter in reading}

    if not any(map(may_be_short, wanted.ids)):
        return wanted
    known = run(read())
    return msgspec.structs.replace(wanted, ids=tuple(whole_id(text, known) for text in wanted.ids))


@click.group(short_help="List, show, replay or drop dead letters.")
def dead() -> None:
    """List, show, replay or drop dead letters.

    A job becomes a dead letter of its queue when its last attempt fails, when its handler buries it, or when it can't be decoded.
    The job stays, byte for byte, until it is replayed or dropped. With --outbox the commands are for the jobs of the app's outbox
    that its broker will never take; a replay puts them back into the outbox.

    \b
    Example:
      leveret dead list shop:app emails
    """  # noqa: D301


@dead.command("list", short_help="List the dead letters of a queue, oldest first.")
@dead_options
@click.argument("queue")
@wanted_options
@json_option
def list_letters(queue: str, wanted: Wanted, target: Target, as_json: bool) -> None:
    """List the dead letters of QUEUE, oldest first (default: at most 100). The command changes nothing.

    \b
    Columns:
      id         on a terminal, as much of a UUID as `show`
                 needs to find the letter; whole in a pipe
      job        the job's name
      level      its priority
      runs       the number of its last attempt
      buried at  UTC; empty if the broker itself buried it
      reason     the last error, or the reason for the burial;
                 shortened on a terminal

    \b
    Example:
      leveret dead list shop:app emails --error TimeoutError
    """  # noqa: D301
    limit = wanted.limit or _SHOWN
    # one more than is shown, to know whether there are more
    asked = msgspec.structs.replace(_with_whole_ids(target, queue, wanted), limit=limit + 1)

    async def read() -> tuple[list[Summary], set[str]]:
        async with _reading(target, queue, asked, "reading") as reading:
            return [summary_of(letter.envelope) async for letter in reading], reading.ids

    found, ids = run(read())
    if as_json:
        print_json(found[:limit])
        return
    if not found:
        print_text(f"no dead letters in {queue}{' that match the options' if wanted.narrow else ''}")
        return
    # a pipe gets whole ids, as it gets whole lines
    shown = short_forms(ids) if sys.stdout.isatty() else {one: one for one in ids}
    print_table(
        ["id", "job", "level", ">runs", "buried at", "reason"],
        [
            [shown[one.id], one.job, one.priority, one.attempt, moment(one.buried_at_ms), one.reason]
            for one in found[:limit]
        ],
    )
    if len(found) > limit:
        print_text(f"… and more; use --limit N to show more than {limit}", err=True)


@dead.command(short_help="Show one dead letter in full.")
@dead_options
@click.argument("queue")
@click.argument("job_id", metavar="ID")
@json_option
def show(queue: str, job_id: str, target: Target, as_json: bool) -> None:
    """Show one dead letter of QUEUE in full: headers, every failed run with its traceback, body.

    If ID is a UUID, its beginning is enough: 8 characters or more, with which the id of no other dead letter of QUEUE begins.

    \b
    Example:
      leveret dead show shop:app emails 0198e2a4-5b6c
    """  # noqa: D301
    wanted = _with_whole_ids(target, queue, Wanted(ids=(job_id,)))

    async def read() -> list[LetterRecord]:
        async with _reading(target, queue, wanted, "reading") as reading:
            return [LetterRecord.of(letter.envelope) async for letter in reading]

    found = run(read())
    if not found:
        raise ConfigurationError(_nothing(queue, job_id))
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
    else:
        print_text("\n\n".join(map(show_letter, found)))


def _nothing(queue: str, job_id: str) -> str:
    short = ", which is too short for the beginning of an id: give 8 characters or more" if is_too_short(job_id) else ""
    return f"queue {queue!r} has no dead letter with id {job_id!r}{short}; `leveret dead list {queue}` lists its dead letters"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a command did with the dead letters that it was for."""

    queue: str
    done: int
    """How many were replayed or dropped; with `dry_run`, how many would be."""
    failed: list[dict[str, str]]
    """Id and error of each letter that stays."""
    dry_run: bool


def replayed(envelope: Envelope) -> Envelope:
    """Return the envelope of a replay: same id, body, headers, level and errors; attempt 1, one pass more.

    The delay and the expiry are dropped, so the job runs now.
    """
    return msgspec.structs.replace(
        envelope,
        attempt=1,
        crashes=0,
        passes=min(envelope.passes + 1, MOST),
        origin=None,
        due_ms=None,
        expires_at_ms=None,
        unknown_since_ms=None,
        strangers="",
        bury_since_ms=None,
        cause=None,
        deadline=time.monotonic() + _REPLAY_S,
    )


@dead.command(short_help="Put dead letters back into their queue.")
@dead_options
@click.argument("queue")
@wanted_options
@click.option("--dry-run", is_flag=True, help="Only count the dead letters; change nothing.")
@json_option
def replay(queue: str, wanted: Wanted, dry_run: bool, target: Target, as_json: bool) -> int:
    """Put dead letters of QUEUE back into their original queue, at their level: all, or those that match the options.

    Each job keeps its id, its headers and its errors, and starts again at attempt 1. The job runs now, even if it was delayed or
    would have expired. The dead letter is removed when the broker has confirmed the job, so no job is lost; a crash in between
    leaves the job in both places. If a job can't be replayed, its dead letter stays, the command goes on with the rest, and the
    exit code is 1.

    \b
    Example:
      leveret dead replay shop:app emails --error OSError
    """  # noqa: D301

    async def act(letters: DeadLetters, letter: DeadLetter) -> None:
        await letters.replay(letter, replayed(letter.envelope))

    wanted = _with_whole_ids(target, queue, wanted)
    result = run(_each(target, queue, wanted, None if dry_run else act, "replaying"))
    return _tell(result, "replayed", as_json=as_json)


@dead.command(short_help="Delete dead letters for good.")
@dead_options
@click.argument("queue")
@wanted_options
@click.option("--dry-run", is_flag=True, help="Only count the dead letters; change nothing.")
@click.option("--yes", is_flag=True, help="Don't ask for confirmation.")
@json_option
def drop(queue: str, wanted: Wanted, dry_run: bool, yes: bool, target: Target, as_json: bool) -> int:
    """Delete dead letters of QUEUE for good: all, or those that match the options.

    \b
    Example:
      leveret dead drop shop:app emails --job invoice.send
    """  # noqa: D301

    async def act(letters: DeadLetters, letter: DeadLetter) -> None:
        await letters.drop(letter)

    wanted = _with_whole_ids(target, queue, wanted)
    if not dry_run and not yes:
        picked = run(_each(target, queue, wanted, None, "counting"))
        if not picked.done:
            return _tell(msgspec.structs.replace(picked, dry_run=False), "dropped", as_json=as_json)
        where = (target.outbox or "") if target.dead_of_outbox else target.url
        ask(f"Delete {counted(picked.done, 'dead letter')} of queue {queue} on {redact_url(where)} for good?", yes=yes)
        # only the letters that were counted, not letters buried while the question was open
        wanted = msgspec.structs.replace(wanted, limit=picked.done)
    result = run(_each(target, queue, wanted, None if dry_run else act, "dropping"))
    return _tell(result, "dropped", as_json=as_json)


async def _each(
    target: Target, queue: str, wanted: Wanted, act: Callable[[DeadLetters, DeadLetter], Any] | None, what: str
) -> Result:
    """Call `act` with each wanted letter, many at once (None: only count). An error with one letter doesn't stop the rest."""
    done, failed = 0, list[dict[str, str]]()
    async with _reading(target, queue, wanted, what) as reading:

        async def each(letter: DeadLetter) -> None:
            nonlocal done
            try:
                if act is not None:
                    await act(reading.letters, letter)
            except LeveretError as error:
                failed.append({"id": letter.job_id, "error": redact(str(error))})
            else:
                done += 1

        try:
            async with Together(_MOST, _MOST_BYTES) as together:
                async for letter in reading:
                    await together.start(each(letter), 0 if act is None else len(letter.envelope.body))
        except BrokerUnavailable as error:
            msg = f"{error} (after {what} {counted(done, 'dead letter')})"
            raise BrokerUnavailable(msg) from error
    if wanted.ids and not done and not failed:
        raise ConfigurationError(_nothing(queue, ", ".join(wanted.ids)))
    return Result(queue=queue, done=done, failed=failed, dry_run=act is None)


def _tell(result: Result, verb: str, *, as_json: bool) -> int:
    if as_json:
        print_json({"queue": result.queue, verb: result.done, "failed": result.failed, "dry_run": result.dry_run})
    else:
        for one in result.failed:
            print_text(f"leveret: job {one['id']} stays in {result.queue}.dead: {one['error']}", err=True)
        would = "would be " if result.dry_run else ""
        stay = (
            f", {len(result.failed)} failed and {'stays' if len(result.failed) == 1 else 'stay'}"
            if result.failed
            else ""
        )
        print_text(f"{counted(result.done, 'dead letter')} of queue {result.queue} {would}{verb}{stay}")
    return 1 if result.failed else 0
