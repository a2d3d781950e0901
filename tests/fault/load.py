"""A steady load on a bench while a fault strikes, and its counts: published, confirmed, run, lost, repeated."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

from leveret import PublishError
from tests.fault.bench import Bench, eventually


@dataclass(frozen=True)
class Counts:
    """What became of the jobs of a load."""

    published: int
    confirmed: int
    run: int
    lost: int  # confirmed and never run
    repeated: int  # runs beyond the first of each job
    strange: int  # runs of ids that nobody published
    silence_s: float  # the longest time in which no job ended
    late_s: float  # by how much the slowest publish missed its deadline; negative: each had its answer in time

    def __str__(self) -> str:
        return (
            f"published {self.published}, confirmed {self.confirmed}, run {self.run}, lost {self.lost},"
            f" repeated {self.repeated}; longest silence {self.silence_s:.1f} s"
        )


class Load:
    """Publishes `rate` jobs a second, each by itself, until the block ends; then waits until each confirmed one has run for `seconds`.

    With `losing` it waits for none: the broker doesn't promise to have them all.
    """

    def __init__(
        self, bench: Bench, *, rate: float = 100, seconds: float = 0.05, timeout_s: float = 5, losing: bool = False
    ) -> None:
        self.confirmed: set[str] = set()
        self.refused: Counter[str] = Counter()
        self._bench = bench
        self._rate = rate
        self._seconds = seconds
        self._timeout_s = timeout_s
        self._losing = losing
        self._ids: list[str] = []
        self._slowest_s = 0.0
        self._over = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._publishing = asyncio.create_task(self._publish())
        await self._bench.until_lines("end", int(self._rate))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)
            return
        await self._publishing
        if self._losing:
            return
        await eventually(
            lambda: self.confirmed <= set(self._bench.recorder.ids("end")),
            lambda: f"{self.counts()}; refused: {self.refused}; workers: {self._bench.logs}",
            timeout_s=60,
            every_s=0.5,
        )

    def counts(self, *, since: float = 0) -> Counts:
        """Return the counts so far; the silence is looked for after `since`, of the machine's monotonic clock."""
        runs = Counter(self._bench.recorder.ids("start"))
        ended = sorted(float(words[4]) for words in self._bench.recorder.lines("end"))
        return Counts(
            published=len(self._ids),
            confirmed=len(self.confirmed),
            run=len(runs),
            lost=len(self.confirmed - set(runs)),
            repeated=sum(runs.values()) - len(runs),
            strange=len(set(runs) - set(self._ids)),
            silence_s=max((late - early for early, late in pairwise(ended) if late > since), default=0),
            late_s=self._slowest_s - self._timeout_s,
        )

    async def _publish(self) -> None:
        prefix, began = f"load-{time.monotonic_ns()}", time.monotonic()
        async with self._bench.app.publisher() as self._publisher, asyncio.TaskGroup() as tasks:
            while not self._over.is_set():
                due = began + len(self._ids) / self._rate
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                self._ids.append(f"{prefix}-{len(self._ids)}")
                tasks.create_task(self._one(self._ids[-1]))

    async def _one(self, job_id: str) -> None:
        began = time.monotonic()
        try:
            await self._publisher.publish(
                self._bench.recorder.Note(self._seconds), job_id=job_id, timeout_s=self._timeout_s
            )
            self.confirmed.add(job_id)
        except PublishError as error:
            self.refused[type(error).__name__] += 1
        self._slowest_s = max(self._slowest_s, time.monotonic() - began)
