"""What leveret declares on RabbitMQ, as data: names, arguments, bindings, and the way of a delayed job through its ladder."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.brokers.rabbitmq import topology
from leveret.brokers.rabbitmq.properties import priority_property
from leveret.brokers.rabbitmq.topology import Binding, Declaration, Exchange, Ladder, PhysicalQueue
from leveret.job import LEVELS, MAX_NAME_BYTES, Priority, Queue
from leveret.outcome import MAX_DELAY_S

QUORUM, CLASSIC = Queue("shop.emails"), Queue("shop.emails", type="classic")
ONE, CLASSIC_ONE = Queue("shop.emails", priorities=False), Queue("shop.emails", type="classic", priorities=False)
KINDS = [QUORUM, CLASSIC, ONE, CLASSIC_ONE]

delays = st.floats(1e-9, MAX_DELAY_S)
names = st.from_regex(r"[A-Za-z0-9_.-]{1,150}", fullmatch=True).filter(
    lambda name: (
        not name.startswith("lv.") and not name.endswith((".low", ".normal", ".high", ".urgent", ".dead", ".suspects"))
    )
)


def whole(level: Priority) -> Ladder:
    """The ladder named by `level`, with every place."""
    return Ladder(level, topology.PLACES)


def queues(records: tuple[Declaration, ...]) -> dict[str, dict[str, object]]:
    return {record.name: record.arguments for record in records if isinstance(record, PhysicalQueue)}


def bindings(records: tuple[Declaration, ...], source: str) -> set[tuple[str, str]]:
    return {
        (record.key, record.destination)
        for record in records
        if isinstance(record, Binding) and record.source == source
    }


def matches(pattern: str, key: str) -> bool:
    """Whether a topic pattern of words and single stars, as leveret uses them, matches."""
    wanted, given_ = pattern.split("."), key.split(".")
    return len(wanted) == len(given_) and all(word in ("*", there) for word, there in zip(wanted, given_, strict=True))


def walk(exchange: str, key: str, records: tuple[Declaration, ...]) -> tuple[list[str], set[str]]:
    """Follow a message as the broker routes it: the TTL queues that it waits in, and the exchange or queues where it ends."""
    waits: list[str] = []
    arguments = queues(records)
    while exchange != topology.DUE:
        [hop] = [
            record
            for record in records
            if isinstance(record, Binding) and record.source == exchange and matches(record.key, key)
        ]
        if hop.to == "exchange":
            exchange = hop.destination
        else:
            waits.append(hop.destination)
            exchange = str(arguments[hop.destination]["x-dead-letter-exchange"])
    return waits, {
        record.destination
        for record in records
        if isinstance(record, Binding) and record.source == topology.DUE and matches(record.key, key)
    }


def test_a_quorum_queue_is_a_sibling_for_each_level_and_normal_bears_the_queues_own_name() -> None:
    """Another name, and what waits under the old one is never consumed after an upgrade."""
    assert topology.physicals(QUORUM) == {
        "shop.emails.urgent": (Priority.URGENT,),
        "shop.emails.high": (Priority.HIGH,),
        "shop.emails": (Priority.NORMAL,),
        "shop.emails.low": (Priority.LOW,),
    }


@pytest.mark.parametrize("queue", [CLASSIC, ONE, CLASSIC_ONE], ids=repr)
def test_without_siblings_one_physical_queue_holds_every_level_that_the_queue_takes(queue: Queue) -> None:
    """A level that no physical queue holds would be published into nothing."""
    assert topology.physicals(queue) == {"shop.emails": queue.levels}


@pytest.mark.parametrize("queue", KINDS, ids=repr)
def test_each_level_is_routed_to_the_queue_that_holds_it_and_to_no_other(queue: Queue) -> None:
    """Two queues for a key double every job; none makes every publish of that level unroutable."""
    wanted = {(f"shop.emails.{level.value}", topology.physical(queue, level)) for level in queue.levels}
    wanted.add(("shop.emails.suspects", "shop.emails.suspects"))  # jobs of any level that crashed their workers
    assert bindings(topology.of_queue(queue), topology.JOBS) == wanted


@pytest.mark.parametrize("queue", KINDS, ids=repr)
def test_the_dead_letter_queue_is_there_before_the_first_queue_that_dead_letters_to_it(queue: Queue) -> None:
    """What is rejected in between would be dropped: 200 of 200 were, with the target missing."""
    records = topology.of_queue(queue)
    assert next(iter(queues(records))) == "shop.emails.dead"
    assert records[1] == Binding("lv.dead", "shop.emails.dead", "shop.emails")
    for name, arguments in queues(records).items():
        if name != "shop.emails.dead":
            assert (arguments["x-dead-letter-exchange"], arguments["x-dead-letter-routing-key"]) == (
                "lv.dead",
                "shop.emails",
            )


def test_a_quorum_queues_arguments_are_these() -> None:
    """A queue can't be declared again with others: any change here is a 406 in every installation."""
    assert (
        topology.job_queue_arguments(QUORUM)
        == topology.job_queue_arguments(ONE)
        == {
            "x-queue-type": "quorum",
            "x-delivery-limit": 1_000_000,
            "x-dead-letter-exchange": "lv.dead",
            "x-dead-letter-routing-key": "shop.emails",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    )


def test_a_classic_queues_arguments_are_these() -> None:
    """A queue can't be declared again with others; a delivery limit is refused on classic queues."""
    plain = {"x-queue-type": "classic", "x-dead-letter-exchange": "lv.dead", "x-dead-letter-routing-key": "shop.emails"}
    assert topology.job_queue_arguments(CLASSIC) == plain | {"x-max-priority": 6}
    assert topology.job_queue_arguments(CLASSIC_ONE) == plain


def test_every_quorum_queue_that_is_declared_has_the_delivery_limit() -> None:
    """4.x drops a job after 20 returns where there is none, and 3.10 takes -1 for a single delivery."""
    everything = (
        topology.SHARED
        + topology.of_queue(QUORUM)
        + topology.of_queue(CLASSIC)
        + topology.of_ladder(whole(Priority.NORMAL))
        + topology.of_ladder(whole(Priority.LOW))
    )
    found = [
        record.arguments
        for record in everything
        if isinstance(record, PhysicalQueue) and record.arguments["x-queue-type"] == "quorum"
    ]
    assert {arguments.get("x-delivery-limit") for arguments in found} == {1_000_000}


def test_dead_letters_lie_in_a_quorum_queue_whatever_the_jobs_lie_in() -> None:
    """A dead letter is the last copy of a job."""
    for queue in KINDS:
        assert queues(topology.of_queue(queue))["shop.emails.dead"] == {
            "x-queue-type": "quorum",
            "x-delivery-limit": 1_000_000,
        }


def test_the_exchanges_have_their_alternates_from_the_first_release() -> None:
    """An alternate exchange can't be added to one that exists: `migrate` could never move a key without loss."""
    exchanges = {
        record.name: (record.kind, record.arguments) for record in topology.SHARED if isinstance(record, Exchange)
    }
    assert exchanges == {
        "lv.dead": ("direct", {}),
        "lv.jobs": ("direct", {"alternate-exchange": "lv.jobs.alt"}),
        "lv.jobs.alt": ("direct", {}),
        "lv.delay.due": ("topic", {"alternate-exchange": "lv.delay.alt"}),
        "lv.delay.alt": ("topic", {"alternate-exchange": "lv.lost"}),
        "lv.lost": ("fanout", {}),
    }
    assert bindings(topology.SHARED, "lv.lost") == {("", "lv.lost")}


def test_whatever_a_declaration_names_was_declared_before_it() -> None:
    """A binding to what isn't there is a 404, which closes the channel and ends the declaring half-way."""
    for queue in KINDS:
        there: set[str] = set()
        for record in topology.SHARED + topology.of_queue(queue) + topology.of_ladder(whole(Priority.HIGH)):
            if isinstance(record, Binding):
                assert {record.source, record.destination} <= there
            else:
                there.add(record.name)


def test_no_two_queues_share_a_physical_name_or_a_route() -> None:
    """A dot in a name must not make one queue's level another queue: `a.high` of `a` is why `.high` is reserved."""
    several = [Queue(name) for name in ("a", "a.b", "a-b", "a.normal-x", "b.a", "high")]
    physical = [name for queue in several for name in queues(topology.of_queue(queue))]
    routes = [
        route
        for queue in several
        for level in queue.levels
        for route in (topology.job_key(queue.name, level), topology.destination(queue.name, level))
    ]
    assert len(set(physical)) == len(physical)
    assert len(set(routes)) == len(routes)


@pytest.mark.parametrize("level", LEVELS)
def test_a_siblings_level_can_be_told_from_its_name(level: Priority) -> None:
    """A job that the broker dead-letters itself says no level: it would be replayed at another one."""
    assert topology.level_of("shop.emails", topology.sibling("shop.emails", level)) is level
    assert topology.level_of("shop", topology.sibling("shop.emails", level)) is None


@pytest.mark.parametrize(
    ("delay_s", "units"),
    [
        (1e-9, 1),
        (0.25, 1),
        (0.2501, 2),
        (1, 4),
        (31.75, 127),
        (32, 128),
        (32.1, 130),
        (60, 240),
        (600, 2400),
        (3600, 14464),
        (86_400, 348_160),
    ],
)
def test_a_delay_is_rounded_up_to_seven_significant_bits_of_a_quarter_second(delay_s: float, units: int) -> None:
    """Down, and a job runs before its time; with more bits, it hops through more queues than three."""
    assert topology.delay_units(delay_s) == units


@given(delays)
def test_no_delay_is_short_or_more_than_a_sixty_fourth_late(delay_s: float) -> None:
    """`delay_s` promises not before; late by more, and nobody would call it a delay of that length."""
    units = topology.delay_units(delay_s)
    assert delay_s <= units * 0.25 <= max(delay_s * (1 + 1 / 64), delay_s + 0.25) + 1e-6
    assert units < 8**topology.PLACES


@given(delays)
def test_there_are_at_most_three_hops(delay_s: float) -> None:
    """Every hop is a write to a queue and its dead-lettering."""
    assert sum(digit != "0" for digit in format(topology.delay_units(delay_s), "o")) <= 3


def test_the_longest_delay_has_a_way_though_its_end_is_a_rounded_millisecond() -> None:
    """A job that asked for its retry in 48 days, as the README allows, was buried."""
    _, key, _ = topology.route(Queue("emails"), Priority.NORMAL, MAX_DELAY_S + 0.001)

    assert key.startswith("7.7.")


@pytest.mark.parametrize("delay_s", [0, -1, MAX_DELAY_S + 1, float("inf"), float("nan")])
def test_a_delay_that_the_ladder_does_not_have_is_refused(delay_s: float) -> None:
    """It would run at once, or never."""
    with pytest.raises(ValueError, match="at most 48 days"):
        topology.delay_units(delay_s)


@pytest.mark.parametrize("queue", KINDS, ids=repr)
@given(delay_s=delays, level=st.sampled_from(LEVELS))
def test_a_delayed_job_waits_its_time_and_ends_in_its_own_queue(queue: Queue, delay_s: float, level: Priority) -> None:
    """One binding the wrong way round, and jobs stay in the ladder for good, or come to all queues at once."""
    level = level if queue.priorities else Priority.NORMAL
    exchange, key, ladder = topology.route(queue, level, delay_s)
    assert ladder is not None
    records = topology.of_ladder(ladder) + topology.of_queue(queue) + topology.of_queue(Queue("shop", type=queue.type))

    waits, ends = walk(exchange, key, records)

    ttl = {name: arguments.get("x-message-ttl") for name, arguments in queues(records).items()}
    assert sum(int(str(ttl[name])) for name in waits) == topology.delay_units(delay_s) * topology.UNIT_MS
    assert ends == {topology.physical(queue, level)}


def test_without_a_delay_a_job_goes_straight_to_its_queue() -> None:
    """Through the ladder it would be at least a quarter of a second late."""
    assert topology.route(QUORUM, Priority.HIGH, 0) == ("lv.jobs", "shop.emails.high", None)


def test_jobs_that_wait_in_one_queue_have_one_priority() -> None:
    """Quorum queues of RabbitMQ 4.x order by AMQP's priority: an urgent job with a long wait would block all others behind it."""
    priorities: dict[str, set[int | None]] = {}
    for queue in KINDS:
        for level in queue.levels:
            exchange, _, _ = topology.route(queue, level, 60)
            seen = priority_property(queue, level)
            priorities.setdefault(exchange, set()).add(
                None if seen == topology.PRIORITY_PROPERTY[Priority.NORMAL] else seen
            )
    assert {exchange: len(seen) for exchange, seen in priorities.items() if len(seen) > 1} == {}
    assert len(priorities) == len(LEVELS)


def test_a_delay_queue_keeps_a_job_until_the_next_queue_has_it() -> None:
    """At-most-once dead-lettering lost 150 of 2 000 jobs in three kills of the broker; with drop-head it isn't at-least-once either."""
    for level in LEVELS:
        for arguments in queues(topology.of_ladder(whole(level))).values():
            assert arguments["x-queue-type"] == "quorum"
            assert (arguments["x-dead-letter-strategy"], arguments["x-overflow"]) == ("at-least-once", "reject-publish")


def test_the_delay_queues_that_are_counted_are_those_that_there_are() -> None:
    """`leveret queues` would show none of the jobs that wait at a level, or that waited for a classic queue before an upgrade."""
    declared = [set(queues(topology.of_ladder(whole(level)))) for level in LEVELS]
    assert [set(names) for names in topology.delay_queues()[:-1]] == declared
    assert {"lv.delay.classic.250ms", "lv.delay.classic.3670016s"} <= set(topology.delay_queues()[-1])


def test_a_ladder_grows_upwards() -> None:
    """A count ends at the first queue that isn't there: it would leave out the jobs in the queues after a gap."""
    declared = topology.of_ladder(whole(Priority.LOW))
    for places in range(1, topology.PLACES + 1):
        lower = topology.of_ladder(Ladder(Priority.LOW, places))
        assert lower == declared[: len(lower)]
        assert len(queues(lower)) == 7 * places
    assert list(queues(declared)) == list(topology.delay_queues()[LEVELS.index(Priority.LOW)])


def test_a_ladders_bindings_have_a_star_for_each_word_and_no_hash() -> None:
    """A `#` costs the broker a search for each message, and matches keys of any length."""
    for record in topology.of_ladder(whole(Priority.NORMAL)) + topology.of_queue(QUORUM):
        if isinstance(record, Binding) and record.source.startswith("lv.delay."):
            assert record.key.count(".") in (
                (topology.PLACES, 24) if record.source == topology.DUE else (topology.PLACES,)
            )
            assert "#" not in record.key


def test_what_version_0_1_0_delayed_still_finds_its_queue() -> None:
    """Its ladder of 24 bits holds jobs for up to 48 days after the upgrade; a queue that is made anew meanwhile must take them."""
    for queue in KINDS:
        for level in queue.levels:
            key = "0." * 23 + "1." + f"q/shop/emails/{level.value}"
            ends = {
                destination
                for pattern, destination in bindings(topology.of_queue(queue), "lv.delay.due")
                if matches(pattern, key)
            }
            assert ends == {topology.physical(queue, level)}


def test_a_waiting_queue_says_how_long_it_holds_a_job() -> None:
    """Whoever looks at the management page at night reads the delay from the name."""
    names = {
        name: int(str(arguments["x-message-ttl"]))
        for name, arguments in queues(topology.of_ladder(whole(Priority.NORMAL))).items()
    }
    assert {name: names[name] for name in ("lv.delay.250ms", "lv.delay.1s", "lv.delay.16s", "lv.delay.3670016s")} == {
        "lv.delay.250ms": 250,
        "lv.delay.1s": 1000,
        "lv.delay.16s": 16_000,
        "lv.delay.3670016s": 3_670_016_000,
    }
    assert max(names.values()) < 1 << 32  # the broker's own limit of a time to live
    assert len(names) == len(set(names.values())) == 7 * topology.PLACES


@given(names, st.sampled_from(LEVELS), delays)
def test_the_longest_name_fits_into_a_routing_key(name: str, level: Priority, delay_s: float) -> None:
    """AMQP's are 255 bytes: a queue whose name is too long could take no delayed job."""
    for queue in (Queue(name), Queue("x" * MAX_NAME_BYTES)):
        _, key, _ = topology.route(queue, level, delay_s)
        assert len(key.encode()) <= 255
        assert key.count(".") == topology.PLACES


def test_no_name_of_leverets_own_can_be_a_users_queue() -> None:
    """A user's queue of that name would be drained by nobody, or by everybody."""
    for name in queues(
        topology.SHARED + topology.of_ladder(whole(Priority.NORMAL)) + topology.of_ladder(whole(Priority.URGENT))
    ):
        assert fnmatchcase(name, "lv.*")
        with pytest.raises(ValueError, match="reserved"):
            Queue(name)
