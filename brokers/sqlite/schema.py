"""What stands in the SQLite file, how it is opened, and how a row becomes an envelope."""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeAlias

from leveret.envelope import Envelope
from leveret.errors import ConfigurationError
from leveret.headers import pack_headers, unpack_headers
from leveret.job import Priority

log = logging.getLogger("leveret.sqlite")

MIN_SQLITE = (3, 35)
"""The first with RETURNING."""
APPLICATION_ID: Final = 0x6C767274
"""Says in the file's header that it is ours ("lvrt")."""
BUSY_MS: Final = 20
"""How long one try waits for a lock, milliseconds; between tries, deadlines are looked at."""
_WAL_KEPT_BYTES = 64 << 20

_PLACE = "seq INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, level TEXT NOT NULL"
_FIELDS = (
    "job_id TEXT NOT NULL, job TEXT NOT NULL, content_type TEXT NOT NULL, content_encoding TEXT, body BLOB NOT NULL,"
    " created_s INTEGER NOT NULL, app TEXT, correlation_id TEXT, reply_to TEXT, headers TEXT"
)
# Each brings a file from one version to the next; what a release has shipped is never changed. A job's place in its level is its
# `seq`; one that waits for its time has `due_ms`, and gets a new `seq` when that has come. `deliveries` counts those of this row.
_VERSIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE queues (name TEXT PRIMARY KEY) WITHOUT ROWID",
        "CREATE TABLE workers (id INTEGER PRIMARY KEY AUTOINCREMENT, identity TEXT NOT NULL, beat INTEGER NOT NULL DEFAULT 0)",
        f"CREATE TABLE jobs ({_PLACE}, due_ms INTEGER, {_FIELDS}, claimed_by INTEGER, deliveries INTEGER NOT NULL DEFAULT 0)",
        "CREATE INDEX jobs_ready ON jobs (queue, level) WHERE claimed_by IS NULL AND due_ms IS NULL",
        "CREATE INDEX jobs_delayed ON jobs (due_ms, queue, level) WHERE due_ms IS NOT NULL",
        "CREATE INDEX jobs_claimed ON jobs (claimed_by, queue) WHERE claimed_by IS NOT NULL",
        f"CREATE TABLE dead ({_PLACE}, buried_ms INTEGER, {_FIELDS}, claimed_by INTEGER)",
        "CREATE INDEX dead_queue ON dead (queue)",
        "CREATE INDEX dead_claimed ON dead (claimed_by) WHERE claimed_by IS NOT NULL",
    ),
)

_COLUMNS = "queue, level, {}, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to, headers"
Row: TypeAlias = tuple[
    str, str, int | None, str, str, str, str | None, bytes, int, str | None, str | None, str | None, str | None
]  # fmt: skip
BODY: Final = 7
"""Where the body stands in a `Row`."""
READ: Final = "queue, level, job_id, job, content_type, content_encoding, CAST(body AS BLOB), created_s, app, correlation_id, reply_to, headers"
"""What `unpack` reads; a body that a foreign producer wrote as text comes as its bytes."""


def text_or_bytes(value: bytes) -> str | bytes:
    """Return a text column's value, as its bytes where it isn't UTF-8: Python would raise, and one such row stop the whole file."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _inserts(table: str, when: str) -> tuple[tuple[int, str], ...]:
    # One statement for many rows: between two statements the thread would have to wait for the interpreter's lock each time.
    row = f"({', '.join('?' * (_COLUMNS.count(',') + 1))})"
    start = f"INSERT INTO {table} ({_COLUMNS.format(when)}) VALUES "  # noqa: S608 - columns of ours
    return tuple((count, start + ", ".join([row] * count)) for count in (64, 8, 1))


INSERTS: Final = {"jobs": _inserts("jobs", "due_ms"), "dead": _inserts("dead", "buried_ms")}
"""By table: statements that insert so many rows, most first."""


_NOT_JSON: dict[str, tuple[type, Callable[[Any], str], Callable[[str], object]]] = {
    "$bytes": (bytes, lambda value: base64.b64encode(value).decode(), base64.b64decode),
    "$datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "$decimal": (Decimal, str, Decimal),
}  # what a foreign producer's headers may hold beside what JSON has


def _to_json(value: object) -> object:
    if isinstance(value, bytearray):
        value = bytes(value)
    for name, (kind, write, _) in _NOT_JSON.items():
        if isinstance(value, kind):
            return {name: write(value)}
    msg = f"a header holds {value!r:.80}, which can't be stored"
    raise TypeError(msg)


def _from_json(table: dict[str, Any]) -> Any:
    if len(table) == 1:
        [(name, value)] = table.items()
        if name in _NOT_JSON:
            return _NOT_JSON[name][2](value)
    return table


# The standard library's JSON, since it brings back NaN and lone surrogates as they were.
_encode = json.JSONEncoder(default=_to_json, separators=(",", ":")).encode
_decode = json.JSONDecoder(object_hook=_from_json).decode


def headers_text(table: Mapping[str, object]) -> str | None:
    """Return what stands in the column `headers` for a headers table as AMQP has it."""
    return _encode(dict(table)) if table else None


def pack(queue: str, envelope: Envelope, when_ms: int | None) -> Row:
    """Return the row of `envelope`; TypeError for a header that can't be stored."""
    return (
        queue, envelope.priority.value, when_ms, envelope.job_id, envelope.job, envelope.content_type, envelope.content_encoding,
        envelope.body, envelope.created_s, envelope.app, envelope.correlation_id, envelope.reply_to, headers_text(pack_headers(envelope)),
    )  # fmt: skip


def unpack(row: Sequence[Any]) -> tuple[Envelope, str | None]:
    """Return the envelope in a row of `READ`, and what is wrong with it, if anything."""
    fields: dict[str, Any] = {}
    problem = None
    (
        queue,
        level,
        job_id,
        job,
        content_type,
        content_encoding,
        body,
        created_s,
        app,
        correlation_id,
        reply_to,
        headers,
    ) = row
    # written out, since each job comes here: a loop takes three times as long
    if (
        type(job_id) is bytes or type(job) is bytes or type(content_type) is bytes or type(content_encoding) is bytes or type(app) is bytes
        or type(correlation_id) is bytes or type(reply_to) is bytes or type(headers) is bytes or type(level) is bytes
    ):  # fmt: skip
        row, problem = _readable(row)
        (
            queue,
            level,
            job_id,
            job,
            content_type,
            content_encoding,
            body,
            created_s,
            app,
            correlation_id,
            reply_to,
            headers,
        ) = row
    if headers is not None:
        try:
            fields, wrong = unpack_headers(_decode(headers))
            problem = problem or wrong
        except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            problem = problem or f"the headers can't be read: {error}"
    try:
        fields["priority"] = Priority(level)  # where it stands says more than a header
    except ValueError:
        problem = problem or f"its level {level!r:.80} is none of {', '.join(known.value for known in Priority)}"
    envelope = Envelope(
        job_id=job_id, job=job, queue=queue, body=body, content_type=content_type, content_encoding=content_encoding,
        created_s=created_s, app=app, correlation_id=correlation_id, reply_to=reply_to, **fields,
    )  # fmt: skip
    return envelope, problem


def _readable(row: Sequence[Any]) -> tuple[list[Any], str | None]:
    """Return a foreign producer's row with what isn't UTF-8 replaced, the body as it came; and what is wrong with it."""
    problem = None
    texts = list(row)
    for place, (name, value) in enumerate(zip(READ.split(", "), row, strict=True)):
        if isinstance(value, bytes) and "body" not in name:
            problem = problem or f"its column {name} is no UTF-8 text: {value!r:.80}"
            texts[place] = value.decode(errors="replace")
    return texts, problem


def open_file(path: str, *, create: bool) -> sqlite3.Connection:
    """Open the file and bring it to this release's schema.

    Raises:
        ConfigurationError: It can't be opened or isn't ours, and waiting wouldn't help.
        sqlite3.Error: It is locked or the disk fails, for now.
    """
    _check_path(path, create=create)
    try:
        connection = sqlite3.connect(path, timeout=BUSY_MS / 1000, isolation_level=None)
    except sqlite3.OperationalError as error:
        msg = f"the SQLite file {path} can't be opened: {error}"
        raise ConfigurationError(msg) from error
    try:
        _prepare(connection, path)
    except BaseException as error:
        connection.close()
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            msg = f"{path} is not a SQLite database"
            raise ConfigurationError(msg) from error
        if code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}:
            msg = f"the SQLite file {path} can't be written, or its folder can't: {error}"
            raise ConfigurationError(msg) from error
        raise
    return connection


def _may_write(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _check_path(path: str, *, create: bool) -> None:
    file = Path(path)
    if file.is_dir():
        problem = "is a folder"
    elif not file.parent.is_dir():
        problem = f"can't be made: there is no folder {file.parent}"
    elif not file.exists():
        if create and _may_write(file.parent):
            return
        problem = f"can't be made: the folder {file.parent} can't be written" if create else "doesn't exist"
    elif not _may_write(file):
        problem = "can't be written: it is read-only for this user"
    elif not _may_write(file.parent):
        problem = f"can't be used: its folder {file.parent} can't be written, where SQLite keeps the log beside it"
    else:
        return
    msg = f"the SQLite file {path} {problem}"
    raise ConfigurationError(msg)


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    def value(pragma: str) -> Any:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # works on an empty file only, and has to come first
    _check_ours(value, connection, path)
    if value("journal_mode = WAL") != "wal":
        msg = f"the file system of {path} can't do SQLite's write-ahead log; use a file on a local disk"
        raise ConfigurationError(msg)
    for setting in (
        "synchronous = FULL",
        "fullfsync = 1",
        "checkpoint_fullfsync = 1",
        f"journal_size_limit = {_WAL_KEPT_BYTES}",
    ):
        connection.execute(f"PRAGMA {setting}")
    if value("user_version") == len(_VERSIONS):
        return
    connection.execute("BEGIN IMMEDIATE")  # a failure closes the connection, which rolls back
    _check_ours(value, connection, path)
    for statements in _VERSIONS[value("user_version") :]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {len(_VERSIONS)}")
    connection.execute("COMMIT")
    _warn_of_network(path)


def _check_ours(value: Any, connection: sqlite3.Connection, path: str) -> None:
    if (
        value("application_id") != APPLICATION_ID
        and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    ):
        msg = f"{path} is another program's SQLite database; give leveret a file of its own"
        raise ConfigurationError(msg)
    version = value("user_version")
    if version > len(_VERSIONS) and value("application_id") == APPLICATION_ID:
        msg = f"{path} was written by a newer leveret (schema {version}, this one knows {len(_VERSIONS)}): upgrade leveret"
        raise ConfigurationError(msg)


_NETWORK = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "afs",
    "ceph",
    "gluster",
    "lustre",
    "fuse.sshfs",
    "fuse.gluster",
    "vboxsf",
    "prl_fs",
)


def _warn_of_network(path: str) -> None:
    try:
        mounts = [
            line.split()[1:3]
            for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
        ]
    except OSError:
        return  # not Linux: the documentation says it
    real = os.path.realpath(path)
    under = [(where, kind) for where, kind in mounts if real.startswith(where.rstrip("/") + "/")]
    kind = max(under, key=lambda mount: len(mount[0]))[1] if under else ""
    if kind.startswith(_NETWORK):
        log.warning(
            "%s is on a network file system (%s): SQLite's locks don't hold there, and jobs may be lost or run twice",
            path,
            kind,
        )


@functools.cache
def _identity(pid: int) -> str:
    try:
        own = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""
    number, _, rest = own.partition(" ")
    if number != str(pid):
        return ""  # this /proc shows another namespace
    return f"{boot} {namespace} {pid} {rest.rpartition(')')[2].split()[19]}"


def my_identity() -> str:
    """Return what tells this process from every other, so that its death can be seen: boot, namespace, number, start; "" off Linux."""
    return _identity(os.getpid())


def known_dead(identity: str) -> bool:
    """Whether the process of `identity` is certainly gone; False where that can't be told from here."""
    mine = my_identity().split()
    other = identity.split()
    if len(mine) != 4 or len(other) != 4 or mine[:2] != other[:2]:
        return False
    pid = int(other[2])
    try:
        os.kill(pid, 0)  # signal 0 touches nobody
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False  # hidden from this user
    return (
        fields[19] != other[3] or fields[0] in "ZX"
    )  # its number was given to another, or nobody has fetched its end yet
