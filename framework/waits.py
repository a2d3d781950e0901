"""Waiting for the first of several events."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


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
