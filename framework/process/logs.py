"""How leveret's own processes print their logs: a line each, to standard error."""

from __future__ import annotations

import copy
import logging
import os
import sys

from ..errors import ConfigurationError, LeveretError
from ..settings import redact

LEVELS = ("debug", "info", "warning", "error", "critical")
_FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s %(message)s"
_USERS = "leveret.job"
"""The logger behind `Attempt.log`: what a handler says there is its own affair."""
_REPORT_BYTES = 512
"""Most of one report: a write of up to so many bytes isn't torn by another process's (POSIX's PIPE_BUF)."""


def one_line(text: str) -> str:
    """Return `text` on one line, without control characters: what came over a wire must not move the cursor, nor forge a line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))


class _OneLine(logging.Formatter):
    """Passwords in URLs hidden; a record of leveret's own on one line, its traceback at debug level only, or where it is a bug."""

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
    """Print records of `level` and above, whatever was said here before; leaves a program's own logging set-up alone."""
    if level.lower() not in LEVELS:
        msg = f"the log level (LEVERET_LOG, --log-level) is one of {', '.join(LEVELS)}, not {level!r}"
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
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it says again, in tracebacks, what we say in a line


def report_error(error: LeveretError, report: int | None = None) -> int:
    """Print an error as one line (its traceback at debug level), a configuration's to `report` if given; return the exit code."""
    line = f"leveret: {redact(' '.join(str(error).split()))}"
    wrong = isinstance(error, ConfigurationError)
    if wrong and report is not None:
        os.write(report, line.encode(errors="replace")[: _REPORT_BYTES - 1] + b"\n")
    else:
        print(line, file=sys.stderr)  # noqa: T201 - a terminal's line
    logging.getLogger("leveret").debug("where it comes from", exc_info=error)
    return 2 if wrong else 1
