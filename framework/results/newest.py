"""ids → store: the newest publishes of the ids that all handles of a process look for, asked for together."""

from __future__ import annotations

import asyncio
from itertools import islice

from ..errors import StoreUnavailable
from ..store import Key, Store
from ..waits import answer_of

CALL_S = 5.0
"""The longest question, seconds."""
AT_ONCE = 1000
"""The most ids in one question."""


class Newest:
    """Finds the newest publish of an id, for all handles of one publisher or worker: one question is under way at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ids: dict[str, list[asyncio.Future[Key | None]]] = {}
        """Who looks for each id."""
        self._asker: asyncio.Task[None] | None = None
        self._closed: str | None = None

    async def of(self, job_id: str) -> Key | None:
        """Return the newest publish of an id, None if the store knows none. Raises what the store raises."""
        if self._closed is not None:
            raise StoreUnavailable(self._closed)
        future: asyncio.Future[Key | None] = asyncio.get_running_loop().create_future()
        self._ids.setdefault(job_id, []).append(future)
        if (
            self._asker is None or self._asker.done()
        ):  # done: cancelled before its first step, as all tasks of a program
            self._asker = asyncio.get_running_loop().create_task(self._ask_all())
        return await future

    def close(self, why: str) -> None:
        """End every search, and each later one, with StoreUnavailable(`why`)."""
        self._closed = why
        if self._asker is not None:
            self._asker.cancel()
        _fail(self._ids, StoreUnavailable(why))

    async def _ask_all(self) -> None:
        try:
            await asyncio.sleep(0)  # all that come in this step of the loop share a question
            while self._ids:
                await self._ask({job_id: self._ids.pop(job_id) for job_id in list(islice(self._ids, AT_ONCE))})
        finally:
            self._asker = None

    async def _ask(self, asked: dict[str, list[asyncio.Future[Key | None]]]) -> None:
        try:
            keys = await answer_of(self._store.newest(list(asked)), CALL_S)
        except TimeoutError:
            _fail(asked, StoreUnavailable(f"the store {self._store.what} gave no answer within {CALL_S:g} s"))
        except Exception as error:  # noqa: BLE001 - each caller hears of it
            _fail(asked, error)
        except BaseException:
            _fail(asked, StoreUnavailable("the publisher or worker of this handle has ended"))
            raise
        else:
            for futures, key in zip(asked.values(), keys, strict=True):
                for future in futures:
                    if not future.done():
                        future.set_result(key)


def _fail(asked: dict[str, list[asyncio.Future[Key | None]]], error: Exception) -> None:
    for futures in asked.values():
        for future in futures:
            if not future.done():
                future.set_exception(error)
