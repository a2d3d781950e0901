"""Publishes whose connection is lost before their confirm."""

import asyncio
import time
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest

from leveret import App, Handle, Job, Outgoing, Publisher, PublishTimeout, Queue, Receipt
from tests.rabbit.node import Rabbit
from tests.rabbit.proxy import FaultProxy
from tests.rabbit.raw import Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(60)]

_queue = Queue(f"shop-{uuid.uuid4().hex[:12]}")


class Note(Job, name="note", queue=_queue):
    """A job to publish."""

    n: int = 0


async def lost(
    link: FaultProxy, node: AsyncExitStack, publisher: Publisher, raw: Raw, *, resend: bool
) -> list[Receipt | BaseException]:
    """Publish 20 jobs, end their node before a confirm comes, and return how each of them ended."""
    await publisher.publish(Note())
    link.freeze("down")
    jobs = [asyncio.create_task(publisher.publish(Note(), resend=resend, timeout_s=30)) for _ in range(20)]
    await raw.until_count(_queue.name, 21)
    await node.aclose()
    return await asyncio.gather(*jobs, return_exceptions=True)


async def test_a_lost_publish_is_repeated_under_its_id_only_where_the_caller_says_so(rabbit: Rabbit, raw: Raw) -> None:
    """Unasked, a copy runs twice; asked, a service must not see each restart of its broker as an error. The first node is gone for good."""
    port = urlsplit(rabbit.url).port or 5672
    for resend in (False, True):
        await raw.delete(_queue.name)
        async with FaultProxy(port) as second, AsyncExitStack() as node:
            first = await node.enter_async_context(FaultProxy(port))
            app = App("shop", broker=f"{first.url},{second.url}")
            async with app.publisher() as publisher:
                ends = await lost(first, node, publisher, raw, resend=resend)
                await publisher.publish(Note())
        ids = Counter(found.properties.message_id for found in await raw.take_all(_queue.name))
        assert len(ids) == 22, "a lost job"
        if resend:
            assert [type(end) for end in ends] == [Handle] * 20
            assert {end.job_id for end in ends if isinstance(end, Receipt)} < set(ids)
            assert max(ids.values()) == 2, "one loss, one copy"
        else:
            assert [type(end) for end in ends] == [PublishTimeout] * 20
            assert all(isinstance(end, PublishTimeout) and end.maybe_published for end in ends)
            assert max(ids.values()) == 1, "a copy that nobody asked for"


async def test_a_batch_is_resent_and_a_deadline_ends_it(rabbit: Rabbit, raw: Raw) -> None:
    """Where the broker stays away, the caller must hear by the deadline that the job may be in the queue."""
    async with FaultProxy(urlsplit(rabbit.url).port or 5672) as link:
        app = App("shop", broker=link.url)
        async with app.publisher() as publisher:
            await publisher.publish(Note())
            link.freeze("down")
            jobs = [Outgoing(Note(n), resend=True) for n in range(300)]
            batch = asyncio.create_task(publisher.publish_many(jobs, timeout_s=30))
            await asyncio.sleep(0.2)
            link.reset()
            link.thaw()
            assert len(await batch) == 300
            link.freeze("down")
            began = time.monotonic()
            last = asyncio.create_task(publisher.publish(Note(), resend=True, timeout_s=1))
            await asyncio.sleep(0.2)
            link.reset()
            with pytest.raises(PublishTimeout) as caught:
                await last
            assert caught.value.maybe_published
            assert time.monotonic() - began < 1.5
    assert len({found.properties.message_id for found in await raw.take_all(_queue.name)}) >= 302
