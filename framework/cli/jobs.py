"""`leveret jobs`: look at the job store, abort jobs, and drop records."""

from __future__ import annotations

import base64
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
import msgspec

from ..envelope import JSON, MSGPACK
from ..errors import ConfigurationError
from ..process.logs import one_line
from ..settings import redact, redact_url
from ..store import STAGES, Abort, Record, State, Store
from ..texts import why_failed
from .letter import body_lines, decoded
from .output import ask, at_least_1, counted, json_option, moment, print_json, print_table, print_text
from .short_ids import is_too_short, may_be_short, short_forms, whole_id
from .target import StoreTarget, run, store_options

_T = TypeVar("_T")
_SHOWN = 50
_NEIGHBOURS = 1000
"""A short id is one that none of the last so many jobs shares: ids that were made at about the same time begin alike."""
_DROPPED = 1000


class JobLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `jobs list`: what is known of one publish."""

    id: str
    publish: int
    """Tells this publish from others of the same id."""
    job: str
    queue: str
    state: State
    attempt: int
    passes: int
    created_at_ms: int
    started_at_ms: int | None
    since_ms: int
    """When the state began, Unix ms."""
    keep_until_ms: int
    progress: float | None
    note: str
    aborting: bool
    error: str
    reason: str


class JobRecord(JobLine, frozen=True, kw_only=True):
    """A record in full."""

    result: object
    """The decoded result, if it is JSON or MessagePack; otherwise null, and `result_base64` holds the bytes, if there are any."""
    result_base64: str | None
    body: object
    body_base64: str | None


def _line(record: Record) -> dict[str, Any]:
    return {
        "id": record.job_id,
        "publish": record.publish,
        "job": record.job,
        "queue": record.queue,
        "state": record.state,
        "attempt": record.attempt,
        "passes": record.passes,
        "created_at_ms": record.created_ms,
        "started_at_ms": record.started_ms,
        "since_ms": record.at_ms,
        "keep_until_ms": record.keep_until_ms,
        "progress": record.progress,
        "note": redact(record.note),
        "aborting": record.asked,
        "error": redact(record.error),
        "reason": redact(record.reason),
    }


def _in_full(record: Record) -> JobRecord:
    result, result_base64 = _readable(record.result, record.content_type)
    # the record doesn't say how its publisher encoded the body; nothing is both
    body, body_base64 = _readable(record.body, JSON)
    if body_base64 is not None:
        body, body_base64 = _readable(record.body, MSGPACK)
    return JobRecord(**_line(record), result=result, result_base64=result_base64, body=body, body_base64=body_base64)


def _readable(content: bytes | None, content_type: str) -> tuple[object, str | None]:
    """Return a value that JSON can hold, or its bytes in base64."""
    if content is None:
        return None, None
    value, readable = decoded(content, content_type)
    return (value, None) if readable else (None, base64.b64encode(content).decode())


class Which(msgspec.Struct, frozen=True):
    """Which records a command is for."""

    state: State | None
    queue: str | None
    job: str | None

    @property
    def narrow(self) -> bool:
        """Whether some may be left out."""
        return (self.state, self.queue, self.job) != (None, None, None)

    async def read(self, store: Store, limit: int) -> Sequence[Record]:
        """Return the last `limit` of them."""
        return await store.list(state=self.state, queue=self.queue, job=self.job, limit=limit)


def which_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the filter options; the command receives them as `which`."""

    @click.option(
        "--state",
        metavar="STATE",
        type=click.Choice(list(STAGES)),
        help=f"Only jobs in this state: {', '.join(STAGES)}.",
    )
    @click.option("--queue", metavar="NAME", help="Only jobs of this queue.")
    @click.option("--job", metavar="NAME", help="Only jobs with this name, such as image.resize.")
    @functools.wraps(command)
    def with_which(*args: Any, state: State | None, queue: str | None, job: str | None, **options: Any) -> _T:
        return command(*args, which=Which(state, queue, job), **options)

    return with_which


@click.group(short_help="List, show, abort or drop the jobs that the store knows.")
def jobs() -> None:
    """List, show, abort or drop the jobs that the job store knows: those of classes with `keep=`.

    The store keeps one record for each publish of such a job, until its time is over.

    \b
    Example:
      leveret jobs list shop:app --state running
    """  # noqa: D301


@jobs.command("list", short_help="List jobs, the last first.")
@store_options
@which_options
@click.option("--limit", metavar="N", type=at_least_1, default=_SHOWN, help=f"At most N jobs.  [default: {_SHOWN}]")
@json_option
def list_jobs(target: StoreTarget, which: Which, limit: int, as_json: bool) -> None:
    """List the jobs that the store knows, the last first. The command changes nothing.

    \b
    Columns:
      id       on a terminal, as much of a UUID as `show`
               needs to find the job; whole in a pipe
      job      the job's name
      queue    its queue
      state    its state; while it runs, how far it is
      attempt  the number of its last attempt, or of the
               first one that is to come
      since    when the state began, UTC
      text     the last error, the reason or the note;
               shortened on a terminal

    \b
    Example:
      leveret jobs list shop:app --state failed --queue emails
    """  # noqa: D301
    terminal = sys.stdout.isatty()

    async def read() -> tuple[Sequence[Record], set[str]]:
        async with target.open() as store:
            # one more than is shown, to know whether there are more
            found = await which.read(store, limit + 1)
            others = await store.list(limit=_NEIGHBOURS) if terminal and not as_json else ()
            return found, {record.job_id for record in (*found, *others)}

    found, ids = run(read())
    shown = [JobLine(**_line(record)) for record in found[:limit]]
    if as_json:
        print_json(shown)
        return
    if not shown:
        print_text(f"no jobs in {redact_url(target.url)}{' that match the options' if which.narrow else ''}")
        return
    # a pipe gets whole ids, as it gets whole lines
    short = short_forms(ids) if terminal else {one: one for one in ids}
    print_table(
        ["id", "job", "queue", "state", ">attempt", "since", "text"],
        [
            [short[one.id], one.job, one.queue, _state(one), one.attempt, moment(one.since_ms), _text(one)]
            for one in shown
        ],
    )
    if len(found) > limit:
        print_text(f"… and more; use --limit N to show more than {limit}", err=True)


def _state(one: JobLine) -> str:
    far = f" {one.progress:.0%}" if one.state == "running" and one.progress is not None else ""
    return f"{one.state}{far}{', aborting' if one.aborting else ''}"


def _text(one: JobLine) -> str:
    return why_failed(one.error, one.reason) or one.note


@jobs.command(short_help="Show all that is known of one job.")
@store_options
@click.argument("job_id", metavar="ID")
@json_option
def show(target: StoreTarget, job_id: str, as_json: bool) -> None:
    """Show all that the store knows of one job: each publish of its id, the last first, with results as they are.

    If ID is a UUID, its beginning is enough: 8 characters or more, with which the id of no other job begins.

    \b
    Example:
      leveret jobs show shop:app 0198e2a4-5b6c
    """  # noqa: D301

    async def read() -> Sequence[Record]:
        async with target.open() as store:
            return await _found(store, target, job_id)

    records = [_in_full(record) for record in run(read())]
    if as_json:
        print_json(records)
    else:
        print_text("\n\n".join(_shown(record, target.app) for record in records))


async def _found(store: Store, target: StoreTarget, text: str) -> Sequence[Record]:
    """Return the records of the job whose id `text` is, or begins; ConfigurationError if there is none, or if several jobs begin so."""
    found = await store.find(text)
    if not found and may_be_short(text):
        beginning = await store.find(text, prefix=True)
        whole = whole_id(text, {record.job_id for record in beginning}, "jobs")
        found = await store.find(whole)
    if not found:
        short = (
            ", which is too short for the beginning of an id: give 8 characters or more" if is_too_short(text) else ""
        )
        msg = f"the store {redact_url(target.url)} knows no job {text!r}{short}; `leveret jobs list` lists those that it knows"
        raise ConfigurationError(msg)
    return found


def _shown(one: JobRecord, app: str | None) -> str:
    letter = " ".join(word for word in ("leveret dead show", app, one.queue, one.id) if word)
    facts: list[tuple[str, object]] = [
        ("id", one.id),
        ("job", one.job),
        ("queue", one.queue),
        ("state", f"{_state(one)} since {moment(one.since_ms)}"),
        ("published", moment(one.created_at_ms)),
        ("started", moment(one.started_at_ms)),
        ("attempt", f"{one.attempt}, republished {counted(one.passes, 'time')}"),
        ("progress", one.progress is not None and f"{one.progress:.0%}"),
        ("note", one.note),
        ("error", one.error),
        ("reason", one.reason),
        ("kept until", moment(one.keep_until_ms)),
        ("letter", one.state == "failed" and letter),
    ]
    text = [f"{name:<12} {one_line(str(value))}" for name, value in facts if value]
    for name, value, as_base64 in (("result", one.result, one.result_base64), ("body", one.body, one.body_base64)):
        if value is not None or as_base64 is not None:
            text += ["", name, *body_lines(value, as_base64)]
    return "\n".join(text)


class Aborted(msgspec.Struct, frozen=True):
    """What became of the abort of one publish."""

    id: str
    publish: int
    answer: Abort
    state: State
    """The state before."""


_SAID: dict[Abort, str] = {
    "aborted": "is aborted",
    "asked": "runs: its worker is asked to end it",
    "finished": "has ended before",
    "unknown": "is no longer known: its record was dropped",
}


@jobs.command(short_help="Abort jobs that wait or run.")
@store_options
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
@json_option
def abort(target: StoreTarget, job_ids: tuple[str, ...], as_json: bool) -> int:
    """Abort jobs: each publish of each ID that hasn't ended.

    A job that waits never starts. One that runs is cancelled by its worker within about a second, and isn't retried; a `def` handler
    has to look at `attempt.aborting`, and to raise. If ID is a UUID, its beginning is enough. The exit code is 1 if one had ended before.

    \b
    Example:
      leveret jobs abort shop:app 0198e2a4-5b6c
    """  # noqa: D301

    async def act() -> list[Aborted]:
        done: list[Aborted] = []
        async with target.open() as store:
            found = [await _found(store, target, job_id) for job_id in job_ids]
            for records in found:
                going = [record for record in records if not record.ended] or records[:1]
                done += [
                    Aborted(record.job_id, record.publish, await store.abort(record.key), record.state)
                    for record in going
                ]
        return done

    done = run(act())
    if as_json:
        print_json(done)
    else:
        for one in done:
            print_text(f"job {one.id} {_SAID[one.answer]}{f': {one.state}' if one.answer == 'finished' else ''}")
    return 1 if any(one.answer in {"finished", "unknown"} for one in done) else 0


@jobs.command(short_help="Delete records; the jobs go on.")
@store_options
@click.argument("job_ids", metavar="[ID]...", nargs=-1)
@which_options
@click.option(
    "--limit",
    metavar="N",
    type=at_least_1,
    default=_DROPPED,
    help=f"At most N records, the last first.  [default: {_DROPPED}]",
)
@click.option("--dry-run", is_flag=True, help="Only count the records; change nothing.")
@click.option("--yes", is_flag=True, help="Don't ask for confirmation.")
@json_option
def drop(
    target: StoreTarget, job_ids: tuple[str, ...], which: Which, limit: int, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete records of the store for good: those of the IDs, or those that match the options. The jobs themselves go on.

    \b
    Example:
      leveret jobs drop shop:app --job image.resize
    """  # noqa: D301
    if bool(job_ids) == which.narrow:
        msg = "give ids, or one of --state, --queue and --job"
        raise click.UsageError(msg)

    async def find() -> Sequence[Record]:
        async with target.open() as store:
            if not job_ids:
                return await which.read(store, limit)
            return [record for job_id in job_ids for record in await _found(store, target, job_id)][:limit]

    async def act(records: Sequence[Record]) -> int:
        async with target.open() as store:
            return await store.drop([record.key for record in records])

    found = run(find())
    dropped = len(found)
    if found and not dry_run:
        ask(f"Delete {counted(len(found), 'record')} of {redact_url(target.url)} for good?", yes=yes)
        dropped = run(act(found))
    if as_json:
        print_json({"dropped": dropped, "dry_run": dry_run})
    else:
        print_text(f"{counted(dropped, 'record')} {'would be ' if dry_run else ''}dropped")
