"""How leveret's own processes print their logs: one line per record, to standard error."""

from __future__ import annotations

import copy
import logging
import os
import sys

from ..errors import ConfigurationError, LeveretError
from ..settings import redact
from .streams import tell

LEVELS = ("debug", "info", "warning", "error", "critical")
_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s %(message)s"
_USERS = "leveret.job"
"""The logger behind `Attempt.log`. A handler's records are printed unchanged, except passwords in URLs."""
_REPORT_BYTES = 512
"""Largest report, bytes: POSIX keeps a pipe write of up to PIPE_BUF, which is at least 512, in one piece."""


def one_line(text: str) -> str:
    """Return `text` on one line, without control characters: received text must not move the cursor or forge a log line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))


class _OneLine(logging.Formatter):
    """Hides passwords in URLs, and prints leveret's own records on one line.

    The traceback of such a record is printed at debug level, or if the record is critical.
    """

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__(_FORMAT)
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        own = record.name.startswith("leveret.") and not record.name.startswith(_USERS)
        if not own or self._tracebacks or record.levelno >= logging.CRITICAL:
            return redact(super().format(record))
        bare = copy.copy(record)
        bare.exc_info = bare.exc_text = bare.stack_info = None
        return redact(one_line(super().format(bare)))


def set_up_logs(level: str) -> None:
    """Print records of `level` and above; a second call replaces the level. A program's own logging set-up stays."""
    if level.lower() not in LEVELS:
        msg = f"the log level (LEVERET_LOG, --log-level) must be one of {', '.join(LEVELS)}, not {level!r}"
        raise ConfigurationError(msg)
    root = logging.getLogger()
    if any(not isinstance(handler.formatter, _OneLine) for handler in root.handlers):
        return
    root.handlers.clear()
    debug = level.lower() == "debug"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(tracebacks=debug))
    root.addHandler(handler)
    root.setLevel(level.upper())
    if not debug:
        # asyncio repeats with tracebacks what leveret logs in one line
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def report_error(error: LeveretError, report: int | None = None) -> int:
    """Print an error as one line, its traceback at debug level; return the exit code.

    A configuration error goes to the file descriptor `report`, if given, instead of standard error.
    """
    line = f"leveret: {redact(' '.join(str(error).split()))}"
    wrong = isinstance(error, ConfigurationError)
    if wrong and report is not None:
        os.write(report, line.encode(errors="replace")[: _REPORT_BYTES - 1] + b"\n")
    else:
        tell(line)
    logging.getLogger("leveret").debug("traceback of the error", exc_info=error)
    return 2 if wrong else 1
