"""Random transactions, and what must be in the database afterwards: `python -m tests.transactions.model [--count N] [--seed N]`.

A transaction writes orders and publishes jobs under the same numbers, in savepoints too, with refused publishes and failed statements
between. It ends by a commit, a rollback, an error or a lost connection. The orders and the jobs must then be the same, and exactly those
of the committed parts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count

from leveret import InvalidJob, Outgoing, PublishManyError
from tests.postgres.node import Node, Postgres, find_postgres
from tests.transactions.clients import CLIENTS, Client, Order, client, prepare, there

_A_CONNECTION = 50
"""Transactions of one connection, at most."""


class Undone(Exception):
    """Ends a block."""


class Transactions:
    """One stream of random transactions on one database, with one library after the other."""

    def __init__(self, seed: int, numbers: count[int]) -> None:
        self._random = random.Random(seed)
        self._numbers = numbers
        self.expected: list[int] = []
        """The numbers of the orders and jobs that must be there."""
        self.ran = 0

    async def run(self, url: str, names: Sequence[str], total: int) -> None:
        """Run transactions."""
        while self.ran < total:
            async with client(self._random.choice(names), url) as one:
                for _ in range(min(total - self.ran, self._random.randint(1, _A_CONNECTION))):
                    self.ran += 1
                    if not await self._transaction(one):
                        break

    async def _transaction(self, one: Client) -> bool:
        """Run a transaction; return False if the connection was lost."""
        done: list[int] = []
        dropped = False
        try:
            async with one.begin():
                for _ in range(self._random.randint(0, 4)):
                    await self._step(one, done, depth=0)
                end = self._random.random()
                if end < 0.05:
                    dropped = True
                    await one.drop()
                if end < 0.3:
                    raise Undone
        except Exception as error:
            if not (dropped or isinstance(error, Undone)):
                raise
        else:
            self.expected += done
        return not dropped

    async def _step(self, one: Client, done: list[int], depth: int) -> None:
        """Take one random step; `done` gets what it adds to its block."""
        what = self._random.choice(("publish", "publish", "many", "refused", "savepoint", "failed"))
        options = {"delay_s": 3600} if self._random.random() < 0.2 else {}
        if what == "publish":
            number = next(self._numbers)
            await one.order(number)
            await one.publish(Order(number), job_id=str(number), **options)
            done.append(number)
        elif what == "many":
            numbers = [next(self._numbers) for _ in range(self._random.randint(1, 5))]
            for number in numbers:
                await one.order(number)
            await one.publish_many([Outgoing(Order(number), job_id=str(number)) for number in numbers])
            done += numbers
        elif what == "refused":
            refused = Outgoing(Order(-1), job_id="with a \0")
            with suppress(PublishManyError):
                await one.publish_many([Outgoing(Order(-1), job_id="-1"), refused])
            with suppress(InvalidJob):
                await one.publish(Order(-1), job_id="-1", correlation_id="with a \0")
        elif depth < 3:
            inner: list[int] = []
            undo = what == "failed" or self._random.random() < 0.5
            with suppress(Undone):
                await self._savepoint(one, inner, depth, what, undo=undo)
            if not undo:
                done += inner

    async def _savepoint(self, one: Client, inner: list[int], depth: int, what: str, *, undo: bool) -> None:
        async with one.begin():
            for _ in range(self._random.randint(1, 3)):
                await self._step(one, inner, depth + 1)
            if what == "failed":
                with suppress(Exception):  # the library's own: the savepoint is broken, and rolled back
                    await one.execute("SELECT nothing FROM nowhere")
            if undo:
                raise Undone


async def check(url: str, seed: int, total: int, streams: int = 4) -> int:
    """Run `total` transactions in several streams at once, and compare; return how many jobs are there."""
    names, numbers = list(CLIENTS), count(1)
    others = [name for name in names if not name.startswith("django")]  # whose settings are those of the process
    made = [Transactions(seed + stream, numbers) for stream in range(streams)]
    async with asyncio.TaskGroup() as group:
        for place, one in enumerate(made):
            group.create_task(one.run(url, names if place == 0 else others, total // streams))
    expected = sorted(number for one in made for number in one.expected)
    for _ in range(100):  # a server that lost its client needs a moment
        ordered, jobs = await there(url)
        if ordered == expected:
            break
        await asyncio.sleep(0.05)
    assert ordered == expected, f"seed {seed}: the orders aren't those of the model"
    found = sorted(map(int, jobs))
    assert found == expected, (
        f"seed {seed}: missing {set(expected) - set(found)}, too many {set(found) - set(expected)}"
    )
    return len(found)


async def main(total: int, seed: int) -> None:
    """Run transactions on a server of its own, a thousand at a time."""
    found = find_postgres()
    server = found if isinstance(found, Postgres) else Node(found, conf={"fsync": "off", "full_page_writes": "off"})
    if isinstance(server, Node):
        await server.start()
    begun = time.monotonic()
    try:
        for part in range(0, total, 1000):
            async with server.database() as url:
                await prepare(url)
                jobs = await check(url, seed + part, min(1000, total - part))
            done = min(total, part + 1000)
            print(
                f"{done} of {total} transactions, {time.monotonic() - begun:.0f} s: {jobs} jobs in the last thousand, all as the model says"
            )
    finally:
        await server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    chosen = random.SystemRandom().randrange(1 << 30) if given.seed is None else given.seed
    print(f"seed {chosen}")
    sys.exit(asyncio.run(main(given.count, chosen)))
