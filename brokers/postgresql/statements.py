"""The statements of a store: calls of the schema's functions, and how rows are handed to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from leveret.job import LEVELS

from ..rows import COLUMNS, JOB_ID, Row, delay_ms
from .schema import in_schema

LEVEL_NUMBERS: Final = {level.value: number for number, level in enumerate(LEVELS, 1)}
"""The numbers of the levels in the column `level`, the most urgent first."""
UNKNOWN_LEVEL: Final = 0
"""The number of a level that leveret doesn't know, which only a foreign producer writes."""
LEVEL_NAMES: Final = {UNKNOWN_LEVEL: str(UNKNOWN_LEVEL)} | {number: name for name, number in LEVEL_NUMBERS.items()}
"""The names of the levels, as rows are read."""

_SETTINGS: Final = {
    "synchronous_commit": "on",
    "lock_timeout": "'2s'",
    "statement_timeout": "'60s'",
    "idle_in_transaction_session_timeout": "'20s'",  # a server that lost its client lets the locks go
}
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
SET: Final = "; ".join(
    f"SET {name} = {value}"
    for name, value in (_SETTINGS | {"default_transaction_isolation": "'read committed'"}).items()
)
"""Sets up a session of a connection to the server itself; then a statement alone is a transaction with these settings too."""


def begin(*, direct: bool) -> str:
    """Return what begins a transaction. Behind a pooler nothing of a session is relied on."""
    return (
        _BEGIN if direct else "; ".join([_BEGIN, *(f"SET LOCAL {name} = {value}" for name, value in _SETTINGS.items())])
    )


_TYPES = ["text", "text", "bigint", "text", "text", "text", "text", "bytea", "bigint", "text", "text", "text", "text"]
_ARRAYS = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_TYPES, 1))
_SCALARS = ", ".join(f"ARRAY[${place}::{kind}]" for place, kind in enumerate(_TYPES, 1))
_ALIKE: Final = (0, 1, 4, 5, 8, 9)
"""The places in a row of what jobs that are published together mostly have in common."""
_ADDED = ", ".join(
    f"CASE cardinality(${place}::{kind}[]) WHEN 1 THEN array_fill((${place}::{kind}[])[1], ARRAY[cardinality(${JOB_ID + 1}::text[])])"
    f" ELSE ${place}::{kind}[] END"
    if place - 1 in _ALIKE
    else f"${place}::{kind}[]"
    for place, kind in enumerate(_TYPES, 1)
)
_FIELDS = ", ".join(COLUMNS[2:])
_LEVEL_NAMES = ", ".join(f"'{level}'" for level in LEVEL_NUMBERS)
LEVEL: Final = f"coalesce((ARRAY[{_LEVEL_NAMES}])[level], level::text)"
"""The name of a row's level."""
READ: Final = f"queue, {LEVEL}, {_FIELDS}"
"""The columns that `unpack` takes."""


class Statements:
    """The statements for one schema."""

    def __init__(self, schema: str) -> None:
        def sql(text: str) -> str:
            return in_schema(schema, text)

        self.channel = "leveret_" + hashlib.md5(sql("{schema}").encode(), usedforsecurity=False).hexdigest()
        """The channel of `wake`."""
        self.add_jobs = sql(f"SELECT {{schema}}.add_jobs({_ARRAYS})")
        self.add_job = sql(f"SELECT {{schema}}.add_jobs({_SCALARS})")
        self.add_shortened = sql(f"SELECT {{schema}}.add_jobs({_ADDED})")
        self.add_letters = sql(
            f"INSERT INTO {{schema}}.dead (queue, level, buried_ms, {_FIELDS})"  # noqa: S608 - columns of ours
            f" SELECT r.queue, array_position(ARRAY[{_LEVEL_NAMES}], r.level), r.buried_ms, r.{_FIELDS.replace(', ', ', r.')}"
            f" FROM unnest({_ARRAYS}) AS r(queue, level, buried_ms, {_FIELDS})"
        )
        self.add_queues = sql("INSERT INTO {schema}.queues (name) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING")
        self.register = sql("INSERT INTO {schema}.workers DEFAULT VALUES RETURNING id")
        self.beat = sql("UPDATE {schema}.workers SET beat = beat + 1 WHERE id = ANY($1) RETURNING id")
        self.beats = sql("SELECT id, beat FROM {schema}.workers")
        self.identify = sql(
            "UPDATE {schema}.workers w SET backend = a.pid, backend_start = a.backend_start, server_start = pg_postmaster_start_time()"
            " FROM pg_stat_activity a WHERE a.pid = pg_backend_pid() AND w.id = ANY($1)"
        )
        # without pg_read_all_stats others' backend_start is null: a backend that is there then counts as the worker's
        self.missing = sql(
            "SELECT id FROM {schema}.workers w WHERE server_start = pg_postmaster_start_time() AND id <> ALL($1)"
            " AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = w.backend AND coalesce(a.backend_start = w.backend_start, true))"
        )
        self._settle = sql("SELECT {schema}.settle")
        self._give_back = sql("SELECT {schema}.give_back")
        self._wake = sql("SELECT {schema}.wake")
        self.begin = sql("UPDATE {schema}.claims SET begun = true WHERE seq = $1 AND worker = $2")
        self.release = sql("SELECT {schema}.release($1, $2)")
        self.move_due = sql("SELECT {schema}.move_due($1)")
        self.claim = sql("SELECT * FROM {schema}.claim($1, $2, $3, $4, $5, $6)")

    # Texts without parameters, which are sent together with BEGIN. Numbers and names of queues need no escape.

    def settle(self, lease: int | None, queues: Iterable[str], levels: Iterable[int], seqs: Iterable[int]) -> str:
        """Return what deletes finished jobs."""
        return f"{self._settle}({_number(lease)}, {_names(queues)}, {_numbers(levels)}, {_numbers(seqs)})"

    def give_back(self, lease: int | None, seqs: Iterable[int]) -> str:
        """Return what frees jobs that haven't begun."""
        return f"{self._give_back}({_number(lease)}, {_numbers(seqs)})"

    def freed(self, queues: Iterable[str]) -> str:
        """Return what tells the workers that jobs of these queues are free again."""
        return f"{self._wake}({_names(queues)}, 'freed')"


def _number(value: int | None) -> str:
    return "NULL" if value is None else str(value)


def numbers(values: Iterable[int]) -> str:
    """Return an array of numbers as a text."""
    return "{" + ",".join(map(str, values)) + "}"


def texts(values: Sequence[str]) -> str:
    """Return an array of texts as a text; at least one."""
    joined = '","'.join(values)
    if "\\" in joined or joined.count('"') > 2 * len(values) - 2:
        joined = '","'.join(value.replace("\\", "\\\\").replace('"', '\\"') for value in values)
    return '{"' + joined + '"}'


def _names(values: Iterable[str]) -> str:
    return "'{\"" + '","'.join(values) + "\"}'"


def _numbers(values: Iterable[int]) -> str:
    return f"'{numbers(values)}'"


_OUTBOX_TYPES = [*_TYPES, "text", "boolean"]
_OUTBOX_ARRAYS = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_OUTBOX_TYPES, 1))
_OUTBOX_FIELDS = f"queue, level, queue_type, priorities, delay_ms, added_ms, {', '.join(COLUMNS[2:-1])}"


class OutboxStatements:
    """The statements of relays, and of the outbox's dead letters, for one schema."""

    def __init__(self, schema: str) -> None:
        def sql(text: str) -> str:
            return in_schema(schema, text)

        name = hashlib.md5(sql("{schema}").encode(), usedforsecurity=False).hexdigest()
        self.channel = f"leveret_outbox_{name}"
        """The channel of `add_outbox`."""
        self.add = sql(f"SELECT {{schema}}.add_outbox({_OUTBOX_ARRAYS})")
        self.take = sql("SELECT * FROM {schema}.take_outbox($1, $2, $3, $4)")
        self.settle = sql("SELECT {schema}.settle_outbox($1)")
        self.bury = sql(
            f"INSERT INTO {{schema}}.outbox_dead (seq, {_OUTBOX_FIELDS}, headers)"  # noqa: S608 - columns of ours
            f" SELECT o.seq, o.{_OUTBOX_FIELDS.replace(', ', ', o.')}, d.headers"
            " FROM unnest($1::bigint[], $2::text[]) AS d(seq, headers) JOIN {schema}.outbox o ON o.seq = d.seq"
        )
        self.waits = sql("SELECT pg_advisory_lock_shared({schema}.waiting('lv.outbox'))")
        self.works = sql("SELECT pg_advisory_unlock_shared({schema}.waiting('lv.outbox'))")
        self.forget = sql("SELECT {schema}.forget_once($1, $2)")


def columns(rows: Sequence[Row], now_ms: float | None) -> Iterable[Sequence[Any]]:
    """Return the columns of rows. With `now_ms`, the moment in each row becomes a delay: the server's clock may be another."""
    queue, level, when, *rest = zip(*rows, strict=True)
    if now_ms is not None:
        when = tuple(None if due_ms is None else delay_ms(due_ms, now_ms) for due_ms in when)
    return queue, level, when, *rest


def shortened(found: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return columns for `add_shortened`: one without values is empty, one with the same value everywhere has it once.

    The driver needs 0.3 µs of CPU for each element of an array, whatever it is.
    """
    return [short(column) if place in _ALIKE or column[0] is None else column for place, column in enumerate(found)]


def short(column: Sequence[Any]) -> Sequence[Any]:
    """Return a column without values as an empty one, and one with the same value everywhere with one."""
    first = column[0]
    if column.count(first) != len(column):
        return column
    return () if first is None else (first,)
