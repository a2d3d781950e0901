"""The statements of the job store: calls of the schema's functions."""

from __future__ import annotations

from ..records import ABRIDGED, COLUMNS
from .schema import in_schema

_ENTRY_TYPES = [
    "text", "bigint", "text", "text", "text", "smallint", "bigint", "bigint", "bigint", "bigint", "text", "text", "text", "bytea", "bytea",
]  # fmt: skip


class RecordStatements:
    """The statements of the job store, for one schema."""

    def __init__(self, schema: str) -> None:
        def sql(text: str) -> str:
            return in_schema(schema, text)

        arrays = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_ENTRY_TYPES, 3))
        keys = "$1::text[], $2::bigint[]"
        record, short = ", ".join(COLUMNS), ", ".join(ABRIDGED)
        self.enter = sql(f"SELECT * FROM {{schema}}.enter_records($1, $2::integer[], {arrays})")  # noqa: S608 - columns of ours
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
            f"SELECT {short} FROM {{schema}}.records WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR queue = $2)"  # noqa: S608 - columns of ours
            " AND ($3::text IS NULL OR job = $3) ORDER BY seq DESC LIMIT $4"
        )
        self.find = sql(
            f"SELECT {record} FROM {{schema}}.records WHERE job_id BETWEEN $1 AND $2 ORDER BY seq + 0 DESC LIMIT $3"  # noqa: S608 - columns of ours
        )
        self.drop = sql(f"SELECT {{schema}}.drop_records({keys})")
        self.trim = sql("SELECT {schema}.trim_records($1)")
