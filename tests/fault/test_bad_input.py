"""What a foreign producer, or a broken one, may put into a queue: each is buried as it came, and the good jobs around it run."""

import asyncio
import gzip
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiormq
import pytest
from pamqp.commands import Basic

from leveret import MessageTooLarge
from leveret.brokers.rabbitmq import connection as amqp
from leveret.brokers.rabbitmq import frames, open_admin
from leveret.brokers.rabbitmq.address import addresses
from leveret.brokers.rabbitmq.confirms import Unconfirmed
from leveret.failure import failures_of
from leveret.runtime import Runtime
from tests.conftest import StartNode
from tests.contract.harness.sqlite import SqliteHarness
from tests.fault.bench import Bench
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Found, Raw

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

NESTED = b"[" * 100_000
# body, what the log and the letter must say, job name, further properties
BAD: dict[str, tuple[bytes, str, str, dict[str, Any]]] = {
    "random-bytes": (bytes(range(255, -1, -1)), "the body can't be decoded as Note", "note", {}),
    "wrong-shape": (b'{"seconds": "long"}', "Expected `float`, got `str`", "note", {}),
    "another-shape": (b'["a list"]', "Expected `object`, got `array`", "note", {}),
    "NaN": (b'{"seconds": NaN}', "the body can't be decoded as Note", "note", {}),
    "unknown-name": (
        b'{"who": "knows"}',
        "this worker has no handler for the job 'order.unknown'",
        "order.unknown",
        {},
    ),
    "no-name": (b'{"no": "name"}', "no job name", "", {}),
    "empty": (b"", "the body can't be decoded as Note", "note", {}),
    "content-type": (b"<note/>", "content type 'text/xml'", "note", {"content_type": "text/xml"}),
    "content-encoding": (
        gzip.compress(b"{}", mtime=0),
        "content encoding 'gzip'",
        "note",
        {"content_encoding": "gzip"},
    ),
    "attempt-is-a-text": (b'{"seconds": 0.001}', "lv-attempt is 'three'", "note", {"headers": {"lv-attempt": "three"}}),
    "attempt-is-a-table": (
        b'{"seconds": 0.002}',
        "lv-attempt is {",
        "note",
        {"headers": {"lv-attempt": {"a": [1, {"b": None}]}}},
    ),
    "attempt-is-negative": (b'{"seconds": 0.003}', "lv-attempt is -7", "note", {"headers": {"lv-attempt": -7}}),
    "first-seen-in-no-year": (
        b'{"seconds": 0.005}',
        "lv-first-seen is 999999999999999, not a time",
        "note",
        {"headers": {"lv-first-seen": 10**15 - 1}},
    ),
    "errors-are-a-number": (b'{"seconds": 0.004}', "lv-errors is 7", "note", {"headers": {"lv-errors": 7}}),
    "nested-tables": (
        b"[1]",
        "Expected `object`",
        "note",
        {"headers": {"x": {"y": {"z": [1, {"a": "b"}, [[]]]}}, "x-death": "none"}},
    ),
    "100-000-brackets": (NESTED, "Expected `object`, got `array`", "note", {}),
    "100-000-brackets-in-a-field": (b'{"seconds": ' + NESTED, "the body can't be decoded as Note", "note", {}),
    "100-000-brackets-in-a-field-that-nobody-reads": (
        b'{"x": ' + NESTED + b"]" * 100_000 + b"}",
        "nested too deeply",
        "note",
        {},
    ),
    "post-init": (b'{"n": 13}', "KeyError: 'thirteen brings bad luck'", "picky", {}),
    "a-name-that-forges-a-log-line": (
        b'{"forged": 1}',
        "this worker has no handler for the job",
        "note\n2026-01-01 INFO all is well\x1b[2J",
        {},
    ),
}


async def good_ones(bench: Bench, into: list[str], until: asyncio.Event) -> None:
    """Publish good jobs between the bad ones."""
    while not until.is_set():
        into += await bench.publish(*(bench.recorder.Note() for _ in range(10)))


def error_lines(log: str) -> list[str]:
    """What the log says of burials; the one line of a death, each."""
    return [line for line in log.splitlines() if " ERROR " in line or " CRITICAL " in line]


@pytest.mark.parametrize("type", ["quorum", "classic"])
@pytest.mark.versions
async def test_what_cannot_be_run_is_buried_byte_for_byte_on_rabbitmq(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw, type: str
) -> None:
    """One poisonous message stops the queue for everyone behind it, or is lost without a trace that anybody could look into."""
    one = bench(rabbit.url, type, unknown_grace_s=2)
    worker = await one.working()
    good, done = list[str](), asyncio.Event()
    publishing = asyncio.create_task(good_ones(one, good, done))
    for name, (body, _, job, more) in BAD.items():
        properties = Basic.Properties(message_type=job or None, message_id=name, **more)
        await raw.publish(one.queue.name, body, properties=properties)
    await raw.publish(
        one.queue.name,
        b"{}",
        properties=Basic.Properties(message_type="note", message_id="odd-but-good", headers={"x": {"y": [{"z": 1}]}}),
    )
    done.set()
    await publishing
    await one.until_ended([*good, "odd-but-good"])
    await one.until_empty(dead=len(BAD))
    await worker.drained()

    letters = {letter.properties.message_id: letter for letter in await raw.look(f"{one.queue.name}.dead")}
    assert letters.keys() == BAD.keys()
    for name, (body, reason, job, more) in BAD.items():
        letter = letters[name]
        assert letter.body == body, name
        assert letter.properties.message_type == (job or None)
        assert letter.properties.content_encoding == more.get("content_encoding")
        assert reason in str(letter.headers["lv-errors"]).replace('\\"', '"') or name == "post-init", (
            name,
            letter.headers["lv-errors"],
        )
        kept = {
            header: value
            for header, value in more.get("headers", {}).items()
            if not header.startswith(("lv-", "x-death"))
        }
        assert kept.items() <= letter.headers.items(), name
    lines = error_lines(worker.log)
    assert len(lines) == len(BAD), "\n".join(lines)
    for name, (_, reason, *_) in BAD.items():
        assert sum(f" {name} (" in line and reason in line for line in lines) == 1, name
    unknowns = 2
    assert len(re.findall(" WARNING ", worker.log)) == unknowns, worker.log  # that it waits: a deploy may be rolling
    async with one.admin() as admin, admin.dead(one.queue) as dead:
        assert {letter.envelope.job_id async for letter in dead} == BAD.keys(), (
            "an operator's tools must read what was buried"
        )


def by_broker(letter: Found) -> str:
    """Why the broker itself dead-lettered it."""
    return str(letter.headers["x-death"][0]["reason"])


@pytest.mark.parametrize("type", ["quorum", "classic"])
@pytest.mark.versions
async def test_what_is_too_large_to_publish_again_is_moved_by_the_broker(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw, type: str
) -> None:
    """A body that no publish could carry must not be held for ever, nor cost the connection of everybody else's jobs."""
    one = bench(rabbit.url, type)
    worker = await one.working()
    bodies = {"20 MB": b"x" * (20 << 20), "huge header": b"{}", "a frame full": b"{}"}
    await one.until_ended(await one.publish(*(one.recorder.Note() for _ in range(50))))
    await raw.publish(
        one.queue.name,
        b"{}",
        properties=Basic.Properties(message_type="note", message_id="huge header", headers={"x": "y" * 100_000}),
    )
    # with what the broker adds, it is larger than any frame that was agreed on
    await raw.publish(
        one.queue.name,
        b"{}",
        properties=Basic.Properties(message_type="note", message_id="a frame full", headers={"x": "y" * 130_980}),
    )
    try:
        await raw.publish(
            one.queue.name, bodies["20 MB"], properties=Basic.Properties(message_type="note", message_id="20 MB")
        )
    except aiormq.exceptions.ChannelPreconditionFailed:  # 4.x takes 16 MiB: refused before it is anybody's
        del bodies["20 MB"]
    await one.until_ended(await one.publish(*(one.recorder.Note() for _ in range(50))))
    await one.until_empty(dead=len(bodies))
    await worker.drained()

    letters = {letter.properties.message_id: letter for letter in await raw.take_all(f"{one.queue.name}.dead")}
    assert {name: letter.body for name, letter in letters.items()} == bodies
    assert {by_broker(letter) for letter in letters.values()} == {"rejected"}
    assert len(error_lines(worker.log)) == len(bodies), worker.log
    assert "is lost" not in worker.log, "its connection"


async def test_properties_that_are_not_utf_8_are_buried_with_their_body(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw
) -> None:
    """A producer in Latin-1 must not be able to end the consumer that reads its texts."""
    one = bench(rabbit.url)
    worker = await one.working()
    connection = await amqp.connect(addresses(rabbit.url)[0], "test", 10)
    channel = await connection.channel(10)
    wrong = {
        b"type": frames.TYPE.to_bytes(2, "big") + b"\x04n\xf6te",
        b"a header's text": (frames.HEADERS | frames.TYPE).to_bytes(2, "big")
        + (9).to_bytes(4, "big")
        + b"\x01xS\x00\x00\x00\x02\xff\xfe"
        + b"\x04note",
        b"a header's name": (frames.HEADERS | frames.TYPE).to_bytes(2, "big")
        + (5).to_bytes(4, "big")
        + b"\x02\xff\xfeS"[:3]
        + b"t\x01"
        + b"\x04note",
    }
    for body, properties in wrong.items():
        channel.window.publish("", properties, body, Unconfirmed("", one.queue.name, time.monotonic() + 10))
    await channel.close()
    await connection.close()
    await one.until_ended(await one.publish(*(one.recorder.Note() for _ in range(50))))
    await one.until_empty(dead=len(wrong))
    await worker.drained()

    assert {letter.body for letter in await raw.take_all(f"{one.queue.name}.dead")} == set(wrong)
    assert len(error_lines(worker.log)) == len(wrong), worker.log


@pytest.mark.parametrize("depth", [31, 40, 1000])
async def test_tables_in_tables_are_buried_at_the_latest_where_they_could_not_be_written_again(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw, depth: int
) -> None:
    """A table that can be read and not written would stay unsettled, and be delivered again at each restart."""
    one = bench(rabbit.url)
    worker = await one.working()
    octets = b"\x01xt\x01"
    for _ in range(depth):
        octets = b"\x01xF" + len(octets).to_bytes(4, "big") + octets
    properties = (
        (frames.HEADERS | frames.MESSAGE_ID | frames.TYPE).to_bytes(2, "big")
        + len(octets).to_bytes(4, "big")
        + octets
        + b"\x04deep"
        + b"\x04note"
    )
    connection = await amqp.connect(addresses(rabbit.url)[0], "test", 10)
    channel = await connection.channel(10)
    channel.window.publish("", properties, b"not JSON", Unconfirmed("", one.queue.name, time.monotonic() + 10))
    await channel.close()
    await connection.close()
    await one.until_empty(dead=1)
    await worker.drained()

    [letter] = await raw.take_all(f"{one.queue.name}.dead")
    assert (letter.body, letter.properties.message_id, letter.properties.message_type) == (b"not JSON", "deep", "note")
    assert "is lost" not in worker.log, "its connection"


@pytest.mark.timeout(120)
async def test_a_broker_that_takes_small_frames_only_keeps_its_connection(
    bench: Callable[..., Bench], rabbit_node: StartNode
) -> None:
    """Errors and headers fit one frame or end the connection, again at each try: nobody's jobs would be published any more."""
    node = await rabbit_node(conf={"frame_max": "8192"})  # the smallest that RabbitMQ 4.1 and later accept
    one = bench(node.url)
    worker = await one.working()
    async with one.app.publisher() as publisher:
        for _ in range(3):
            await publisher.publish(one.recorder.Flaky(99), headers={"x": "y" * 2900}, timeout_s=20)
        with pytest.raises(MessageTooLarge, match="the limit is 3064"):
            await publisher.publish(one.recorder.Note(), headers={"x": "y" * 3100}, timeout_s=20)
    await one.until_ended(await one.publish(*(one.recorder.Note() for _ in range(50))))
    await one.until_empty(dead=3)
    await worker.drained()
    admin = open_admin(node.url, Runtime(app="fault"))
    async with admin.dead(one.queue) as letters:
        last = [failures_of(letter.envelope)[-1] async for letter in letters]
    await admin.close()

    assert [(failure.attempt, failure.error) for failure in last] == [(5, "ConnectionError")] * 3
    assert "is lost" not in worker.log, "its connection"


async def test_counts_that_leave_no_room_do_not_keep_a_job_for_ever(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw
) -> None:
    """A counter at its end that can't be raised, or a time in the far future, would have the job go round or hang for ever."""
    one = bench(rabbit.url, unknown_grace_s=2)
    worker = await one.working()
    most = (1 << 63) - 1
    odd: dict[str, tuple[str, dict[str, int]]] = {
        "passes": ("flaky", {"lv-pass": most}),
        "attempts": ("flaky", {"lv-attempt": most}),
        "passes-of-an-unknown-one": ("nobody", {"lv-pass": most}),
        "unknown-since-a-time-to-come": ("nobody", {"lv-unknown-since": most}),
        "version": ("note", {"lv-version": most}),
    }
    for name, (job, headers) in odd.items():
        properties = Basic.Properties(message_type=job, message_id=name, headers=dict(headers))
        await raw.publish(one.queue.name, b'{"fails": 9223372036854775807}', properties=properties)
    await one.until_empty(dead=len(odd))
    await worker.drained()

    assert {letter.properties.message_id for letter in await raw.take_all(f"{one.queue.name}.dead")} == odd.keys()


async def test_what_cannot_be_run_is_buried_byte_for_byte_on_sqlite(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    """The embedded default keeps the same promise, whatever wrote into its file."""
    one = bench(f"sqlite:///{tmp_path}/jobs.db", unknown_grace_s=2)
    worker = await one.working()
    foreign = SqliteHarness(tmp_path / "jobs.db")
    good, done = list[str](), asyncio.Event()
    publishing = asyncio.create_task(good_ones(one, good, done))
    for name, (body, _, job, more) in BAD.items():
        await foreign.put(one.queue, body, job=job, job_id=name, **more)
    await foreign.put(one.queue, b"x" * (20 << 20), job="note", job_id="20 MB")
    done.set()
    await publishing
    await one.until_ended(good)
    # SQLite keeps leveret's own headers in columns of their own: these two run
    ran = {name for name in BAD if name.startswith(("attempt-is", "errors-are"))} & set(one.recorder.ids("end"))
    await one.until_empty(dead=len(BAD) + 1 - len(ran))
    await worker.drained()

    async with one.admin() as admin, admin.dead(one.queue) as dead:
        bodies = {letter.envelope.job_id: letter.envelope.body async for letter in dead}
    assert bodies == {name: bad[0] for name, bad in BAD.items() if name not in ran} | {"20 MB": b"x" * (20 << 20)}
    assert len(error_lines(worker.log)) == len(bodies), worker.log
