"""The texts of errors, in a form that fits everywhere: on one log line, in a header, in JSON."""

from __future__ import annotations

import os
import re

MOST = 2000
"""Most characters of `one_line`: an error may quote the whole document that it refuses."""
_OURS = os.path.join(os.path.dirname(__file__), "")  # noqa: PTH118, PTH120 - pathlib drops the separator, and `leveret_shop` would count as ours


def one_line(text: str) -> str:
    """Return `text` on one line, at most `MOST` characters, with half surrogate pairs escaped: an event is one log line, which must be encodable."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    return line if len(line) <= MOST else line[: MOST - 1] + "…"


def said_by(error: BaseException) -> str:
    """Return the message of an exception on one line, even if a user's `__str__` raises."""
    try:
        return one_line(str(error))
    except Exception:  # noqa: BLE001 - a user's __str__
        return "the message can't be shown: __str__ raises"


def named(error: BaseException) -> str:
    """Return the class and message of an exception on one line, at most 500 characters."""
    name, text = one_line(type(error).__qualname__), said_by(error)
    return (f"{name}: {text}" if text else name)[:500]


def why_failed(error: str, reason: str) -> str:
    """Return the last error of a job and the reason for its burial as one text. The one that quotes the other stands for both."""
    if reason in error:
        return error
    return reason if error in reason else f"{error}; {reason}"


_HANG = re.compile(r" *(?:\S.{0,14}? {2,}(?=\S))?")
"""The indent of a line, with the label after it if two spaces follow the label."""


def folded(text: str, width: int, indent: int = 4) -> str:
    """Return `text` with every line that is longer than `width` folded at words.

    What follows is aligned under the text after the line's label, or indented by `indent` more. A word is never broken: a
    longer one gets a line for itself.
    """
    return "\n".join(line if len(line) <= width else _folded(line, width, indent) for line in text.split("\n"))


def _folded(line: str, width: int, indent: int) -> str:
    from textwrap import fill

    found = _HANG.match(line)
    label = found.group() if found else ""
    hang = len(label) if label.strip() else len(label) + indent
    return fill(line, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)


def is_ours(file: str) -> bool:
    """Whether the source `file` belongs to this package, whose lines don't help a user."""
    return file.startswith(_OURS)
