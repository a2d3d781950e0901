"""A worker that dies in the worst moment of a retry: the copy is confirmed, the original isn't acknowledged."""

import asyncio
import sys
import uuid

import pytest

from tests.fault.apps.dying import Dying
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]


@pytest.mark.parametrize("type", ["quorum", "classic"])
async def test_a_kill_between_the_confirm_of_a_retry_and_its_ack_leaves_two_copies_of_one_id(
    rabbit: Rabbit, raw: Raw, type: str
) -> None:
    """R39: acknowledged first, the job would be gone with its worker; under another id nobody could tell that one ran twice."""

    async def once() -> None:
        queue = f"dying-{uuid.uuid4().hex[:12]}"
        dying = Dying(rabbit.url, queue, type)
        async with dying.app.publisher() as publisher:
            receipt = await publisher.publish(dying.Work(), timeout_s=20)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.fault.apps.dying", rabbit.url, queue, type
        )
        assert await process.wait() == -9
        await raw.until_count(queue, 2)
        copies = await raw.take_all(queue)
        assert {copy.properties.message_id for copy in copies} == {receipt.job_id}
        assert sorted(copy.headers.get("lv-attempt", 1) for copy in copies) == [1, 2]

    await asyncio.gather(*(once() for _ in range(5)))
