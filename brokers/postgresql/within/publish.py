"""Publishing inside a user's transaction."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias, final

from leveret.clock import Clock
from leveret.errors import BrokerUnavailable, ConfigurationError, InvalidJob, PublishError, PublishTimeout
from leveret.settings import redact
from leveret.texts import said_by
from leveret.transactions import Add, AddBlocking, AsyncTransaction, Transaction

from ..statements import Statements
from .connection import FAILED, OUTSIDE
from .errors import NOT_THERE, drivers_error, is_of_library, sqlstate_of
from .libraries import opened, opened_blocking
from .rows import Jobs, rows_of
from .script import Script, Write
from .turn import is_used, turn

Arguments: TypeAlias = Callable[[Jobs], Sequence[Any]]

_SAVEPOINT: Final = "leveret_publish"
_LIMIT: Final = (
    "SELECT set_config('leveret.statement_timeout', current_setting('statement_timeout'), true),"
    " set_config('statement_timeout', '{}', true)"
)
"""Sets the time-out of the statements that follow, and keeps the user's. Rolling back to the savepoint takes both back."""
_UNLIMITED: Final = ", set_config('statement_timeout', current_setting('leveret.statement_timeout'), true)"
"""Sets the user's time-out again."""
_STEP_S: Final = 0.1
"""Time-outs are multiples of it: libraries prepare each text of a statement, and there should be few."""
_MOST_JOBS: Final = 5000
_MOST_BYTES: Final = 16 << 20
"""The most that one statement adds. More jobs are several statements in one savepoint."""
_IN_BLOCKING: Final = (
    "in blocking code, publish with app.blocking_publisher(), and in a `def` handler with attempt.publish_blocking()"
)
_IN_ASYNC: Final = "in async code, publish with app.publisher(), and in an `async def` handler with attempt.publish()"


def jobs_within(schema: str, clock: Clock) -> Within:
    """Return what adds jobs to the queues of `schema`."""
    return Within(Statements(schema).add_jobs, lambda jobs: rows_of(jobs, clock), schema)


@final
class Within:
    """Adds jobs by one statement; the `Transactional` of a broker or an outbox.

    `sql` is a SELECT of a function in `schema`, with $1 and so on. `arguments` returns what goes there, and raises InvalidJob for what
    PostgreSQL doesn't take.
    """

    def __init__(self, sql: str, arguments: Arguments, schema: str) -> None:
        self._numbered = f"{sql}{_UNLIMITED}"
        self._formatted = re.sub(r"\$\d+", "%s", self._numbered)
        self._arguments = arguments
        self._schema = schema

    def within(self, connection: AsyncTransaction, /) -> Add:
        """As `Transactional.within`."""
        own = opened(connection, for_others=_IN_BLOCKING)
        if not is_used(connection):
            own.check()

        async def add(jobs: Jobs, deadline: float) -> None:
            async with turn(connection):
                own.check()
                write = self._writer(jobs, deadline)
                try:
                    await own.run(write, deadline)
                except TimeoutError as error:  # the library didn't come back to the script
                    raise _no_answer(jobs) from error

        return add

    def within_blocking(self, connection: Transaction, /) -> AddBlocking:
        """As `Transactional.within_blocking`."""
        own = opened_blocking(connection, for_others=_IN_ASYNC)
        own.check()
        return lambda jobs, deadline: own.run(self._writer(jobs, deadline))

    def _writer(self, jobs: Jobs, deadline: float) -> Write:
        if time.monotonic() >= deadline:
            msg = f"{_none_of(jobs)} sent: the timeout_s was over"
            raise PublishTimeout(msg, job_id=_job_id(jobs), maybe_published=False)
        parts = [self._arguments(part) for part in _parts(jobs)]

        def write(*, numbered: bool, joined: bool) -> Script:
            sql = self._numbered if numbered else self._formatted
            return self._script(sql, parts, jobs, deadline, _joined if joined else _one_by_one)

        return write

    def _script(
        self,
        sql: str,
        parts: Sequence[Sequence[Any]],
        jobs: Jobs,
        deadline: float,
        together: Callable[..., Iterable[str]],
    ) -> Script:
        """Yield the statements. A statement that fails is thrown in; what it means is raised at the end."""
        begin = [f"SAVEPOINT {_SAVEPOINT}"]
        try:
            for arguments in parts:
                left_s = max(_STEP_S, deadline - time.monotonic())
                begin.append(_LIMIT.format(math.ceil(left_s / _STEP_S) * round(_STEP_S * 1000)))
                for statement in together(*begin):
                    yield statement, ()
                begin.clear()
                yield sql, arguments
            yield f"RELEASE SAVEPOINT {_SAVEPOINT}", ()
        except BaseException as error:
            undone = False
            try:
                for statement in together(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}", f"RELEASE SAVEPOINT {_SAVEPOINT}"):
                    yield statement, ()
                undone = True
            except Exception:  # noqa: BLE001, S110 - the first error says more
                pass
            if not isinstance(error, Exception):
                raise
            cause = drivers_error(error)
            if (meant := self._meant(cause, jobs, undone=undone)) is None:
                raise
            meant.__cause__ = meant.__cause__ or cause
            raise meant  # noqa: B904 - its cause is set

    def _meant(self, error: Exception, jobs: Jobs, *, undone: bool) -> PublishError | None:
        """Return what an error of a statement says of the publish; None for an error that is the user's to handle.

        A deadlock, for example, ends the whole transaction, and services know it by their library's error.
        """
        job_id, state, said = _job_id(jobs), sqlstate_of(error), redact(said_by(error))
        msg = f"{_none_of(jobs)} added to the transaction of connection="
        if isinstance(error, TimeoutError) or state == "57014":
            if undone:
                return PublishTimeout(f"{msg}: {said}", job_id=job_id, maybe_published=False)
            return _no_answer(jobs)
        if state is None:
            return BrokerUnavailable(f"{msg}: {said}", job_id=job_id) if is_of_library(error) else None
        if state.startswith("40"):
            return None
        if state == "25P02":
            return InvalidJob(f"{msg}: connection= {FAILED}", job_id=job_id)
        if state == "25P01":
            return InvalidJob(f"{msg}: connection= {OUTSIDE.format('a transaction of its library')}", job_id=job_id)
        if state in NOT_THERE:
            wrong = (
                f"its database hasn't the schema {self._schema!r} of this app, or an older one ({said}): publish on a connection to the"
                " app's database, or run `leveret migrate` with the app, such as shop:app"
            )
            return InvalidJob(f"{msg}: {wrong}", job_id=job_id)
        if state == "42501":
            refused = BrokerUnavailable(
                f"{msg}: {said}; its role needs what docs/operations.md grants publishers", job_id=job_id
            )
            refused.__cause__ = ConfigurationError(said)
            return refused
        if state[:2] in {"22", "23", "25"}:
            return InvalidJob(f"{msg}: {said}", job_id=job_id)
        return BrokerUnavailable(f"{msg}: {said}", job_id=job_id)


def _no_answer(jobs: Jobs) -> PublishTimeout:
    msg = f"{_named(jobs)} may have been added to the transaction of connection=: the server gave no answer"
    return PublishTimeout(msg, job_id=_job_id(jobs), maybe_published=True)


def _joined(*statements: str) -> Iterable[str]:
    return ("; ".join(statements),)


def _one_by_one(*statements: str) -> Iterable[str]:
    return statements


def _job_id(jobs: Jobs) -> str | None:
    return jobs[0][1].job_id if len(jobs) == 1 else None


def _named(jobs: Jobs) -> str:
    return f"job {jobs[0][1].job_id} for queue {jobs[0][0].name!r}" if len(jobs) == 1 else f"{len(jobs)} jobs"


def _none_of(jobs: Jobs) -> str:
    return f"{_named(jobs)} wasn't" if len(jobs) == 1 else f"none of {_named(jobs)} was"


def _parts(jobs: Jobs) -> Iterator[Jobs]:
    """Yield the jobs in parts that a statement can take."""
    begin = size = 0
    for place, (_, envelope) in enumerate(jobs):
        if place > begin and (place - begin >= _MOST_JOBS or size + len(envelope.body) > _MOST_BYTES):
            yield jobs[begin:place]
            begin, size = place, 0
        size += len(envelope.body)
    yield jobs[begin:]
