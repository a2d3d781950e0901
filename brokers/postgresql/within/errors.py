"""What an error of a library says."""

from __future__ import annotations

from typing import Final

from .connection import libraries_of

NOT_THERE: Final = {"3F000", "42883", "42P01", "42703"}
"""What PostgreSQL says of a schema, function, table or column that isn't there."""


def sqlstate_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of a driver's error, if it has one."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state if isinstance(state, str) else None


def drivers_error(error: Exception) -> Exception:
    """Return the driver's own error: Django and SQLAlchemy put it into theirs. SQLAlchemy's text would show the jobs."""
    inner: BaseException | None = error
    while isinstance(inner, Exception) and sqlstate_of(inner) is None:
        inner = getattr(inner, "orig", None) or inner.__cause__
    if isinstance(inner, Exception):
        return inner
    return getattr(error, "orig", None) or error


def is_of_library(error: BaseException) -> bool:
    """Whether a library, or the network, raised the error."""
    return isinstance(error, OSError) or bool(
        libraries_of(error) & {"asyncpg", "psycopg", "psycopg2", "sqlalchemy", "django"}
    )
