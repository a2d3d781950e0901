"""Which library a connection is of. Its class's module tells, and no library is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from leveret.errors import InvalidJob
from leveret.transactions import AsyncTransaction, Transaction

from .asyncpg import Asyncpg
from .connection import AsyncConnection, BlockingConnection, Connection, libraries_of
from .django import Django, of_alias
from .psycopg import Psycopg, PsycopgAsync
from .sqlalchemy import Sqlalchemy, SqlalchemyAsync

_ASYNC: Final = (Asyncpg, PsycopgAsync, SqlalchemyAsync)
_BLOCKING: Final = (Psycopg, Sqlalchemy, Django)

_K = TypeVar("_K", bound=Connection)


def opened(given: AsyncTransaction, *, for_others: str) -> AsyncConnection:
    """Return the connection of an asynchronous library; InvalidJob if it isn't one. `for_others` is what to do with one that blocks."""
    return _opened(given, _ASYNC, _BLOCKING, for_others)


def opened_blocking(given: Transaction, *, for_others: str) -> BlockingConnection:
    """Return the connection of a blocking library, or that of Django's alias; InvalidJob if it isn't one."""
    return _opened(of_alias(given) if isinstance(given, str) else given, _BLOCKING, _ASYNC, for_others)


def _opened(given: object, kinds: Sequence[type[_K]], others: Sequence[type[Connection]], for_others: str) -> _K:
    libraries = libraries_of(given)
    for kind in kinds:
        if kind.library in libraries and kind.fits(given):
            return kind(given)
    if any(kind.library in libraries and kind.fits(given) for kind in others):
        hint = f"; {for_others}"
    elif libraries & {"asyncpg", "psycopg", "psycopg_pool", "sqlalchemy", "django"}:
        hint = "; an engine, a pool, a cursor or a scoped_session isn't one: pass the connection, or what the last returns: session()"
    else:
        hint = ""
    what = f"{type(given).__module__}.{type(given).__qualname__}"
    msg = f"connection= takes {', '.join(kind.name for kind in kinds)}, with an open transaction, not {what}{hint}"
    raise InvalidJob(msg)
