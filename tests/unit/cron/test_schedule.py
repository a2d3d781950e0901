"""When a recurring job is due: the clock changes of 2026 as a table, and the rest against croniter and the definition."""

from datetime import datetime, timedelta, timezone
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from croniter import croniter
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.cron.schedule import check_expression, make_schedule, next_slot
from leveret.ids import is_slot_job_id, slot_job_id

UTC = timezone.utc
PARIS, NEW_YORK, LORD_HOWE = "Europe/Paris", "America/New_York", "Australia/Lord_Howe"


def at(text: str) -> datetime:
    """A UTC time of 2026, from "03-29 01:30"."""
    return datetime.fromisoformat(f"2026-{text}:00+00:00")


def slots(expression: str, tz: str, after: datetime, count: int) -> list[datetime]:
    """The next `count` slots, each found from the one before, as the scheduler does."""
    found: list[datetime] = []
    while len(found) < count:
        slot = next_slot(expression, tz, found[-1] if found else after)
        assert slot is not None
        found.append(slot)
    return found


@pytest.mark.parametrize(
    ("tz", "expression", "after", "due"),
    [
        # daily 02:30, spring: it doesn't exist, and is taken with the offset before: 03:30 summer time
        (PARIS, "30 2 * * *", "03-27 12:00", ["03-28 01:30", "03-29 01:30", "03-30 00:30"]),
        (NEW_YORK, "30 2 * * *", "03-06 12:00", ["03-07 07:30", "03-08 07:30", "03-09 06:30"]),
        # Lord Howe's clocks go on by half an hour, from 02:00 to 02:30: 02:30 is there, 02:15 isn't
        (LORD_HOWE, "30 2 * * *", "10-02 00:00", ["10-02 16:00", "10-03 15:30", "10-04 15:30"]),
        (LORD_HOWE, "15 2 * * *", "10-02 00:00", ["10-02 15:45", "10-03 15:45", "10-04 15:15"]),
        # daily, autumn: what comes twice is taken the first time
        (PARIS, "30 2 * * *", "10-23 12:00", ["10-24 00:30", "10-25 00:30", "10-26 01:30"]),
        (NEW_YORK, "30 2 * * *", "10-30 12:00", ["10-31 06:30", "11-01 07:30", "11-02 07:30"]),
        (NEW_YORK, "30 1 * * *", "10-30 12:00", ["10-31 05:30", "11-01 05:30", "11-02 06:30"]),
        (LORD_HOWE, "30 2 * * *", "04-03 00:00", ["04-03 15:30", "04-04 16:00", "04-05 16:00"]),
        (LORD_HOWE, "45 1 * * *", "04-03 00:00", ["04-03 14:45", "04-04 14:45", "04-05 15:15"]),
        # a list of hours is times of day as well
        (PARIS, "0 2,3 * * *", "03-29 00:30", ["03-29 01:00", "03-30 00:00", "03-30 01:00"]),
        # hourly: every hour that passes, no more and no less
        (PARIS, "0 * * * *", "03-28 23:30", ["03-29 00:00", "03-29 01:00", "03-29 02:00"]),
        (PARIS, "0 * * * *", "10-24 23:30", ["10-25 00:00", "10-25 01:00", "10-25 02:00"]),
        (NEW_YORK, "0 * * * *", "03-08 05:30", ["03-08 06:00", "03-08 07:00", "03-08 08:00"]),
        (NEW_YORK, "0 * * * *", "11-01 04:30", ["11-01 05:00", "11-01 06:00", "11-01 07:00"]),
        # at Lord Howe, 02:00 doesn't come in October, and comes after 01:30 has come twice in April
        (LORD_HOWE, "0 * * * *", "10-03 14:00", ["10-03 14:30", "10-03 16:00", "10-03 17:00"]),
        (LORD_HOWE, "0 * * * *", "04-04 13:30", ["04-04 14:00", "04-04 15:30", "04-04 16:30"]),
        # every quarter of an hour
        (PARIS, "*/15 * * * *", "03-29 00:40", ["03-29 00:45", "03-29 01:00", "03-29 01:15"]),
        (PARIS, "*/15 * * * *", "10-25 00:40", ["10-25 00:45", "10-25 01:00", "10-25 01:15"]),
        (NEW_YORK, "*/15 * * * *", "03-08 06:40", ["03-08 06:45", "03-08 07:00", "03-08 07:15"]),
        (NEW_YORK, "*/15 * * * *", "11-01 05:40", ["11-01 05:45", "11-01 06:00", "11-01 06:15"]),
        (LORD_HOWE, "*/15 * * * *", "10-03 15:10", ["10-03 15:15", "10-03 15:30", "10-03 15:45"]),
        (LORD_HOWE, "*/15 * * * *", "04-04 14:40", ["04-04 14:45", "04-04 15:00", "04-04 15:15", "04-04 15:30"]),
    ],
)
def test_the_clock_changes_of_2026(tz: str, expression: str, after: str, due: list[str]) -> None:
    """Twice a year a report is missing, or comes twice, and nobody knows why."""
    assert slots(expression, tz, at(after), len(due)) == [at(one) for one in due]


def test_a_scheduler_started_inside_the_skipped_hour_still_finds_its_times() -> None:
    """A restart at 03:10 on the morning of the change must not lose the 02:30 that comes at 03:30."""
    assert next_slot("30 2 * * *", PARIS, at("03-29 01:10")) == at("03-29 01:30")
    assert next_slot("30 2 * * *", PARIS, at("03-29 01:30")) == at("03-30 00:30")


def test_times_in_and_after_a_short_gap_come_in_their_order() -> None:
    """Lord Howe's 02:05 comes at 02:35, after which 02:40 is still to come."""
    assert slots("5,25,40 2 * * *", LORD_HOWE, at("10-03 15:00"), 3) == [
        at("10-03 15:35"),
        at("10-03 15:40"),
        at("10-03 15:55"),
    ]


def test_what_never_comes_is_none() -> None:
    """30 February would otherwise be looked for for ever."""
    assert next_slot("0 0 30 2 *", "UTC", at("01-01 00:00")) is None


FIELDS = (("0", "59"), ("0", "23"), ("1", "28"), ("1", "12"), ("0", "6"))


def field(low: int, high: int) -> st.SearchStrategy[str]:
    number = st.integers(low, high)
    return st.one_of(
        st.just("*"),
        number.map(str),
        st.lists(number, min_size=2, max_size=4, unique=True).map(lambda numbers: ",".join(map(str, sorted(numbers)))),
        st.integers(2, max(2, (high - low) // 2)).map("*/{}".format),
        st.tuples(number, number).filter(lambda ends: ends[0] < ends[1]).map(lambda ends: f"{ends[0]}-{ends[1]}"),
    )


EXPRESSIONS = st.tuples(*(field(int(low), int(high)) for low, high in FIELDS)).map(" ".join)
INSTANTS = st.integers(1_704_000_000, 1_893_000_000).map(lambda seconds: datetime.fromtimestamp(seconds, UTC))


@given(expression=EXPRESSIONS, after=INSTANTS)
@settings(max_examples=150)
def test_in_utc_it_is_croniter(expression: str, after: datetime) -> None:
    """Where no clock changes there is nothing to decide: what everybody's cron says is right."""
    expected = croniter(expression, after).get_next(datetime)

    assert next_slot(expression, "UTC", after) == expected


@given(
    expression=EXPRESSIONS,
    zone=st.sampled_from([PARIS, NEW_YORK, LORD_HOWE, "Asia/Kathmandu", "America/St_Johns"]),
    after=INSTANTS,
)
@settings(max_examples=100)
def test_slots_only_ever_rise(expression: str, zone: str, after: datetime) -> None:
    """An instant that comes twice is a job with the same id twice; one that goes back is a loop."""
    found = slots(expression, zone, after, 5)

    assert after < found[0]
    assert all(earlier < later for earlier, later in pairwise(found))


CHANGES = st.sampled_from(
    [
        (PARIS, at("03-29 01:00")),
        (PARIS, at("10-25 01:00")),
        (NEW_YORK, at("03-08 07:00")),
        (NEW_YORK, at("11-01 06:00")),
        (LORD_HOWE, at("04-04 15:00")),
        (LORD_HOWE, at("10-03 15:30")),
    ]
)
MINUTES = st.lists(st.sampled_from([0, 1, 5, 15, 29, 30, 31, 45, 59]), min_size=1, max_size=4, unique=True)
DAY = 24 * 60


@given(change=CHANGES, minute=MINUTES, step=st.integers(1, 4), shift=st.integers(-300, 300))
@settings(max_examples=100)
def test_an_interval_fires_whenever_the_wall_clock_shows_it(
    change: tuple[str, datetime], minute: list[int], step: int, shift: int
) -> None:
    """By definition: walk the minutes that really pass, look at the clock on the wall each time."""
    tz, moment = change
    after = moment + timedelta(minutes=shift)
    walked = ((one, one.astimezone(ZoneInfo(tz))) for one in (after + timedelta(minutes=n) for n in range(1, DAY)))

    found = next_slot(f"{','.join(map(str, minute))} {'*' if step == 1 else f'*/{step}'} * * *", tz, after)

    assert found == next(one for one, wall in walked if wall.minute in minute and wall.hour % step == 0)


@given(
    change=CHANGES,
    minute=MINUTES,
    hour=st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True),
    shift=st.integers(-300, 300),
)
@settings(max_examples=100)
def test_times_of_day_come_once_each(
    change: tuple[str, datetime], minute: list[int], hour: list[int], shift: int
) -> None:
    """By definition: each time on the clock's face is one instant: the first of two, and for none the one with the offset before."""
    tz, moment = change
    after = moment + timedelta(minutes=shift)
    midnight = after.astimezone(ZoneInfo(tz)).replace(tzinfo=None, hour=0, minute=0)
    faces = (midnight + timedelta(days=d, hours=h, minutes=m) for d in (-1, 0, 1, 2) for h in hour for m in minute)
    instants = [one.replace(tzinfo=ZoneInfo(tz), fold=0).astimezone(UTC) for one in faces]

    found = next_slot(f"{','.join(map(str, minute))} {','.join(map(str, hour))} * * *", tz, after)

    assert found == min(one for one in instants if one > after)


PARTS = """* 0 1 5 7 L W ? 1-5 1-5/2 fri#2 fri#6 fri#0 sun-sat sat-sun fri-mon L5 l5 15W 1W 32W */99 */2 5/2 0/5 30-10 # 1#2 jan jan-mar dec-jan MON,FRI 1,2,3
    1- L-3 lw mon#1,tue#2 5-5 */ ** *-5 1/ ?/5 *,1 fri#L 7-1 6-7 1L 1,L 60 24 ٥ -1 1.5 @daily""".split()  # noqa: SIM905 - a line of 57 quotes isn't read


@given(places=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(PARTS)), min_size=1, max_size=2))
@settings(max_examples=300)
def test_it_takes_what_croniter_takes_and_nothing_else(places: list[tuple[int, str]]) -> None:
    """A schedule that passes when the app is made and fails in `leveret cron` is found too late; one refused for nothing is a day lost."""
    fields = ["0", "0", "*", "*", "*"]
    for place, part in places:
        fields[place] = part
    expression = " ".join(fields)

    try:
        check_expression(expression)
    except ValueError:
        assert not croniter.is_valid(expression), expression
    else:
        assert croniter.is_valid(expression), expression


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("", "five fields"),
        ("* * * *", "five fields"),
        ("* * * * * * *", "five fields"),
        ("60 * * * *", "minute must be 0 to 59, *, a list, a range or a step, not '60'"),
        ("* 24 * * *", "hour must be 0 to 23, *, a list, a range or a step, not '24'"),
        ("* * 0 * *", "day of month must be 1 to 31, *, a list, a range or a step, not '0'"),
        ("* * * 13 *", "month must be 1 to 12 or JAN to DEC, *, a list, a range or a step, not '13'"),
        ("* * * * 8", "day of week must be 0 to 7 or MON to SUN, *, a list, a range or a step, not '8'"),
        ("* * * * FRY", "day of week must be 0 to 7 or MON to SUN, *, a list, a range or a step, not 'FRY'"),
        ("* * * JANUARY *", "month must be 1 to 12 or JAN to DEC, *, a list, a range or a step, not 'JANUARY'"),
        ("*/0 * * * *", "minute must be 0 to 59, *, a list, a range or a step, not '*/0'"),
        ("5- * * * *", "minute must be 0 to 59, *, a list, a range or a step, not '5-'"),
        ("1,,2 * * * *", "minute must be 0 to 59, *, a list, a range or a step, not '1,,2'"),
        ("@daily", "five fields"),
        ("61 * * * * *", "second must be 0 to 59, *, a list, a range or a step, not '61'"),
    ],
)
def test_a_wrong_expression_is_refused_and_its_field_named(expression: str, named: str) -> None:
    """`cron expression is invalid` sends people to count stars."""
    with pytest.raises(ValueError, match="cron expression") as refused:
        check_expression(expression)

    assert named in str(refused.value)


@pytest.mark.parametrize(
    "expression",
    [
        "0 9 * * MON-FRI",
        "*/5 8-18 * JAN,JUL *",
        "0 0 1 * *",
        "59 23 31 12 7",
        "*/10 * * * * *",
        "0 0 L * *",
        "0 0 15W * *",
        "0 0 * * FRI#2",
        "0 0 * * L5",
    ],
)
def test_what_cron_knows_is_taken(expression: str) -> None:
    """A check that is stricter than cron itself makes people write something else than they mean."""
    check_expression(expression)
    assert next_slot(expression, PARIS, at("01-01 00:00")) is not None


@pytest.mark.parametrize("zone", ["Europe/Atlantis", "", "+02:00", "../etc/passwd", "CEST-is-not-one"])
def test_a_wrong_zone_is_refused(zone: str) -> None:
    """At the decorator's line, not at nine in the morning."""
    with pytest.raises(ValueError, match="isn't a known IANA time zone"):
        make_schedule("0 9 * * *", lambda: None, name="s", tz=zone, enabled=True)


@pytest.mark.parametrize("name", ["", "a b", "x" * 81, "ä"])
def test_a_wrong_name_is_refused(name: str) -> None:
    """It is part of job ids, which travel through brokers and logs."""
    with pytest.raises(ValueError, match="a schedule's name must have 1 to 80"):
        make_schedule("0 9 * * *", lambda: None, name=name, tz="UTC", enabled=True)


def test_a_slot_has_one_id_whatever_its_zone() -> None:
    """Two replicas in two zones, or a restart, must publish the same job."""
    slot = at("07-01 07:00")

    assert slot_job_id("shop", "digest", slot) == "shop.digest@2026-07-01T07:00:00Z"
    assert slot_job_id("shop", "digest", slot.astimezone(ZoneInfo(NEW_YORK))) == "shop.digest@2026-07-01T07:00:00Z"


@pytest.mark.parametrize(
    ("job_id", "app"),
    [
        ("shop.digest@2026-07-01T07:00:00Z", "other"),
        ("shop.digest@2026-07-01T07:00:00Z", None),
        ("shop.digest@2026-07-01T07:00Z", "shop"),
        ("order@2026-07-01T07:00:00Z", "order"),
        ("019a0000-0000-7000-8000-00000000000Z", "shop"),
    ],
)
def test_only_the_id_of_a_slot_is_taken_for_one(job_id: str, app: str | None) -> None:
    """A second job under a publisher's own id must run: only a slot's id says that both are one job."""
    assert is_slot_job_id(slot_job_id("shop", "a.b-c_d", at("07-01 07:00")), "shop")
    assert not is_slot_job_id(job_id, app)


def test_a_function_gets_its_slot_in_the_schedules_zone() -> None:
    """What it prints and computes with is the local day, and 23:30 is still that day."""
    got: list[datetime] = []

    def emit(slot: datetime) -> None:
        got.append(slot)

    make_schedule("30 23 * * *", emit, name=None, tz=PARIS, enabled=True).job(at("07-01 21:30"))

    assert got == [at("07-01 21:30")]
    assert (got[0].hour, str(got[0].tzinfo)) == (23, PARIS)
