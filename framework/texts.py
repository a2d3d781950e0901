"""What errors say, in text that can be written anywhere: on one line of a log, into a header, as JSON."""

from __future__ import annotations

import os
from types import TracebackType

_OURS = os.path.join(os.path.dirname(__file__), "")  # noqa: PTH118, PTH120 - pathlib drops the separator, and with it `leveret_shop` would be ours


def one_line(text: str) -> str:
    """Return `text` on one line, half surrogate pairs written out: one happening is one log line, and must be encodable."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def said_by(error: BaseException) -> str:
    """Return what an exception says, a user's with a `__str__` of its own included, on one line."""
    try:
        return one_line(str(error))
    except Exception:  # noqa: BLE001 - a user's __str__
        return "its text can't be shown: its __str__ raises"


def named(error: BaseException) -> str:
    """Return class and text of an exception, on one line, 500 characters at most."""
    name, text = type(error).__qualname__, said_by(error)
    return (f"{name}: {text}" if text else name)[:500]


def is_ours(file: str) -> bool:
    """Whether source `file` is of this package: its lines tell a user nothing."""
    return file.startswith(_OURS)


def below_ours(whole: TracebackType | None) -> TracebackType | None:
    """Return a traceback without leveret's frames before the first other one: they are the same each time, and each takes 15 µs to print."""
    rest = whole
    while rest is not None and is_ours(rest.tb_frame.f_code.co_filename):
        rest = rest.tb_next
    return rest or whole
