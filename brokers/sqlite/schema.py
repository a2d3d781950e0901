"""The schema of the SQLite file: its tables, and how a file is opened and upgraded."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Any, Final

from leveret.errors import ConfigurationError

log = logging.getLogger("leveret.sqlite")

MIN_SQLITE = (3, 35)
"""The first version with RETURNING."""
APPLICATION_ID: Final = 0x6C767274
"""Marks the file as leveret's in its header ("lvrt")."""
BUSY_MS: Final = 20
"""How long one attempt waits for a lock, milliseconds; deadlines are checked between attempts."""
_WAL_KEPT_BYTES = 64 << 20

_PLACE = "seq INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, level TEXT NOT NULL"
_FIELDS = (
    "job_id TEXT NOT NULL, job TEXT NOT NULL, content_type TEXT NOT NULL, content_encoding TEXT, body BLOB NOT NULL,"
    " created_s INTEGER NOT NULL, app TEXT, correlation_id TEXT, reply_to TEXT, headers TEXT"
)
# of the job store: `stage` is the place of the state in a pass, see leveret.store.STAGES
_RECORD = (
    "job_id TEXT NOT NULL, publish INTEGER NOT NULL, queue TEXT NOT NULL, job TEXT NOT NULL, state TEXT NOT NULL,"
    " stage INTEGER NOT NULL, passes INTEGER NOT NULL, attempt INTEGER NOT NULL, created_ms INTEGER NOT NULL, started_ms INTEGER,"
    " at_ms INTEGER NOT NULL, keep_until_ms INTEGER NOT NULL, progress REAL, note TEXT NOT NULL DEFAULT '',"
    " asked INTEGER NOT NULL DEFAULT 0, content_type TEXT NOT NULL, error TEXT NOT NULL, reason TEXT NOT NULL, result BLOB, body BLOB"
)
# Each entry upgrades a file by one version; a released entry is never changed. A job's place in its level is its `seq`. A delayed
# job has `due_ms`, and gets a new `seq` when it is due. `deliveries` counts the deliveries of the row. `crashes` counts the
# workers that died after the job had begun; only after a first death is it noted, in `begun`, that a job begins.
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
    (
        "ALTER TABLE jobs ADD COLUMN begun INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0",
    ),
    (
        f"CREATE TABLE records (seq INTEGER PRIMARY KEY AUTOINCREMENT, {_RECORD}, UNIQUE (job_id, publish))",
        "CREATE INDEX records_keep ON records (keep_until_ms)",
    ),
)


def open_file(path: str, *, create: bool) -> sqlite3.Connection:
    """Open the file and bring it to this release's schema.

    Raises:
        ConfigurationError: The file can't be opened or isn't leveret's; waiting won't help.
        sqlite3.Error: The file is locked or the disk fails; waiting may help.
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
            msg = f"{path} isn't a SQLite database; name another file in the broker's URL"
            raise ConfigurationError(msg) from error
        if code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}:
            msg = f"the SQLite file {path} or its folder can't be written: {error}"
            raise ConfigurationError(msg) from error
        raise
    return connection


def empty() -> sqlite3.Connection:
    """Return a connection to a file in memory with the schema: what a file that isn't there yet holds."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statements in _VERSIONS:
        for statement in statements:
            connection.execute(statement)
    return connection


def _may_write(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _check_path(path: str, *, create: bool) -> None:
    file = Path(path)
    if file.is_dir():
        problem = "is a folder"
    elif not file.parent.is_dir():
        problem = f"can't be created: the folder {file.parent} doesn't exist"
    elif not file.exists():
        if create and _may_write(file.parent):
            return
        problem = f"can't be created: the folder {file.parent} can't be written" if create else "doesn't exist"
    elif not _may_write(file):
        problem = "can't be written: it is read-only for this user"
    elif not _may_write(file.parent):
        problem = f"can't be used: SQLite keeps its log beside it, and the folder {file.parent} can't be written"
    else:
        return
    msg = f"the SQLite file {path} {problem}"
    raise ConfigurationError(msg)


def _prepare(connection: sqlite3.Connection, path: str) -> None:
    def value(pragma: str) -> Any:
        return connection.execute(f"PRAGMA {pragma}").fetchone()[0]

    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # works only on an empty file, so it comes first
    _check_ours(value, connection, path)
    if value("journal_mode = WAL") != "wal":
        msg = f"the file system of {path} doesn't support SQLite's write-ahead log; use a file on a local disk"
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
        msg = f"{path} is another program's SQLite database; use a separate file for leveret"
        raise ConfigurationError(msg)
    version = value("user_version")
    if version > len(_VERSIONS) and value("application_id") == APPLICATION_ID:
        msg = f"{path} was written by a newer leveret (schema {version}, this one supports {len(_VERSIONS)}); upgrade leveret"
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
        return  # not Linux: only the documentation warns
    real = os.path.realpath(path)
    under = [(where, kind) for where, kind in mounts if real.startswith(where.rstrip("/") + "/")]
    kind = max(under, key=lambda mount: len(mount[0]))[1] if under else ""
    if kind.startswith(_NETWORK):
        log.warning(
            "%s is on a network file system (%s): SQLite's locks don't work there, and jobs may be lost or run twice",
            path,
            kind,
        )
