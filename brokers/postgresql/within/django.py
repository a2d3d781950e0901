"""The connections of Django."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from leveret.errors import InvalidJob

from .connection import FAILED, OUTSIDE, BlockingConnection
from .script import Write, run


class Django(BlockingConnection):
    """Django's `connection`, and an entry of its `connections`."""

    library = "django"
    name = "Django's connection or its alias"

    @classmethod
    def fits(cls, one: Any) -> bool:
        """As `Connection.fits`."""
        return hasattr(one, "in_atomic_block")

    def problem(self) -> str | None:
        """As `Connection.problem`."""
        one = self._connection
        if one.vendor != "postgresql":
            return f"is of {one.vendor}: the jobs are in PostgreSQL"
        if one.needs_rollback:
            return FAILED
        return (
            None if one.in_atomic_block or not one.get_autocommit() else OUTSIDE.format("`with transaction.atomic():`")
        )

    def run(self, write: Write) -> Any:
        """As `BlockingConnection.run`."""
        with self._connection.cursor() as cursor:

            def execute(sql: str, arguments: Sequence[Any]) -> object:
                cursor.execute(sql, arguments or None)
                return cursor.fetchone()[0] if arguments else None

            return run(write(numbered=False, joined=True), execute)


def of_alias(alias: str) -> Any:
    """Return Django's connection of this thread."""
    django = sys.modules.get("django.db")
    if django is None or alias not in django.connections.settings:
        known = (
            "Django isn't in use" if django is None else f"DATABASES has only {', '.join(django.connections.settings)}"
        )
        msg = f"connection={alias!r:.80} is an alias of a database of Django, and {known}"
        raise InvalidJob(msg)
    return django.connections[alias]
