"""The inbox: a user's transaction notes that it has the effect of a job."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, final

from leveret.errors import InvalidJob
from leveret.texts import said_by
from leveret.transactions import AsyncTransaction, Transaction

from ..schema import in_schema
from .errors import NOT_THERE, drivers_error, sqlstate_of
from .libraries import opened, opened_blocking
from .rows import check_text
from .script import Script, Write
from .turn import turn


@final
class Once:
    """Notes in a user's transaction that it has the effect of a job; the `Inbox` of `schema`. Entries are kept for `keep_s`."""

    def __init__(self, schema: str, keep_s: float) -> None:
        self._numbered = in_schema(schema, "SELECT {schema}.once($1, $2, $3)")
        self._schema = schema
        self._keep_s = keep_s

    async def once(self, connection: AsyncTransaction, queue: str, job_id: str, /) -> bool:
        """As `Inbox.once`."""
        own = opened(connection, for_others="in a `def` handler, call attempt.once_blocking()")
        async with turn(connection):
            own.check()
            return bool(await own.run(self._writer(queue, job_id), math.inf))

    def once_blocking(self, connection: Transaction, queue: str, job_id: str, /) -> bool:
        """As `Inbox.once_blocking`."""
        own = opened_blocking(connection, for_others="in an `async def` handler, await attempt.once()")
        own.check()
        return bool(own.run(self._writer(queue, job_id)))

    def _writer(self, queue: str, job_id: str) -> Write:
        check_text(job_id, job_id)

        def write(*, numbered: bool, joined: bool) -> Script:  # noqa: ARG001 - it is one statement
            sql = self._numbered if numbered else re.sub(r"\$\d", "%s", self._numbered)
            return self._script(sql, (queue, job_id, float(self._keep_s)))

        return write

    def _script(self, sql: str, arguments: Sequence[Any]) -> Script:
        # no savepoint: after an error the handler fails, and its transaction with it
        try:
            first = yield sql, arguments
        except Exception as error:
            cause = drivers_error(error)
            if sqlstate_of(cause) in NOT_THERE:
                msg = (
                    f"the database of connection= hasn't the inbox of the schema {self._schema!r} ({said_by(cause)}): pass a connection to"
                    " the app's database, or run `leveret migrate` with the app, such as shop:app"
                )
                raise InvalidJob(msg) from cause
            raise
        return first
