"""A job store for tests of what uses one: it remembers each call, and answers as the test says."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from leveret.errors import StoreUnavailable
from leveret.store import Change, Key, Progress, Verdict

Answer = Callable[[], Awaitable[None]]


async def at_once() -> None:
    """Answer at once."""


async def down() -> None:
    """Answer as a store that can't be reached."""
    msg = "nobody listens at tests://store"
    raise StoreUnavailable(msg)


class Answering:
    """A store that answers as `answer` does; `hangs` is an answer that comes when `goes_on` is set."""

    what = "tests://store"

    def __init__(self) -> None:
        self.answer: Answer = at_once
        self.verdicts: dict[str, Verdict] = {}
        self.refused: set[str] = set()
        self.asked_for: list[Key] = []
        self.writes: list[list[Change | Progress]] = []
        self.begins: list[list[Change]] = []
        self.trims = 0
        self.old = 0
        """Records whose time is over."""
        self.calls = 0
        self.goes_on = asyncio.Event()

    async def hangs(self) -> None:
        """Answer when the test says so."""
        await self.goes_on.wait()

    @property
    def written(self) -> list[tuple[str, str]]:
        """Job and state of each change that was written."""
        return [(each.job_id, each.state) for batch in self.writes for each in batch if isinstance(each, Change)]

    async def _called(self) -> None:
        self.calls += 1
        await self.answer()

    async def write(self, changes: Sequence[Change | Progress], /) -> None:
        """Take the changes, unless one is refused."""
        await self._called()
        if any(each.job_id in self.refused for each in changes):
            msg = "a store's fault"
            raise ValueError(msg)
        self.writes.append(list(changes))

    async def begin(self, changes: Sequence[Change], /) -> Sequence[Verdict]:
        """Answer with the verdicts of the test; "go" without one."""
        await self._called()
        if any(each.job_id in self.refused for each in changes):
            msg = "a store's fault"
            raise ValueError(msg)
        self.begins.append(list(changes))
        return [self.verdicts.get(each.job_id, "go") for each in changes]

    async def newest(self, job_ids: Sequence[str], /) -> Sequence[Key | None]:
        """Know nothing."""
        await self._called()
        return [None] * len(job_ids)

    async def asked(self, keys: Sequence[Key], /) -> Sequence[Key]:
        """Return what the test asks to end."""
        await self._called()
        return [key for key in keys if key in self.asked_for]

    async def trim(self, at_most: int, /) -> int:
        """Delete, and count the calls."""
        self.trims += 1
        deleted = min(at_most, self.old)
        self.old -= deleted
        return deleted

    def __getattr__(self, name: str) -> Any:
        msg = f"nothing here calls {name}"
        raise AssertionError(msg)
