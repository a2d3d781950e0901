"""How leveret's own processes print their logs, to standard error: in full in a pipe, short on a terminal."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
import time
from collections import deque
from typing import TextIO

import msgspec

from ..errors import ConfigurationError, LeveretError
from ..settings import redact
from ..texts import folded
from ..tracebacks import Place, place_of
from .streams import tell, width_of

LEVELS = ("debug", "info", "warning", "error", "critical")
_FULL = "%(asctime)s %(levelname)s %(process)d %(name)s %(message)s"
_USERS = "leveret.job"
"""The logger behind `Attempt.log`. A handler's records are printed behind the name of their job, otherwise unchanged except passwords in URLs."""
_REPORT_BYTES = 512
"""Largest report, bytes: POSIX keeps a pipe write of up to PIPE_BUF, which is at least 512, in one piece."""

STORM = 20
"""From this number of equal tracebacks within `STORM_S` on, the traceback is printed once per `STORM_S`."""
STORM_S = 60.0
_MOST_PLACES = 200
_COLOURS = {"DEBUG": 2, "INFO": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 31}
_UUID7 = re.compile(r"\b([0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3})-[0-9a-f]{4}-[0-9a-f]{12}\b(?: attempt 1(?=: ))?")
"""A job's id, of which the time and 12 random bits are kept, and a first attempt, which isn't worth its place."""


def one_line(text: str) -> str:
    """Return `text` on one line, without control characters: received text must not move the cursor or forge a log line."""
    return printable(" ".join(text.split()))


def printable(text: str, kept: str = "") -> str:
    """Return `text` with control characters replaced, except those in `kept`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in kept else "\N{REPLACEMENT CHARACTER}" for char in text)


class _Alike(msgspec.Struct):
    """The latest tracebacks that are equal, in seconds of the monotonic clock."""

    times: deque[float] = msgspec.field(default_factory=lambda: deque(maxlen=STORM))
    printed: float = 0.0
    left_out: int = 0
    """How many weren't printed since `printed`."""


class Storms:
    """Decides which tracebacks are printed, so that a database that is away doesn't fill the disk with one traceback."""

    def __init__(self) -> None:
        self._alike: dict[Place, _Alike] = {}

    def left_out(self, place: Place, now: float) -> int | None:
        """Return how many tracebacks of `place` weren't printed since the last one; None if this one isn't printed either."""
        alike = self._alike.pop(place, _Alike())
        self._alike[place] = alike
        if len(self._alike) > _MOST_PLACES:
            del self._alike[next(iter(self._alike))]  # the one that came last is the oldest
        alike.times.append(now)
        storm = len(alike.times) == STORM and now - alike.times[0] <= STORM_S
        if storm and now - alike.printed < STORM_S:
            alike.left_out += 1
            return None
        left_out, alike.left_out, alike.printed = alike.left_out, 0, now
        return left_out


class _Full(logging.Formatter):
    """Hides passwords in URLs, and prints each of leveret's own records on one line.

    The traceback of a failed run follows its line. Other tracebacks follow at debug level, or if the record is critical. Their
    lines are indented, so that no text of an error can pass for a record.
    """

    def __init__(self, format: str = _FULL, times: str | None = None, *, debug: bool) -> None:
        super().__init__(format, times)
        self._debug = debug
        self._storms = Storms()

    def format(self, record: logging.LogRecord) -> str:
        if not record.name.startswith("leveret.") or record.name.startswith(_USERS):
            return redact(super().format(self._with_job(record)))
        bare = copy.copy(record)
        bare.exc_info = bare.exc_text = bare.stack_info = None
        note, below = self._traceback(record)
        line = self.line(one_line(super().format(bare)) + note)
        return redact("\n  ".join([line, *below]))

    def _with_job(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return a handler's record with its job in front, as in leveret's own records of the run."""
        fields = vars(record)
        if not record.name.startswith(_USERS) or not {"job", "job_id", "attempt"} <= fields.keys():
            return record
        named = copy.copy(record)
        job = one_line("job {job} {job_id} attempt {attempt}:".format(**fields))
        named.msg = self.ids(f"{job} ") + record.getMessage()
        named.args = None
        return named

    def line(self, line: str) -> str:
        """Return the line of one of leveret's own records as it is printed."""
        return line

    def ids(self, text: str) -> str:
        """Return `text` with its ids as they are printed."""
        return text

    def _traceback(self, record: logging.LogRecord) -> tuple[str, list[str]]:
        """Return what a record's line says of its traceback, and the lines of the traceback."""
        info, note, failed = record.exc_info, "", record.name == "leveret.attempt"
        if not info or info[0] is None or not (failed or self._debug or record.levelno >= logging.CRITICAL):
            return "", []
        if failed:
            left_out = self._storms.left_out(place_of(info), time.monotonic())
            if left_out is None:
                return " (same traceback as above)", []
            note = f" ({left_out} more since the last traceback like this)" if left_out else ""
        lines = self.formatException(info).expandtabs().splitlines()
        return note, [printable(line) for line in lines]


class _Short(_Full):
    """For a terminal: the time of day, the level in colour and the text, broken between words. Ids are shown by their unique beginning."""

    def __init__(self, stream: TextIO, number: int | None, *, debug: bool) -> None:
        process = "" if number is None else f"#{number} "
        super().__init__(f"%(asctime)s {process}%(levelname)s %(message)s", "%H:%M:%S", debug=debug)
        self._stream = stream
        self._coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def format(self, record: logging.LogRecord) -> str:
        text, level = super().format(record), record.levelname
        if not self._coloured:
            return text
        return text.replace(level, f"\x1b[{_COLOURS.get(level, 0)}m{level}\x1b[0m", 1)

    def line(self, line: str) -> str:
        text = self.ids(line)
        width = width_of(self._stream)
        return text if width is None else folded(text, width, indent=9)  # below the text behind the time

    def ids(self, text: str) -> str:
        return _UUID7.sub(r"\1", text)


def set_up_logs(level: str, number: int | None = None) -> None:
    """Print records of `level` and above; a second call replaces the level. A program's own logging set-up stays.

    `number` is the number of this process, if its terminal shows several.
    """
    if level.lower() not in LEVELS:
        msg = f"the log level (LEVERET_LOG, --log-level) must be one of {', '.join(LEVELS)}, not {level!r}"
        raise ConfigurationError(msg)
    root = logging.getLogger()
    if any(not isinstance(handler.formatter, _Full) for handler in root.handlers):
        return
    root.handlers.clear()
    debug = level.lower() == "debug"
    handler = logging.StreamHandler(sys.stderr)
    terminal = sys.stderr.isatty()
    handler.setFormatter(_Short(sys.stderr, number, debug=debug) if terminal else _Full(debug=debug))
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
