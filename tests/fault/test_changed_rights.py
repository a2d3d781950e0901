"""A user that loses its rights, its password or its vhost while a program runs: the program says so, waits, and goes on."""

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass

import pytest

from leveret import BrokerUnavailable, Settings
from tests.fault.bench import eventually, link_to
from tests.fault.shop import Shop
from tests.rabbit.node import Node, Rabbit

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Account:
    """A user of the shared node, with a vhost."""

    node: Node
    name: str

    async def make_vhost(self) -> None:
        await self.node.ctl("add_vhost", self.name)
        await self.allow()

    async def delete_vhost(self) -> None:
        await self.node.ctl("delete_vhost", self.name)

    async def allow(self) -> None:
        await self.node.ctl("set_permissions", "-p", self.name, self.name, ".*", ".*", ".*")

    async def forbid(self) -> None:
        await self.node.ctl("clear_permissions", "-p", self.name, self.name)

    async def change_password(self) -> None:
        await self.node.ctl("change_password", self.name, "another")

    async def restore_password(self) -> None:
        await self.node.ctl("change_password", self.name, "right")


@pytest.fixture(scope="module")
def account(rabbit: Rabbit) -> Generator[Account]:
    """Make a user with a vhost, and delete both."""
    if not isinstance(rabbit, Node):
        pytest.skip(rabbit.why_no_levers)
    made = Account(rabbit, f"shop{uuid.uuid4().hex[:8]}")
    asyncio.run(rabbit.ctl("add_user", made.name, "right"))
    asyncio.run(made.make_vhost())
    yield made
    asyncio.run(made.delete_vhost())
    asyncio.run(rabbit.ctl("delete_user", made.name))


@pytest.mark.parametrize(
    ("take", "give_back", "says"),
    [
        (Account.forbid, Account.allow, "doesn't let user 'shop[0-9a-f]+' use vhost"),
        (Account.change_password, Account.restore_password, "is the password right"),
        (Account.delete_vhost, Account.make_vhost, "has no vhost"),
    ],
    ids=["permissions", "password", "vhost"],
)
async def test_rights_that_are_taken_and_given_back_cost_a_few_lines(
    account: Account,
    caplog: pytest.LogCaptureFixture,
    take: Callable[[Account], Awaitable[None]],
    give_back: Callable[[Account], Awaitable[None]],
    says: str,
) -> None:
    """R32: an administrator's mistake that ends each worker, or fills their disks, costs more than the mistake."""
    caplog.set_level(logging.INFO, "leveret")
    async with link_to(account.node) as link:
        url = link.url.replace("guest:guest", f"{account.name}:right") + account.name
        shop = Shop(url, settings=Settings(reconnect_base_s=0.1, reconnect_cap_s=0.1))
        async with shop.working() as (worker, publisher):
            await publisher.publish(shop.job().job, timeout_s=20)
            await eventually(lambda: len(shop.ends) == 1)
            caplog.clear()
            await take(account)
            link.reset()
            await eventually(lambda: all(re.search(says, each.state().why) for each in (worker, publisher)))
            with pytest.raises(BrokerUnavailable, match=says):
                await publisher.publish(shop.job().job, timeout_s=1)
            tried = link.accepted
            await eventually(lambda: link.accepted >= tried + 5)
            lines = [record.getMessage() for record in caplog.records]
            await give_back(account)
            await eventually(lambda: worker.state().name == "ready", timeout_s=10)
            await publisher.publish(shop.job().job, timeout_s=20)
            await eventually(lambda: len(shop.ends) == 2)

    assert sum(re.search(f"waiting to consume: .*{says}", line) is not None for line in lines) == 1, (
        "once, not at each try"
    )
    assert len(lines) < 6, lines
    assert "right@" not in caplog.text
