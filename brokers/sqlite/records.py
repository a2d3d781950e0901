"""The statements of the job store in a SQLite file; the connection is in a transaction of the caller's.

Every list of rows is one statement, and every answer is one row where it can be: between two steps of SQLite the thread would wait
for the interpreter's lock.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from leveret.store import Abort, Change, Key, Progress, Record, State, Verdict

from ..records import ABRIDGED, COLUMNS, ENTERED, entry_of, record_of, storable, verdict_of

_RANK = "(excluded.passes, excluded.attempt, excluded.stage) > (r.passes, r.attempt, r.stage)"
_BROUGHT = (
    "queue = excluded.queue, job = excluded.job, passes = excluded.passes, attempt = excluded.attempt, at_ms = excluded.at_ms,"
    " keep_until_ms = excluded.keep_until_ms, content_type = excluded.content_type, error = excluded.error,"
    " reason = excluded.reason, result = excluded.result, body = coalesce(excluded.body, r.body)"
)
_WRITE = (
    f"ON CONFLICT (job_id, publish) DO UPDATE SET {_BROUGHT}, state = excluded.state, stage = excluded.stage,"
    " started_ms = coalesce(excluded.started_ms, r.started_ms), progress = iif(excluded.stage = 1, NULL, r.progress),"
    f" note = iif(excluded.stage = 1, '', r.note), asked = r.asked AND excluded.stage < 2 WHERE {_RANK}"
)
_BEGIN = (
    f"ON CONFLICT (job_id, publish) DO UPDATE SET {_BROUGHT}, state = iif(r.asked, 'aborted', 'running'), stage = 1 + r.asked,"
    " started_ms = iif(r.asked, r.started_ms, excluded.started_ms), progress = iif(r.asked, r.progress, NULL),"
    " note = iif(r.asked, r.note, ''), asked = 0"
    f" WHERE r.passes <= excluded.passes AND (r.stage < 2 OR r.passes < excluded.passes) AND (r.asked OR {_RANK})"
)
_KEYS = (
    "json_each(?) AS k CROSS JOIN records AS r"
    " ON r.job_id = json_extract(k.value, '$[0]') AND r.publish = json_extract(k.value, '$[1]')"
)
_VERDICTS = f"SELECT json_group_array(json_array(k.key, r.passes, r.stage, r.state)) FROM {_KEYS}"  # noqa: S608 - ours
_PROGRESS = (
    "UPDATE records SET progress = json_extract(p.value, '$[4]'), note = json_extract(p.value, '$[5]') FROM json_each(?) AS p"
    " WHERE job_id = json_extract(p.value, '$[0]') AND publish = json_extract(p.value, '$[1]') AND state = 'running'"
    " AND passes = json_extract(p.value, '$[2]') AND attempt = json_extract(p.value, '$[3]')"
)
_ABORT = (
    "UPDATE records SET state = iif(stage = 0, 'aborted', state), at_ms = iif(stage = 0, ?, at_ms), asked = (stage = 1),"
    " stage = iif(stage = 0, 2, stage) WHERE job_id = ? AND publish = ? AND stage < 2 RETURNING state"
)
_NEWEST = (
    "SELECT json_group_array((SELECT publish FROM records WHERE job_id = k.value ORDER BY seq DESC LIMIT 1))"
    " FROM json_each(?) AS k"
)
_RECORD = ", ".join(f"r.{name}" for name in COLUMNS)
_READ = f"SELECT {_RECORD} FROM {_KEYS}"  # noqa: S608 - columns of ours
_ENDED = f"{_READ} WHERE r.stage = 2"
_ENDS = f"SELECT json_group_array(k.key) FROM {_KEYS} WHERE r.stage = 2"  # noqa: S608 - ours
_ASKED = f"SELECT json_group_array(k.key) FROM {_KEYS} WHERE r.asked"  # noqa: S608 - ours
_LIST = (
    f"SELECT {', '.join(ABRIDGED)} FROM records"  # noqa: S608 - columns of ours
    " WHERE coalesce(state = ?, true) AND coalesce(queue = ?, true) AND coalesce(job = ?, true) ORDER BY seq DESC LIMIT ?"
)
_FIND = f"SELECT {_RECORD} FROM records AS r WHERE job_id BETWEEN ? AND ? ORDER BY seq DESC LIMIT ?"  # noqa: S608
_DROP = f"DELETE FROM records WHERE seq IN (SELECT r.seq FROM {_KEYS})"  # noqa: S608 - ours
_TRIM = (
    "DELETE FROM records WHERE seq IN (SELECT seq FROM records WHERE keep_until_ms <= ? ORDER BY keep_until_ms LIMIT ?)"
)


def _inserts(clash: str) -> tuple[tuple[int, str], ...]:
    # few different statements, which SQLite needn't parse again
    columns = (*ENTERED, "created_ms", "started_ms")
    row = f"({', '.join('?' * len(columns))})"
    start = f"INSERT INTO records AS r ({', '.join(columns)}) VALUES "  # noqa: S608 - columns of ours
    return tuple((count, f"{start}{', '.join([row] * count)} {clash}") for count in (256, 64, 8, 1))


_WRITES, _BEGINS = _inserts(_WRITE), _inserts(_BEGIN)


def _enter(
    changes: Sequence[Change], inserts: Iterable[tuple[int, str]], now_ms: int, file: sqlite3.Connection
) -> None:
    rows = [
        (*entry_of(one, now_ms + round(one.keep_s * 1000)), one.at_ms, one.at_ms if one.state == "running" else None)
        for one in changes
    ]
    start = 0
    for count, statement in inserts:
        while len(rows) - start >= count:
            file.execute(statement, [value for row in rows[start : start + count] for value in row])
            start += count


def write(changes: Sequence[Change | Progress], now_ms: int, file: sqlite3.Connection) -> None:
    """As `Store.write`."""
    for kind, following in groupby(changes, type):
        if kind is Change:
            _enter([one for one in following if isinstance(one, Change)], _WRITES, now_ms, file)
        else:
            last = {(one.key, one.passes, one.attempt): one for one in following if isinstance(one, Progress)}
            notes = [(*one.key, one.passes, one.attempt, one.fraction, storable(one.note)) for one in last.values()]
            file.execute(_PROGRESS, (json.dumps(notes),))


def begin(changes: Sequence[Change], now_ms: int, file: sqlite3.Connection) -> list[Verdict]:
    """As `Store.begin`."""
    _enter(changes, _BEGINS, now_ms, file)
    found: list[tuple[int, int, int, str]] = json.loads(_one(file, _VERDICTS, _keys(change.key for change in changes)))
    return [verdict_of(changes[place], passes, stage, state) for place, passes, stage, state in sorted(found)]


def abort(key: Key, now_ms: int, file: sqlite3.Connection) -> Abort:
    """As `Store.abort`."""
    # fetchall: the update ends only with its last row
    for (state,) in file.execute(_ABORT, (now_ms, *key)).fetchall():
        return "aborted" if state == "aborted" else "asked"
    for (state,) in file.execute("SELECT state FROM records WHERE job_id = ? AND publish = ?", key).fetchall():
        return "aborted" if state == "aborted" else "finished"
    return "unknown"


def read(keys: Sequence[Key], file: sqlite3.Connection) -> list[Record]:
    """Return the records of `keys` that are there."""
    return _records(file, _READ, _keys(keys))


def ended(keys: Sequence[Key], file: sqlite3.Connection) -> list[Record]:
    """Return the records of those of `keys` that have ended."""
    return _records(file, _ENDED, _keys(keys))


def ends(keys: Sequence[Key], file: sqlite3.Connection) -> list[Key]:
    """Return those of `keys` that have ended."""
    return _places(keys, _ENDS, file)


def asked(keys: Sequence[Key], file: sqlite3.Connection) -> list[Key]:
    """Return those of `keys` that are asked to end."""
    return _places(keys, _ASKED, file)


def newest(job_ids: Sequence[str], file: sqlite3.Connection) -> list[Key | None]:
    """As `Store.newest`."""
    found: list[int | None] = json.loads(_one(file, _NEWEST, json.dumps(list(job_ids))))
    return [None if publish is None else Key(job_id, publish) for job_id, publish in zip(job_ids, found, strict=True)]


def listed(
    state: State | None, queue: str | None, job: str | None, limit: int, file: sqlite3.Connection
) -> list[Record]:
    """As `Store.list`."""
    return _records(file, _LIST, state, queue, job, limit)


def found(job_id: str, last: str, limit: int, file: sqlite3.Connection) -> list[Record]:
    """Return the records of the ids from `job_id` to `last`."""
    return _records(file, _FIND, job_id, last, limit)


def drop(keys: Sequence[Key], file: sqlite3.Connection) -> int:
    """As `Store.drop`."""
    return file.execute(_DROP, (_keys(keys),)).rowcount


def trim(at_most: int, now_ms: int, file: sqlite3.Connection) -> int:
    """As `Store.trim`."""
    return file.execute(_TRIM, (now_ms, at_most)).rowcount


def version(file: sqlite3.Connection) -> int:
    """Return a number that changes when another connection writes to the file."""
    number: int = _one(file, "PRAGMA data_version")
    return number


def _places(keys: Sequence[Key], statement: str, file: sqlite3.Connection) -> list[Key]:
    places: list[int] = json.loads(_one(file, statement, _keys(keys)))
    return [keys[place] for place in places]


def _records(file: sqlite3.Connection, statement: str, *arguments: object) -> list[Record]:
    return [record_of(row) for row in file.execute(statement, arguments).fetchall()]


def _one(file: sqlite3.Connection, statement: str, *arguments: object) -> Any:
    return file.execute(statement, arguments).fetchone()[0]


def _keys(keys: Iterable[Key]) -> str:
    return json.dumps(list(keys))
