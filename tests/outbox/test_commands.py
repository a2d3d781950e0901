"""The commands that make, show and mend an outbox, as a shell runs them."""

import asyncio
import json
from pathlib import Path

import pytest

from leveret import Outgoing
from tests.cli.command import Project, Ran
from tests.outbox.shop import Shop, eventually
from tests.postgres.node import Postgres
from tests.rabbit.node import Rabbit

_APP = """
from leveret import App, Job, Queue

class Order(Job, name="order", queue=Queue("{queue}")):
    n: int
    text: str = ""

app = App("shop", broker="{broker}", outbox={outbox!r})

@app.handler
async def order(job: Order) -> None: ...
"""


class Folder(Project):
    """A folder with the app of a shop."""

    def __init__(self, folder: Path, shop: Shop, outbox: str | None) -> None:
        super().__init__(folder)
        self.write("shop.py", _APP.format(queue=shop.queue.name, broker=shop.app.broker_url(), outbox=outbox))

    async def leveret(self, *arguments: str, **environment: str) -> Ran:
        return await asyncio.to_thread(self.run, *arguments, **environment)


@pytest.fixture
def folder(tmp_path: Path, shop: Shop) -> Folder:
    return Folder(tmp_path, shop, shop.outbox)


async def test_migrate_covers_the_outbox(tmp_path: Path, rabbit: Rabbit, postgres: Postgres) -> None:
    """A deployment would go through, and the first order would fail."""
    async with postgres.database() as url:
        folder = Folder(tmp_path, Shop(rabbit.url, url), None)
        behind = await folder.leveret("migrate", "shop:app", "--check", LEVERET_OUTBOX=url)
        done = await folder.leveret("migrate", "shop:app", LEVERET_OUTBOX=url)
        again = await folder.leveret("migrate", "shop:app", "--check", LEVERET_OUTBOX=url)

    assert behind.code == 2
    assert "0002_outbox" in behind.err
    assert done.code == 0, done
    assert "applied 0002_outbox" in done.out
    assert again.code == 0, again
    assert "the outbox" in again.out


async def test_queues_and_describe_show_the_outbox(folder: Folder, shop: Shop) -> None:
    """Nobody would see that no relay runs."""
    await shop.publish(*(shop.order(n) for n in range(3)))
    async with shop.connected() as connection:
        await connection.execute("UPDATE leveret.outbox SET added_ms = added_ms - 9000000")

    queues = await folder.leveret("queues", "shop:app")
    rows = await folder.leveret("queues", "shop:app", "--outbox", "--json")
    described = await folder.leveret("describe", "shop:app")

    assert "3 jobs wait for a relay, the oldest for 9" in queues.out, queues
    [row] = json.loads(rows.out)
    assert (row["queue"], row["waiting"], row["dead"]) == (shop.queue.name, 3, 0)
    assert 9000 <= row["oldest_s"] < 9900
    assert "→ leveret relay → broker" in described.out
    for ran in (queues, rows, described):
        assert "postgres:postgres" not in ran.out + ran.err


async def test_dead_letters_of_the_outbox_are_listed_replayed_and_dropped(folder: Folder, shop: Shop) -> None:
    """A job that the broker refused would be gone, or wait where nobody looks."""
    roomy = Shop(shop.app.broker_url() or "", shop.outbox, queue=shop.queue, max_header_bytes=100 << 10)
    large, queue = {"x-large": "x" * 60_000}, shop.queue.name
    await roomy.publish(*(Outgoing(roomy.order(n), headers=large, job_id=f"large-{n}") for n in range(2)))
    async with roomy.app.relay():
        await shop.empty()
    async with shop.connected() as connection:
        listed = await folder.leveret("dead", "list", "shop:app", queue, "--outbox", "--json")
        at_the_broker = await folder.leveret("dead", "list", "shop:app", queue, "--json")
        shown = await folder.leveret("dead", "show", "shop:app", queue, "large-0", "--outbox")
        dropped = await folder.leveret("dead", "drop", "shop:app", queue, "--outbox", "--id", "large-0", "--yes")
        # what made it too large has been mended
        await connection.execute("UPDATE leveret.outbox_dead SET headers = replace(headers, repeat('x', 60000), 'x')")
        replayed = await folder.leveret("dead", "replay", "shop:app", queue, "--outbox")
        left = await connection.fetchval("SELECT count(*) FROM leveret.outbox_dead")

    assert [(one["id"], one["error"]) for one in json.loads(listed.out)] == [
        ("large-0", "MessageTooLarge"),
        ("large-1", "MessageTooLarge"),
    ]
    assert json.loads(at_the_broker.out) == []
    assert "the limit is" in shown.out
    assert (dropped.code, replayed.code, left) == (0, 0, 0), (dropped, replayed)
    async with shop.app.relay(), shop.app.worker():
        await eventually(lambda: "large-1" in shop.ids, lambda: shop.ids)


async def test_relay_ends_in_order(folder: Folder, shop: Shop) -> None:
    """A deployment that kills its relays publishes some jobs twice each time."""
    await shop.publish(*(shop.order(n) for n in range(10)))
    with folder.start("relay", "shop:app") as relay:
        await shop.empty()
        await asyncio.to_thread(relay.stop)

    assert "relays from" in relay.log
    assert "stopped: 10 published, 0 moved to the dead letters" in relay.log


@pytest.mark.parametrize(
    ("outbox", "says"),
    [
        (None, "has no outbox"),
        ("sqlite:///orders.db", "must be in the user's database"),
        ("postgresql://shop:hunter2@127.0.0.1:1/shop?colour=red", "unknown parameter 'colour'"),
    ],
)
async def test_a_wrong_outbox_is_one_line(tmp_path: Path, shop: Shop, outbox: str | None, says: str) -> None:
    """An operator can't correct what a traceback hides, and a log must not have the password."""
    ran = await Folder(tmp_path, shop, outbox).leveret("relay", "shop:app")

    assert ran.code == 2, ran
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert "hunter2" not in ran.err


async def test_a_missing_schema_is_one_line_with_the_command(tmp_path: Path, shop: Shop) -> None:
    """It would look like a database that is away, for which a relay waits."""
    ran = await Folder(tmp_path, shop, f"{shop.outbox}?schema=other").leveret("relay", "shop:app")

    assert ran.code == 2, ran
    assert "leveret migrate" in ran.err
