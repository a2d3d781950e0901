"""Publishing inside a user's own transaction, on the connection of the user's own library.

The library is told by the module of the connection's class, and none is imported. All get the same statements: a savepoint, a time-out,
the jobs, and the release of the savepoint. The server ends a statement that takes too long: a cancelled task would end the whole
transaction with some libraries.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Final, Protocol, TypeAlias, TypeVar, final

from leveret.clock import Clock
from leveret.envelope import Envelope
from leveret.errors import BrokerUnavailable, ConfigurationError, InvalidJob, PublishError, PublishTimeout
from leveret.job import Queue
from leveret.settings import redact
from leveret.texts import said_by
from leveret.transactions import Add, AddBlocking, AsyncTransaction, Transaction

from ..rows import JOB_ID, packed, when_ms
from .schema import in_schema
from .statements import Statements, columns

Jobs: TypeAlias = Sequence[tuple[Queue, Envelope]]
Arguments: TypeAlias = Callable[[Jobs], Sequence[Any]]
_Script: TypeAlias = Generator[tuple[str, Sequence[Any]], Any, Any]
"""Yields statements, and is sent the first value of what each selects."""


class _Write(Protocol):
    """Returns the statements."""

    def __call__(self, *, numbered: bool, joined: bool) -> _Script:
        """With `numbered`, places are $1 and so on instead of %s; with `joined`, statements without values come together."""
        ...


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
_ANSWER_S: Final = 1.0
"""How long an answer is waited for once the server must have given it. A server that is gone or frozen gives none."""
_NEVER_S: Final = 3600.0
_MOST_JOBS: Final = 5000
_MOST_BYTES: Final = 16 << 20
"""The most that one statement adds. More jobs are several statements in one savepoint."""

_NOT_THERE: Final = {"3F000", "42883", "42P01", "42703"}
"""What PostgreSQL says of a schema, function, table or column that isn't there."""

_OUTSIDE: Final = "has no open transaction: open one with {}, or publish without connection="
_FAILED: Final = "has a transaction that failed: roll it back, and publish in the next one"
_CLOSED: Final = "is closed: publish on an open one"
_BUSY: Final = "is in the middle of another statement: wait for the end of that"


def jobs_within(schema: str, clock: Clock) -> Within:
    """Return what adds jobs to the queues of `schema`."""
    return Within(Statements(schema).add_jobs, lambda jobs: rows_of(jobs, clock), schema)


def rows_of(jobs: Jobs, clock: Clock) -> Sequence[Any]:
    """Return the columns of jobs, with delays; InvalidJob for what PostgreSQL doesn't take."""
    rows = [packed(queue.name, envelope, when_ms(envelope, clock)) for queue, envelope in jobs]
    for row in rows:
        for value in row:
            if isinstance(value, str):
                check_text(value, row[JOB_ID])
    return [list(column) for column in columns(rows, clock.now() * 1000)]


def check_text(value: str, job_id: str) -> None:
    """Raise InvalidJob for a text that PostgreSQL doesn't take."""
    try:
        refused = b"\0" in value.encode()
    except UnicodeEncodeError:
        refused = True
    if refused:
        msg = f"job {job_id!r:.80}: PostgreSQL takes no text with a NUL or half a surrogate pair, such as {value!r:.80}"
        raise InvalidJob(msg, job_id=job_id)


class _Turns:
    """The publishes on one connection: each has its savepoint, and the savepoints of two mustn't cross."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.users = 0


_turns: Final[dict[int, _Turns]] = {}
"""By the connection's id, while it is in use: not every library's connection can be referred to weakly."""


@asynccontextmanager
async def _turn(connection: object) -> AsyncGenerator[None]:
    turns = _turns.setdefault(id(connection), _Turns())
    turns.users += 1
    try:
        async with turns.lock:
            yield
    finally:
        turns.users -= 1
        if not turns.users:
            del _turns[id(connection)]


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
        opened = _opened(connection, _ASYNC, _BLOCKING, _IN_ASYNC)
        if id(connection) not in _turns:
            opened.check()

        async def add(jobs: Jobs, deadline: float) -> None:
            async with _turn(connection):
                opened.check()
                write = self._writer(jobs, deadline)
                try:
                    await opened.run(write, deadline)
                except TimeoutError as error:  # the library didn't come back to the script
                    raise _no_answer(jobs) from error

        return add

    def within_blocking(self, connection: Transaction, /) -> AddBlocking:
        """As `Transactional.within_blocking`."""
        found = _django_alias(connection) if isinstance(connection, str) else connection
        opened = _opened(found, _BLOCKING, _ASYNC, _IN_BLOCKING)
        opened.check()
        return lambda jobs, deadline: opened.run(self._writer(jobs, deadline))

    def _writer(self, jobs: Jobs, deadline: float) -> _Write:
        if time.monotonic() >= deadline:
            msg = f"{_none_of(jobs)} sent: the timeout_s was over"
            raise PublishTimeout(msg, job_id=_job_id(jobs), maybe_published=False)
        parts = [self._arguments(part) for part in _parts(jobs)]

        def write(*, numbered: bool, joined: bool) -> _Script:
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
    ) -> _Script:
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
            cause = _drivers(error)
            if (meant := self._meant(cause, jobs, undone=undone)) is None:
                raise
            meant.__cause__ = meant.__cause__ or cause
            raise meant  # noqa: B904 - its cause is set

    def _meant(self, error: Exception, jobs: Jobs, *, undone: bool) -> PublishError | None:
        """Return what an error of a statement says of the publish; None for an error that is the user's to handle.

        A deadlock, for example, ends the whole transaction, and services know it by their library's error.
        """
        job_id, state, said = _job_id(jobs), _sqlstate(error), redact(said_by(error))
        msg = f"{_none_of(jobs)} added to the transaction of connection="
        if isinstance(error, TimeoutError) or state == "57014":
            if undone:
                return PublishTimeout(f"{msg}: {said}", job_id=job_id, maybe_published=False)
            return _no_answer(jobs)
        if state is None:
            return BrokerUnavailable(f"{msg}: {said}", job_id=job_id) if _is_of_library(error) else None
        if state.startswith("40"):
            return None
        if state == "25P02":
            return InvalidJob(f"{msg}: connection= {_FAILED}", job_id=job_id)
        if state == "25P01":
            return InvalidJob(f"{msg}: connection= {_OUTSIDE.format('a transaction of its library')}", job_id=job_id)
        if state in _NOT_THERE:
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


@final
class Once:
    """Notes in a user's transaction that it has the effect of a job; the `Inbox` of `schema`. Entries are kept for `keep_s`."""

    def __init__(self, schema: str, keep_s: float) -> None:
        self._numbered = in_schema(schema, "SELECT {schema}.once($1, $2, $3)")
        self._schema = schema
        self._keep_s = keep_s

    async def once(self, connection: AsyncTransaction, queue: str, job_id: str, /) -> bool:
        """As `Inbox.once`."""
        opened = _opened(connection, _ASYNC, _BLOCKING, "in a `def` handler, call attempt.once_blocking()")
        async with _turn(connection):
            opened.check()
            return bool(await opened.run(self._writer(queue, job_id), math.inf))

    def once_blocking(self, connection: Transaction, queue: str, job_id: str, /) -> bool:
        """As `Inbox.once_blocking`."""
        found = _django_alias(connection) if isinstance(connection, str) else connection
        opened = _opened(found, _BLOCKING, _ASYNC, "in an `async def` handler, await attempt.once()")
        opened.check()
        return bool(opened.run(self._writer(queue, job_id)))

    def _writer(self, queue: str, job_id: str) -> _Write:
        check_text(job_id, job_id)

        def write(*, numbered: bool, joined: bool) -> _Script:  # noqa: ARG001 - it is one statement
            sql = self._numbered if numbered else re.sub(r"\$\d", "%s", self._numbered)
            return self._script(sql, (queue, job_id, float(self._keep_s)))

        return write

    def _script(self, sql: str, arguments: Sequence[Any]) -> _Script:
        # no savepoint: after an error the handler fails, and its transaction with it
        try:
            first = yield sql, arguments
        except Exception as error:
            cause = _drivers(error)
            if _sqlstate(cause) in _NOT_THERE:
                msg = (
                    f"the database of connection= hasn't the inbox of the schema {self._schema!r} ({said_by(cause)}): pass a connection to"
                    " the app's database, or run `leveret migrate` with the app, such as shop:app"
                )
                raise InvalidJob(msg) from cause
            raise
        return first


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


def _sqlstate(error: BaseException) -> str | None:
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return state if isinstance(state, str) else None


def _drivers(error: Exception) -> Exception:
    """Return the driver's own error: Django and SQLAlchemy put it into theirs. SQLAlchemy's text would show the jobs."""
    inner: BaseException | None = error
    while isinstance(inner, Exception) and _sqlstate(inner) is None:
        inner = getattr(inner, "orig", None) or inner.__cause__
    if isinstance(inner, Exception):
        return inner
    return getattr(error, "orig", None) or error


def _is_of_library(error: BaseException) -> bool:
    return isinstance(error, OSError) or bool(
        _libraries(error) & {"asyncpg", "psycopg", "psycopg2", "sqlalchemy", "django"}
    )


def _libraries(one: object) -> set[str]:
    """Return the names of the packages that the object's classes come from."""
    return {kind.__module__.partition(".")[0] for kind in type(one).__mro__}


def _run(script: _Script, execute: Callable[[str, Sequence[Any]], object]) -> Any:
    """Execute the statements of a script, and return what it returns."""
    try:
        step = next(script)
        while True:
            try:
                value = execute(*step)
            except BaseException as error:  # noqa: BLE001 - the script raises what it means
                step = script.throw(error)
            else:
                step = script.send(value)
    except StopIteration as ended:
        return ended.value


async def _run_async(
    script: _Script, execute: Callable[[str, Sequence[Any]], Awaitable[object]], deadline: float
) -> Any:
    try:
        step = next(script)
        while True:
            try:
                limit_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic()) + _ANSWER_S
                async with asyncio.timeout(limit_s):
                    value = await execute(*step)
            except BaseException as error:  # noqa: BLE001 - the script raises what it means
                step = script.throw(error)
            else:
                step = script.send(value)
    except StopIteration as ended:
        return ended.value


def _has(one: object, member: str) -> bool:
    return getattr(type(one), member, None) is not None


def _awaits(one: object, member: str) -> bool:
    return inspect.iscoroutinefunction(getattr(type(one), member, None))


class _Connection(ABC):
    """A connection of one library."""

    library: ClassVar[str]
    name: ClassVar[str]
    """Its name for users."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @classmethod
    @abstractmethod
    def fits(cls, one: Any) -> bool:
        """Return whether `one`, an object of the library, is such a connection."""

    @abstractmethod
    def problem(self) -> str | None:
        """Return why nothing can be published on it; None if something can. Sends nothing."""

    def check(self) -> None:
        """Raise InvalidJob if nothing can be published on it."""
        try:
            problem = self.problem()
        except Exception as error:  # noqa: BLE001 - what the library says of a connection that is gone
            problem = f"can't be used: {redact(said_by(error))}"
        _check(problem)


class _AsyncConnection(_Connection):
    """One of an asynchronous library."""

    @abstractmethod
    async def run(self, write: _Write, deadline: float) -> Any:
        """Execute the statements, and return what their script returns."""


class _BlockingConnection(_Connection):
    """One of a blocking library."""

    @abstractmethod
    def run(self, write: _Write) -> Any:
        """Execute the statements, and return what their script returns."""


class _Asyncpg(_AsyncConnection):
    library = "asyncpg"
    name = "asyncpg's connection"

    @classmethod
    def fits(cls, one: Any) -> bool:
        return _has(one, "is_in_transaction")

    def problem(self) -> str | None:
        if self._connection.is_closed():
            return _CLOSED
        return (
            None if self._connection.is_in_transaction() else _OUTSIDE.format("`async with connection.transaction():`")
        )

    async def run(self, write: _Write, deadline: float) -> Any:
        async def execute(sql: str, arguments: Sequence[Any]) -> object:
            run = self._connection.fetchval if arguments else self._connection.execute
            return await run(sql, *arguments, timeout=_NEVER_S)  # instead of its command_timeout

        return await _run_async(write(numbered=True, joined=True), execute, deadline)


class _Psycopg(_BlockingConnection):
    library = "psycopg"
    name = "psycopg's Connection"

    @classmethod
    def fits(cls, one: Any) -> bool:
        return _has(one, "set_autocommit") and not _awaits(one, "set_autocommit")

    def problem(self) -> str | None:
        return _psycopg_problem(self._connection, "`with connection.transaction():`")

    def run(self, write: _Write) -> Any:
        def execute(sql: str, arguments: Sequence[Any]) -> object:
            cursor = self._connection.cursor(row_factory=_rows)
            cursor.execute(sql, arguments or None)
            return cursor.fetchone()[0] if arguments else None

        return _run(write(numbered=False, joined=True), execute)


class _PsycopgAsync(_AsyncConnection):
    library = "psycopg"
    name = "psycopg's AsyncConnection"

    @classmethod
    def fits(cls, one: Any) -> bool:
        return _awaits(one, "set_autocommit")

    def problem(self) -> str | None:
        return _psycopg_problem(self._connection, "`async with connection.transaction():`")

    async def run(self, write: _Write, deadline: float) -> Any:
        async def execute(sql: str, arguments: Sequence[Any]) -> object:
            cursor = self._connection.cursor(row_factory=_rows)
            await cursor.execute(sql, arguments or None)
            return (await cursor.fetchone())[0] if arguments else None

        return await _run_async(write(numbered=False, joined=True), execute, deadline)


def _rows(_: object) -> type[tuple[Any, ...]]:
    """Return how psycopg makes rows, instead of the connection's own way."""
    return tuple


def _psycopg_problem(connection: Any, open_one: str) -> str | None:
    if connection.closed:
        return _CLOSED
    if connection.pgconn.pipeline_status:
        return "is in pipeline mode, where the result of a statement isn't known: leave it first"
    status = connection.info.transaction_status.name
    if status == "INERROR":
        return _FAILED
    if status == "ACTIVE":
        return _BUSY
    return _OUTSIDE.format(open_one) if status == "IDLE" and connection.autocommit else None


class _Sqlalchemy(_BlockingConnection):
    library = "sqlalchemy"
    name = "SQLAlchemy's Connection or Session"

    @classmethod
    def fits(cls, one: Any) -> bool:
        return _has(one, "in_transaction") and _has(one, "commit") and not _awaits(one, "commit")

    def problem(self) -> str | None:
        return _sqlalchemy_problem(self._connection)

    def run(self, write: _Write) -> Any:
        return _run_sqlalchemy(self._connection, write)


class _SqlalchemyAsync(_AsyncConnection):
    library = "sqlalchemy"
    name = "SQLAlchemy's AsyncConnection or AsyncSession"

    @classmethod
    def fits(cls, one: Any) -> bool:
        return _has(one, "in_transaction") and _awaits(one, "commit")

    def problem(self) -> str | None:
        one = self._connection
        return _sqlalchemy_problem(one.sync_session if hasattr(one, "sync_session") else one.sync_connection)

    async def run(self, write: _Write, deadline: float) -> Any:
        # its own time-out ends the connection, so it comes only where the server gives no answer
        limit_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic()) + 2 * _ANSWER_S
        async with asyncio.timeout(limit_s):
            return await self._connection.run_sync(_run_sqlalchemy, write)


def _sqlalchemy_problem(one: Any) -> str | None:
    """Return what is wrong with a Connection or a Session."""
    if one is None or getattr(one, "closed", False):
        return _CLOSED
    if getattr(one, "invalidated", False) or not getattr(one, "is_active", True):
        return _FAILED
    bind = one if hasattr(one, "exec_driver_sql") else one.get_bind()
    if bind.dialect.name != "postgresql":
        return f"is of {bind.dialect.name}: the jobs are in PostgreSQL"
    if bind is one and one.connection.dbapi_connection.autocommit:
        return _OUTSIDE.format("`begin()` on a connection that isn't in AUTOCOMMIT")
    return None


def _run_sqlalchemy(one: Any, write: _Write) -> Any:
    """Execute the statements on a Connection, or on that of a Session."""
    connection = one
    if not hasattr(one, "exec_driver_sql"):
        connection = one.connection()
        _check(_sqlalchemy_problem(connection))

    def execute(sql: str, arguments: Sequence[Any]) -> object:
        result = connection.exec_driver_sql(sql, tuple(arguments))
        value = result.scalar() if arguments else None
        result.close()
        return value

    return _run(write(numbered=connection.dialect.paramstyle == "numeric_dollar", joined=False), execute)


class _Django(_BlockingConnection):
    library = "django"
    name = "Django's connection or its alias"

    @classmethod
    def fits(cls, one: Any) -> bool:
        return hasattr(one, "in_atomic_block")

    def problem(self) -> str | None:
        one = self._connection
        if one.vendor != "postgresql":
            return f"is of {one.vendor}: the jobs are in PostgreSQL"
        if one.needs_rollback:
            return _FAILED
        return (
            None if one.in_atomic_block or not one.get_autocommit() else _OUTSIDE.format("`with transaction.atomic():`")
        )

    def run(self, write: _Write) -> Any:
        with self._connection.cursor() as cursor:

            def execute(sql: str, arguments: Sequence[Any]) -> object:
                cursor.execute(sql, arguments or None)
                return cursor.fetchone()[0] if arguments else None

            return _run(write(numbered=False, joined=True), execute)


def _django_alias(alias: str) -> Any:
    """Return Django's connection of this thread."""
    django = sys.modules.get("django.db")
    if django is None or alias not in django.connections.settings:
        known = (
            "Django isn't in use" if django is None else f"DATABASES has only {', '.join(django.connections.settings)}"
        )
        msg = f"connection={alias!r:.80} is an alias of a database of Django, and {known}"
        raise InvalidJob(msg)
    return django.connections[alias]


_ASYNC: Final = (_Asyncpg, _PsycopgAsync, _SqlalchemyAsync)
_BLOCKING: Final = (_Psycopg, _Sqlalchemy, _Django)
_IN_ASYNC: Final = (
    "in blocking code, publish with app.blocking_publisher(), and in a `def` handler with attempt.publish_blocking()"
)
_IN_BLOCKING: Final = (
    "in async code, publish with app.publisher(), and in an `async def` handler with attempt.publish()"
)

_K = TypeVar("_K", bound=_Connection)


def _opened(given: object, kinds: Sequence[type[_K]], others: Sequence[type[_Connection]], for_others: str) -> _K:
    """Return the connection of a library; InvalidJob if it isn't one."""
    libraries = _libraries(given)
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


def _check(problem: str | None) -> None:
    if problem is not None:
        msg = f"connection= {problem}"
        raise InvalidJob(msg)
