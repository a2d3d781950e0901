"""The channels of a connection: their calls, consumers and ends."""

from __future__ import annotations

import asyncio
import traceback

import pytest
from pamqp import commands

from leveret.brokers.rabbitmq.wire import Closed

from .peer import ACK_OF_NOTHING, DELIVER, content, ends_with_closed, opened, publish, talking


async def test_a_channel_that_the_broker_closes_ends_what_waits_on_it_and_nothing_else() -> None:
    """One missing queue would stop every consumer of the process, or leave a publish waiting for its deadline."""
    async with talking() as (connection, peer):
        first, second = await opened(connection, peer), await opened(connection, peer)
        told: list[Closed] = []
        first.on_closed = told.append
        call = asyncio.create_task(first.call(commands.Queue.Declare(queue="q", passive=True), 5))
        lost, kept = publish(first), publish(second)
        await peer.hear(commands.Queue.Declare)
        peer.say(commands.Channel.Close(404, "NOT_FOUND", 50, 10))
        await peer.hear(commands.Channel.CloseOk)
        for waited in (call, lost):
            assert (await ends_with_closed(waited, 404)).scope == "channel"
        peer.say(commands.Basic.Ack(1, False), channel=2)
        await kept
        assert [one.code for one in told] == [404]
        assert connection.usable
        await ends_with_closed(first.call(commands.Queue.Declare(queue="q"), 5), 404)


async def test_what_was_on_its_way_when_the_broker_closed_a_channel_costs_no_other_channel() -> None:
    """RabbitMQ may send a delivery after the close: one queue's consumer timeout would cost all queues of the worker their connection."""
    async with talking() as (connection, peer):
        first, second = await opened(connection, peer), await opened(connection, peer)
        kept = publish(second)
        peer.say(
            commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0),
            content(DELIVER, b"x"),
            ACK_OF_NOTHING,
            content(commands.Basic.Return(312, "NO_ROUTE", "", "q"), b"x"),
            content(commands.Basic.GetOk(1, False, "", "q", 0), b"x"),
            commands.Queue.DeclareOk("q", 0, 0),
        )
        peer.say(commands.Basic.Ack(1, False), channel=2)
        await kept
        assert first.closed is not None
        assert (first.closed.code, connection.usable) == (406, True)


async def test_a_closed_channels_number_is_used_again() -> None:
    """A worker that opens a channel a reconnect would run out of numbers; an old delivery must not reach the new one."""
    async with talking() as (connection, peer):
        first = await opened(connection, peer)
        got: list[int] = []
        consuming = asyncio.create_task(first.consume("q", "c1", lambda tag, *_: got.append(tag), 5))
        await peer.hear(commands.Basic.Consume)
        peer.say(commands.Basic.ConsumeOk("c1"))
        await consuming
        closing = asyncio.create_task(first.close())
        await peer.hear(commands.Channel.Close)
        peer.say(content(DELIVER, b"x"), commands.Channel.CloseOk())  # on its way when we closed
        await closing
        second = await opened(connection, peer)
        assert (second.number, got) == (1, [1])
        peer.say(content(DELIVER, b"x"), commands.Basic.Cancel("c9"))
        cancelled: asyncio.Future[str] = connection.loop.create_future()
        second.on_cancelled = cancelled.set_result
        assert await cancelled == "c9"
        assert got == [1]


async def test_a_channel_that_was_left_is_free_once_its_late_answers_have_come() -> None:
    """A broker that is slow to declare would cost a number a try: after 2047 tries nothing could be declared on that connection any more."""
    async with talking() as (connection, peer):
        first = await opened(connection, peer)
        calling = asyncio.create_task(
            first.call_all([commands.Queue.Declare(queue="a"), commands.Queue.Declare(queue="b")], 0.05)
        )
        for _ in range(2):
            await peer.hear(commands.Queue.Declare)
        with pytest.raises(TimeoutError):
            await calling

        left = first.leave()
        assert left is first.leave()  # it asks once
        await peer.hear(commands.Channel.Close)
        second = await opened(connection, peer)  # the number is taken until then
        peer.say(
            *(commands.Queue.DeclareOk(queue=name, message_count=0, consumer_count=0) for name in ("a", "b")),
            commands.Channel.CloseOk(),
        )
        await asyncio.wait_for(left, 5)
        third = await opened(connection, peer)

        assert (first.number, second.number, third.number, connection.usable) == (1, 2, 1, True)


async def test_a_channel_that_both_sides_close_at_once_disturbs_nobody_who_gets_its_number() -> None:
    """The answer to our close comes late, on a number that is another channel by then."""
    async with talking() as (connection, peer):
        first = await opened(connection, peer)
        closing = asyncio.create_task(first.close())
        await peer.hear(commands.Channel.Close)
        peer.say(commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
        await ends_with_closed(closing, 406)
        opening = asyncio.create_task(connection.channel(5))
        await peer.hear(commands.Channel.Open)
        peer.say(commands.Channel.CloseOk(), commands.Channel.OpenOk())
        assert (await opening).number == 1
        assert connection.usable


async def test_a_call_that_isnt_answered_ends_at_its_deadline_and_its_answer_disturbs_no_later_one() -> None:
    """Answers name no call: one that comes late would be taken for the next call's."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        with pytest.raises(TimeoutError):
            await channel.call(commands.Queue.Declare(queue="one"), 0.05)
        second = asyncio.create_task(channel.call(commands.Queue.Declare(queue="two"), 5))
        await peer.hear(commands.Queue.Declare)
        await peer.hear(commands.Queue.Declare)
        peer.say(commands.Queue.DeclareOk("one", 0, 0), commands.Queue.DeclareOk("two", 0, 0))
        answer = await second
        assert isinstance(answer, commands.Queue.DeclareOk)
        assert answer.queue == "two"


async def test_a_consumer_that_the_broker_cancels_is_told_and_gets_nothing_more() -> None:
    """A deleted queue would leave a worker that looks healthy and takes no job."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        got: list[int] = []
        cancelled: asyncio.Future[str] = connection.loop.create_future()
        channel.on_cancelled = cancelled.set_result
        consuming = asyncio.create_task(channel.consume("q", "c1", lambda tag, *_: got.append(tag), 5))
        await peer.hear(commands.Basic.Consume)
        peer.say(
            commands.Basic.ConsumeOk("c1"), content(DELIVER, b"x"), commands.Basic.Cancel("c1"), content(DELIVER, b"y")
        )
        await consuming
        assert await cancelled == "c1"
        assert got == [1]


async def test_a_cancelled_consumer_is_forgotten() -> None:
    """Flow control cancels and consumes again for as long as a worker lives."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        consuming = asyncio.create_task(channel.consume("q", "c1", lambda *_: None, 5))
        await peer.hear(commands.Basic.Consume)
        peer.say(commands.Basic.ConsumeOk("c1"))
        await consuming
        cancelling = asyncio.create_task(channel.cancel("c1", 5))
        await peer.hear(commands.Basic.Cancel)
        peer.say(commands.Basic.CancelOk("c1"))
        await cancelling
        assert not channel.consumers


async def test_asking_a_closed_channel_again_and_again_keeps_nothing() -> None:
    """One error raised ten thousand times over would hold the frames of every raise."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        connection.abort()
        closed = connection.closed
        for _ in range(5):
            for call in (channel.call(commands.Queue.Declare(queue="q"), 5), connection.channel(5)):
                with pytest.raises(Closed):
                    await call
        assert closed is not None
        assert len(list(traceback.walk_tb(closed.__traceback__))) < 5
