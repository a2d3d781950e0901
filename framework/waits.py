"""Waiting for the first of several events, and for an answer that may never come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


async def first_of(*waits: Coroutine[Any, Any, Any] | asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Return when one of `waits` has ended, or after `timeout_s` (None: no time limit), and cancel the others.

    Raises the error of the wait that ended.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


async def answer_of(call: Coroutine[Any, Any, _T], within_s: float) -> _T:
    """Return what `call` returns; TimeoutError after `within_s`. The call is then cancelled, and nothing waits for its end."""
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait([task], timeout=within_s)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.add_done_callback(_forget)
            task.cancel()


def _forget(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # otherwise asyncio would log it
