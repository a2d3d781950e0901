"""handles → store: the ends that all handles of a process wait for, asked for together."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Sequence

import msgspec

from ..errors import StoreUnavailable
from ..store import Key, Record, Store
from ..texts import said_by
from ..waits import answer_of

FIRST_S = 0.02
"""The wait between the first two questions after a publish, seconds. Each further one is half as long again."""
LONGEST_S = 1.0
"""The longest wait between two questions after a publish, seconds."""
CALL_S = 5.0
"""The longest question, seconds: a store that hangs is asked again after that."""
AT_ONCE = 1000
"""The most publishes in one question: the answer has their results."""


def due_after(now: float, pace_s: float) -> float:
    """Return when to ask again, at most `pace_s` from now: at a time that publishes of about one age share."""
    grid_s = pace_s / 2
    return (now + pace_s) // grid_s * grid_s


class _Wait(msgspec.Struct, eq=False):
    """A publish whose end is waited for."""

    futures: list[asyncio.Future[Record]]
    """One for each handle that waits."""
    due: float = 0.0
    """When to ask for it next, `time.monotonic()` seconds."""
    pace_s: float = FIRST_S


class Waiter:
    """Waits for the ends of publishes, for all handles of one publisher or worker.

    A store that doesn't answer is asked again: only the end of the publish, or of the caller's patience, ends a wait.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waits: dict[Key, _Wait] = {}
        self._due: list[tuple[float, Key]] = []
        """A heap of when to ask for which publish; an entry whose time isn't the wait's is stale."""
        self._asker: asyncio.Task[None] | None = None
        self._woken: asyncio.Future[None] | None = None
        self._closed: str | None = None
        self.trouble = ""
        """Why the store didn't answer the last question; empty if it did."""
        store.watch(self._heard)

    async def ended(self, key: Key) -> Record:
        """Return the record of a publish once it has ended. Raises what the store raises, unless asking again may help."""
        if self._closed is not None:
            raise StoreUnavailable(self._closed)
        wait = self._waits.get(key)
        if wait is None:
            wait = self._waits[key] = _Wait([])
        wait.pace_s = FIRST_S
        self._ask_at(0.0, key, wait)
        future: asyncio.Future[Record] = asyncio.get_running_loop().create_future()
        wait.futures.append(future)
        try:
            return await future
        finally:
            wait.futures.remove(future)
            if not wait.futures and self._waits.get(key) is wait:
                del self._waits[key]

    def close(self, why: str) -> None:
        """End every wait, and each later one, with StoreUnavailable(`why`)."""
        self._closed = why
        if self._asker is not None:
            self._asker.cancel()
        self._fail(list(self._waits), StoreUnavailable(why))

    def _heard(self, keys: Sequence[Key]) -> None:
        """Ask at once for what the store says has ended."""
        for key in keys:
            if (wait := self._waits.get(key)) is not None:
                self._ask_at(0.0, key, wait)

    def _ask_at(self, due: float, key: Key, wait: _Wait) -> None:
        wait.due = due
        heapq.heappush(self._due, (due, key))
        if (
            self._asker is None or self._asker.done()
        ):  # done: cancelled before its first step, as all tasks of a program
            self._asker = asyncio.get_running_loop().create_task(self._ask_all())
        else:
            self._wake()

    async def _ask_all(self) -> None:
        try:
            await asyncio.sleep(
                0
            )  # all handles that come in this step of the loop share a question; an eager task begins in it
            while self._waits:
                if keys := self._take():
                    await self._ask(keys)
                else:
                    await self._sleep(self._due[0][0] - time.monotonic())
        finally:
            self._asker = None

    def _take(self) -> list[Key]:
        """Take the publishes to ask for now."""
        now, keys = time.monotonic(), list[Key]()
        while self._due and self._due[0][0] <= now and len(keys) < AT_ONCE:
            due, key = heapq.heappop(self._due)
            wait = self._waits.get(key)
            if wait is not None and wait.due == due:
                wait.due = -1.0  # taken: a second entry of the same time is stale
                keys.append(key)
        return keys

    async def _sleep(self, for_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        timer = loop.call_later(for_s, self._wake)
        try:
            await self._woken
        finally:
            timer.cancel()
            self._woken = None

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _ask(self, keys: list[Key]) -> None:
        try:
            records = await answer_of(self._store.ended(keys), CALL_S)
        except StoreUnavailable as error:
            self.trouble = said_by(error)
        except TimeoutError:
            self.trouble = f"the store {self._store.what} gave no answer within {CALL_S:g} s"
        except Exception as error:  # noqa: BLE001 - a wrong login, or a fault of the store: each caller hears of it
            self._fail(keys, error)
        else:
            self.trouble = ""
            for record in records:
                if (wait := self._waits.pop(record.key, None)) is not None:
                    for future in wait.futures:
                        if not future.done():
                            future.set_result(record)
        now = time.monotonic()
        for key in keys:
            if (wait := self._waits.get(key)) is not None and wait.due < 0:
                self._ask_at(due_after(now, wait.pace_s), key, wait)
                wait.pace_s = min(LONGEST_S, wait.pace_s * 1.5)

    def _fail(self, keys: Sequence[Key], error: Exception) -> None:
        for key in keys:
            if (wait := self._waits.pop(key, None)) is not None:
                for future in wait.futures:
                    if not future.done():
                        future.set_exception(error)
