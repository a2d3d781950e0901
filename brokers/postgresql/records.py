"""The statements of the job store: calls of the schema's functions, and how changes are handed to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.store import Change, Progress, Verdict

from ..records import ABRIDGED, COLUMNS, entry_of, storable, verdict_of
from .schema import in_schema
from .statements import numbers, short, texts

if TYPE_CHECKING:
    from .link import Connection

_ENTRY_TYPES = [
    "text", "bigint", "text", "text", "text", "smallint", "bigint", "bigint", "bigint", "bigint", "text", "text", "text", "bytea", "bytea",
]  # fmt: skip


class RecordStatements:
    """The statements of the job store, for one schema."""

    def __init__(self, schema: str) -> None:
        def sql(text: str) -> str:
            return in_schema(schema, text)

        # arrays as texts: the driver needs 0.2 to 0.3 µs for each element of an array, and 0.1 for one of a text
        keyed = "$1, $2::text::integer[], $3::text::text[], $4::text::bigint[]"
        arrays = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_ENTRY_TYPES[2:], 5))
        keys = "$1::text[], $2::bigint[]"
        record, abridged = ", ".join(COLUMNS), ", ".join(ABRIDGED)
        repeated = ", ".join(
            f"CASE cardinality(${place}::{kind}[]) WHEN 1 THEN array_fill((${place}::{kind}[])[1], ARRAY[cardinality($2::text::integer[])])"
            f" ELSE ${place}::{kind}[] END"
            for place, kind in enumerate(_ENTRY_TYPES[2:], 5)
        )
        self.enter = sql(f"SELECT * FROM {{schema}}.enter_records({keyed}, {arrays})")  # noqa: S608 - columns of ours
        self.enter_alike = sql(
            f"SELECT * FROM {{schema}}.enter_records({keyed}, {repeated})"  # noqa: S608 - columns of ours
        )
        """As `enter`, for several changes; a column in which all have the same is `short`."""
        self.progress = sql(
            f"SELECT {{schema}}.note_progress({keys}, $3::bigint[], $4::bigint[], $5::double precision[], $6::text[])"
        )
        self.abort = sql("SELECT {schema}.abort_record($1, $2)")
        self.read = sql(f"SELECT {record} FROM {{schema}}.find_records({keys}, $3)")  # noqa: S608 - columns of ours
        self.wait = sql("SELECT {schema}.await_ends($3, $1::text[], $2::bigint[])")
        self.asked = sql(f"SELECT job_id, publish FROM {{schema}}.find_records({keys}, 1::smallint) WHERE asked")  # noqa: S608 - columns of ours
        self.newest = sql(
            "SELECT {schema}.newest_record(k.job_id) FROM unnest($1::text[]) WITH ORDINALITY AS k(job_id, place) ORDER BY k.place"
        )
        self.list = sql(
            f"SELECT {abridged} FROM {{schema}}.records WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR queue = $2)"  # noqa: S608 - columns of ours
            " AND ($3::text IS NULL OR job = $3) ORDER BY seq DESC LIMIT $4"
        )
        self.find = sql(
            f"SELECT {record} FROM {{schema}}.records WHERE job_id BETWEEN $1 AND $2 ORDER BY seq + 0 DESC LIMIT $3"  # noqa: S608 - columns of ours
        )
        self.drop = sql(f"SELECT {{schema}}.drop_records({keys})")
        self.trim = sql("SELECT {schema}.trim_records($1)")

    async def write(self, connection: Connection, changes: Sequence[Change | Progress]) -> None:
        """As `Store.write`, in the transaction of `connection`, if there is one.

        Progress of a publish without a change mustn't be among changes of others: `locking_first` can't order its lock.
        """
        changes = locking_first(changes)
        for places in rounds_of(changes):
            those = [(place, changes[place]) for place in places]
            if entered := [(place, one) for place, one in those if isinstance(one, Change)]:
                await self._enter(connection, entered, begins=False)
            if notes := [_note(one) for _, one in those if isinstance(one, Progress)]:
                await connection.fetch(self.progress, *columns(notes))

    async def begin(self, connection: Connection, changes: Sequence[Change]) -> Sequence[Verdict]:
        """As `Store.begin`, likewise."""
        verdicts: dict[int, Verdict] = {}
        for places in rounds_of(changes):
            rows = await self._enter(connection, [(place, changes[place]) for place in places], begins=True)
            for place, row in zip(places, rows, strict=True):
                verdicts[place] = verdict_of(changes[place], *row)
        return [verdicts[place] for place in range(len(changes))]

    async def _enter(self, connection: Connection, those: Sequence[tuple[int, Change]], *, begins: bool) -> list[Any]:
        ids, publishes, *rest = columns([entry_of(one, round(one.keep_s * 1000)) for _, one in those])
        keys = numbers(place for place, _ in those), texts(ids), numbers(publishes)
        if len(those) == 1:
            return await connection.fetch(self.enter, begins, *keys, *rest)
        return await connection.fetch(self.enter_alike, begins, *keys, *map(short, rest))


def _note(one: Progress) -> tuple[Any, ...]:
    return (*one.key, one.passes, one.attempt, one.fraction, storable(one.note))


def rounds_of(changes: Sequence[Change | Progress]) -> list[list[int]]:
    """Return the places of the changes in rounds: one statement changes a record once only. Each round is in the order of the keys."""
    keys = [(change.job_id, change.publish) for change in changes]
    places = sorted(range(len(keys)), key=keys.__getitem__)
    if len(set(keys)) == len(keys):
        return [places] if places else []
    rounds: list[list[int]] = []
    seen: Counter[tuple[str, int]] = Counter()
    for place in places:
        count = seen[keys[place]]
        seen[keys[place]] += 1
        if count == len(rounds):
            rounds.append([])
        rounds[count].append(place)
    return rounds


def locking_first(changes: Sequence[Change | Progress]) -> Sequence[Change | Progress]:
    """Return changes of which the first round locks all records in the order of their keys.

    A round has one statement for changes and one for progress. If some publishes begin with a change and others with progress, a change
    goes before that progress too. It is too late for every record, so it locks the record and has no other effect.
    """
    if not is_mixed(changes):
        return changes
    first = {one.key: one for one in reversed(changes)}
    if not is_mixed(list(first.values())):
        return changes
    changed = {one.key: one for one in reversed(changes) if isinstance(one, Change)}
    found: list[Change | Progress] = []
    for one in changes:
        if isinstance(one, Progress) and first[one.key] is one and (change := changed.get(one.key)):
            found.append(msgspec.structs.replace(change, state="queued", passes=-1, result=None, body=None))
        found.append(one)
    return found


def is_mixed(changes: Sequence[Change | Progress]) -> bool:
    """Return whether there are both changes and progress."""
    return len(set(map(type, changes))) > 1


def columns(rows: Sequence[Sequence[Any]], count: int = 0) -> Sequence[Sequence[Any]]:
    """Return the columns of rows; `count` of them if there are no rows."""
    return list(zip(*rows, strict=True)) if rows else [()] * count
