"""Publishes and the broker's word on each, and the window in which they wait for it."""

from __future__ import annotations

import asyncio
import time

import pytest
from pamqp import commands

from leveret import App, Job, PublishTimeout, Queue
from leveret.brokers.rabbitmq.channel import Channel
from leveret.brokers.rabbitmq.confirms import WINDOW, Late, Nacked, Returned
from leveret.brokers.rabbitmq.connection import Connection
from leveret.brokers.rabbitmq.wire import WRITE_HIGH_BYTES

from .peer import Peer, content, ends_with_closed, listening, opened, publish, talking


async def test_each_publish_ends_with_the_brokers_word_on_it() -> None:
    """A confirm that is read as another's loses a job without a trace."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        one, two, three, four, five = (publish(channel) for _ in range(5))
        peer.say(commands.Basic.Ack(2, False), commands.Basic.Nack(1, False), commands.Basic.Ack(4, True))
        await asyncio.gather(two, three, four)
        with pytest.raises(Nacked):
            await one
        assert not five.ended
        peer.say(commands.Basic.Nack(0, True))
        with pytest.raises(Nacked):
            await five


async def test_only_the_publish_that_no_queue_took_is_returned() -> None:
    """A job and its repeat share an id: telling the wrong caller that it failed publishes one thrice and the other never."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        there, gone, gone_again = publish(channel, "there"), publish(channel, "gone"), publish(channel, "gone")
        back = content(commands.Basic.Return(312, "NO_ROUTE", "", "gone"), b"x")
        peer.say(back, back, commands.Basic.Ack(3, True))
        await there
        for one in (gone, gone_again):
            with pytest.raises(Returned) as returned:
                await one
            assert returned.value.code == 312


async def test_a_return_without_an_id_is_that_of_the_oldest_with_its_key() -> None:
    """A proxy or a broker that leaves the properties out: the ack behind it would be a receipt for a job that is nowhere."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        there, gone, later = (
            publish(channel, "there", "a"),
            publish(channel, "gone", "b"),
            publish(channel, "gone", "c"),
        )
        back = content(commands.Basic.Return(312, "NO_ROUTE", "", "gone"), b"", properties=commands.Basic.Properties())
        peer.say(back, commands.Basic.Ack(2, True))
        await there
        with pytest.raises(Returned):
            await gone
        assert not later.ended
        peer.say(commands.Basic.Ack(3, False))
        await later


async def test_a_publish_ends_at_its_deadline_and_a_return_after_it_is_forgotten() -> None:
    """A broker that stays silent must cost a web request its timeout, not more; what comes late must not pile up."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        started = time.monotonic()
        late, in_time = publish(channel, "gone", timeout_s=0.1), publish(channel)
        with pytest.raises(Late):
            await late
        assert 0.1 <= time.monotonic() - started < 5
        peer.say(content(commands.Basic.Return(312, "NO_ROUTE", "", "gone"), b"x"), commands.Basic.Ack(2, True))
        await in_time
        assert (channel.window._returned, channel.window._unconfirmed) == ({}, {})


async def test_single_confirms_and_then_one_of_many_leave_nothing_unconfirmed() -> None:
    """RabbitMQ mixes them; a publish that is skipped waits for its deadline though it is safe."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        futures = [publish(channel) for _ in range(30)]
        peer.say(*(commands.Basic.Ack(tag, False) for tag in range(1, 20) if tag != 5), commands.Basic.Ack(30, True))
        async with asyncio.timeout(5):
            await asyncio.gather(*futures)
        assert not channel.window._unconfirmed


async def filled(connection: Connection, peer: Peer) -> Channel:
    """Return a channel whose window is full."""
    channel = await opened(connection, peer)
    for _ in range(WINDOW):
        assert not channel.window.full
        publish(channel)
    assert channel.window.full
    return channel


async def in_line(channel: Channel, names: str) -> tuple[list[str], dict[str, asyncio.Task[None]]]:
    """Let publishers wait for room, one after another; each writes down its name as it publishes."""
    went: list[str] = []

    async def wait(name: str) -> None:
        await channel.window.room()
        went.append(name)
        publish(channel)

    tasks: dict[str, asyncio.Task[None]] = {}
    for name in names:
        tasks[name] = asyncio.create_task(wait(name))
        await asyncio.sleep(0)
    return went, tasks


async def test_a_full_window_lets_publishers_in_first_come_first_served() -> None:
    """A publisher overtaken for ever times out under load, though the broker keeps up."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        went, tasks = await in_line(channel, "abcdefgh")
        peer.say(
            *(commands.Basic.Ack(tag, False) for tag in (1, 2, 3))
        )  # three in one read: no more than three may wake
        await asyncio.gather(*(tasks[name] for name in "abc"))
        assert went == ["a", "b", "c"]
        assert channel.window.full
        peer.say(commands.Basic.Ack(10, True))
        await asyncio.gather(*tasks.values())
        assert "".join(went) == "abcdefgh"


async def test_a_queue_that_confirms_nothing_leaves_room_for_the_others() -> None:
    """One queue without its majority would end all publishing of a process, other queues' retries and burials among it."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        stuck = [publish(channel, "stuck", timeout_s=0.1) for _ in range(WINDOW)]
        _, tasks = await in_line(channel, "ab")  # nothing else wakes them
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks.values())
        await stuck[-1].wait()
        assert all(isinstance(one.failure, Late) for one in stuck)
        well = publish(channel, "well")
        peer.say(commands.Basic.Ack(WINDOW + 3, False))
        await well
        await publish_confirmed(channel, peer)
        assert (channel.window._unconfirmed, channel.window._late) == ({}, 0)


async def test_what_ended_without_a_confirm_is_not_kept_for_ever() -> None:
    """Publishes to a queue that is stuck for a day would fill the memory."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        for _ in range(12):
            for _ in range(WINDOW):
                last = publish(channel, "stuck", timeout_s=0)
            await last.wait()
        assert len(channel.window._unconfirmed) == channel.window._late == 9 * WINDOW
        assert not channel.window.full
        peer.say(commands.Basic.Ack(1, False), commands.Basic.Ack(12 * WINDOW, True))  # one that is forgotten, and all
        await publish_confirmed(channel, peer)
        assert (channel.window._unconfirmed, channel.window._late) == ({}, 0)


async def publish_confirmed(channel: Channel, peer: Peer) -> None:
    """Publish, and confirm all; what the peer said before is taken in by then."""
    sent = publish(channel)
    peer.say(commands.Basic.Ack(0, True))
    async with asyncio.timeout(5):
        await sent


async def test_what_a_publish_waits_for_is_said_as_it_is() -> None:
    """Who reads of a thousand unconfirmed publishes looks for them, in a process that has sent none."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        assert channel.window.why_full == "1000 publishes are unconfirmed"
        await publish_confirmed(channel, peer)
        connection.pause_writing()
        assert channel.window.why_full == "RabbitMQ doesn't read from the connection"


async def test_a_queue_whose_declare_isnt_answered_is_said_to_be_just_that() -> None:
    """The declare of a quorum queue without its majority hangs: that is to be looked at, not the confirms of others."""
    notes = Queue("notes")

    class Note(Job, name="note", queue=notes):
        """A job."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        await peer.greet()
        number = await peer.open()
        await peer.hear(commands.Confirm.Select)
        peer.say(commands.Confirm.SelectOk(), channel=number)
        await peer.open()
        await reader.read()

    async with (
        listening(serve) as address,
        App("test", broker=f"amqp://u:p@127.0.0.1:{address.port}/").publisher() as publisher,
    ):
        with pytest.raises(
            PublishTimeout, match=r"nothing was sent in time: RabbitMQ hasn't answered the declaration of the queue$"
        ):
            await publisher.publish(Note(), timeout_s=0.5)


async def test_nobody_overtakes_those_who_wait() -> None:
    """Whoever asks at the right moment would take the place of one who has waited for seconds."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        went, tasks = await in_line(channel, "a")
        channel.window.on_confirm(1, False, True)  # as the reader would, before `a` had its turn
        assert channel.window.full
        late, more = await in_line(channel, "z")
        await tasks["a"]
        assert (went, late) == (["a"], [])
        channel.window.on_confirm(2, False, True)
        await more["z"]


async def test_a_cancelled_waiter_loses_nobodys_wake_up() -> None:
    """A request that timed out as it was woken would leave the next one waiting for ever."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        went, tasks = await in_line(channel, "abc")
        tasks["b"].cancel()  # while it waits
        channel.window.on_confirm(1, False, True)
        tasks["a"].cancel()  # after it was woken
        async with asyncio.timeout(5):
            await tasks["c"]
        assert went == ["c"]
        assert channel.window.full
        channel.window.on_confirm(2, False, True)
        assert not channel.window.full


async def test_a_closed_channel_wakes_all_who_wait_for_room() -> None:
    """They would wait for confirms that never come."""
    async with talking() as (connection, peer):
        channel = await filled(connection, peer)
        _, tasks = await in_line(channel, "abc")
        peer.say(commands.Channel.Close(406, "PRECONDITION_FAILED", 0, 0))
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks.values())
        await ends_with_closed(publish(channel), 406)


async def test_a_peer_that_reads_slowly_makes_publishers_wait_and_not_acks() -> None:
    """Unbounded buffers fill the memory; acks that wait behind them bring redeliveries."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        sent = 0
        while not channel.window.full:
            publish(channel, body=bytes(1 << 19))
            sent += 1
            await asyncio.sleep(0)
        assert not connection.writable
        assert sent < 100
        waiting = asyncio.create_task(channel.window.room())
        channel.ack(77, multiple=True)
        await asyncio.sleep(0)
        assert not waiting.done()
        _, ack = await peer.hear(commands.Basic.Ack)  # reads all that was before it
        assert ack.delivery_tag == 77
        async with asyncio.timeout(5):
            await waiting
        assert connection.writable


async def test_large_bodies_of_one_turn_of_the_loop_wait_for_the_next() -> None:
    """A window of 1 MB bodies, written at once, takes a gigabyte and holds up the loop for seconds."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        reading = asyncio.create_task(peer.hear(commands.Basic.Ack))  # and all before it
        large, most, order = bytes(WRITE_HIGH_BYTES // 4), 0, list[int]()

        async def send(n: int) -> None:
            nonlocal most
            await channel.window.room(len(large))
            publish(channel, body=large)
            most = max(most, connection.queued)
            order.append(n)

        async with asyncio.timeout(10):
            await asyncio.gather(*(send(n) for n in range(100)))
        channel.ack(77, multiple=True)
        await reading
        assert most <= 1.5 * WRITE_HIGH_BYTES
        assert order == list(range(100))
        assert (channel.window._promised, channel.window._promised_bytes, connection.queued) == (0, 0, 0)


async def test_who_is_woken_for_large_bodies_and_cant_publish_makes_room_for_the_next() -> None:
    """A request that timed out as it was woken would leave the next one waiting for ever: nothing was written that would wake it."""
    async with talking() as (connection, peer):
        channel = await opened(connection, peer)
        connection.pause_writing()  # as the socket would
        woken, last = (
            asyncio.create_task(channel.window.room(WRITE_HIGH_BYTES)),
            asyncio.create_task(channel.window.room(WRITE_HIGH_BYTES)),
        )
        await asyncio.sleep(0)
        connection.resume_writing()
        woken.cancel()
        async with asyncio.timeout(5):
            await last
        assert woken.cancelled()
