"""Tracebacks that show a user's lines: they begin at the first frame that belongs neither to leveret nor to the machinery below it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterable
from concurrent import futures
from types import CodeType, FrameType, TracebackType
from typing import TypeAlias

from .texts import is_ours

ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType | None]
Place: TypeAlias = tuple[type[BaseException], str, int]
"""The class of an error, and a file and line."""

_MACHINERY = tuple(os.path.join(os.path.dirname(file), "") for file in (asyncio.__file__, futures.__file__))  # noqa: PTH118, PTH120 - pathlib drops the separator
_CAUSES = 5
"""How far `place_of` follows causes, which may form a circle."""


def is_users(frame: FrameType) -> bool:
    """Whether the frame's code belongs to a user or to a user's library."""
    file = frame.f_code.co_filename
    return not is_ours(file) and not file.startswith(_MACHINERY)


def exc_info(error: BaseException) -> ExcInfo:
    """Return `error` as the `exc_info` of a log record, with a traceback that begins at the first user's frame.

    The errors that led to `error` are changed: their tracebacks begin there, too. A record has no other place for those.
    """
    _trim_causes(error)
    whole = error.__traceback__
    trace = _from_users(whole)
    if trace is None and not _has_cause(
        error
    ):  # raised by leveret, and no cause leads further: keep the line that raised
        trace = whole
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
    return type(error), error, trace


def _has_cause(error: BaseException) -> bool:
    try:
        return error.__cause__ is not None
    except Exception:  # noqa: BLE001 - a property of the user's class
        return False


def show_users_frames(error: BaseException) -> None:
    """Leave only the users' frames in the traceback of an error that leaves leveret: the others say nothing about the mistake."""
    _trim_causes(error)
    frames: list[TracebackType] = []
    trace = error.__traceback__
    while trace is not None:
        if is_users(trace.tb_frame):
            frames.append(trace)
        trace = trace.tb_next
    for one in reversed(frames):
        trace = TracebackType(trace, one.tb_frame, one.tb_lasti, one.tb_lineno)
    error.__traceback__ = trace


def place_of(info: ExcInfo) -> Place:
    """Return the class of an error and the file and line of its innermost user's frame: the same for errors that are alike.

    An error without such a frame, such as the one of a `Timeout`, has the place of its cause.
    """
    kind, error, trace = info
    for _ in range(_CAUSES):
        file, line = "", 0
        while trace is not None:
            if is_users(trace.tb_frame):
                file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
            trace = trace.tb_next
        if file or error.__cause__ is None:
            return kind, file, line
        error = error.__cause__
        trace = error.__traceback__
    return kind, "", 0


def at(frames: Iterable[FrameType]) -> TracebackType | None:
    """Return a traceback that shows where code is now, from its running frames, outermost first."""
    trace: TracebackType | None = None
    for frame in reversed(list(frames)):
        trace = TracebackType(trace, frame, frame.f_lasti, frame.f_lineno)
    return trace


def at_thread(code: CodeType, name: str, value: object) -> TracebackType | None:
    """Return a traceback of the thread that runs `code` with `value` in its local variable `name`, from the call below `code` on."""
    for innermost in sys._current_frames().values():  # pyright: ignore[reportPrivateUsage] - Python documents it
        frame: FrameType | None = innermost
        below: list[FrameType] = []
        while frame is not None:
            if frame.f_code is code and frame.f_locals.get(name) is value:
                return at(reversed(below))
            below.append(frame)
            frame = frame.f_back
    return None


def _from_users(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and not is_users(trace.tb_frame):
        trace = trace.tb_next
    return trace


def _trim_causes(error: BaseException) -> None:
    with contextlib.suppress(Exception):  # a class of the user may refuse anything; its traceback is then longer
        _trim(error)


def _trim(error: BaseException) -> None:
    seen, left = {id(error)}, [error]
    while left:
        one = left.pop()
        grouped: tuple[BaseException, ...] = one.exceptions if isinstance(one, BaseExceptionGroup) else ()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        for led in (one.__cause__, one.__context__, *grouped):
            if led is not None and id(led) not in seen:
                seen.add(id(led))
                BaseException.with_traceback(led, _from_users(led.__traceback__))  # also of a frozen dataclass
                left.append(led)
