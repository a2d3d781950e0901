"""What `leveret describe` says of an app, as records and as text; the command itself is run in tests/cli."""

from datetime import datetime, timezone
from typing import Any

import pytest
from tenacity import stop_after_attempt, stop_after_delay, wait_exponential_jitter

from leveret import App, Attempt, ConfigurationError, Consume, Envelope, Job, Keep, Outcome, Publish, Queue, Receipt
from leveret.cli.describe import text_of
from leveret.cli.description import MOST_WAITS, AppRecord, KeepRecord, describe
from leveret.middleware import RateLimit, Retries, Rule, Timeout

emails = Queue("emails")
reports = Queue("reports", type="classic")
plain = Queue("plain", priorities=False)
NOW = datetime(2026, 3, 28, 12, tzinfo=timezone.utc)


class Mail(Job, name="mail", queue=emails, expires_s=60):
    n: int


class Report(Job, name="report", queue=reports, expired="dead"):
    n: int


class Note(Job, name="note", queue=plain):
    n: int


class Stamp:
    """A layer of both sides."""

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        return await proceed(attempt)

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        return await proceed(envelope)


class Outbound:
    """A layer of the publishing side alone."""

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        return await proceed(envelope)


async def watch(attempt: Attempt, proceed: Consume) -> Outcome:
    return await proceed(attempt)


def make_app(**options: Any) -> App[None]:
    app = App("shop", **{"broker": "sqlite:///shop.db", **options})

    @app.handler(middleware=[Timeout(300), watch])
    async def send(job: Mail) -> None: ...

    @app.handler
    def write(job: Report) -> None: ...

    @app.handler
    async def note(job: Note) -> None: ...

    return app


async def described(**options: Any) -> AppRecord:
    return await describe(make_app(**options), NOW)


async def test_the_chain_is_shown_as_it_is_folded() -> None:
    """The order of layers decides what a retry, a limit and a time-out mean; nobody can see it in the code alone."""
    record = await described(middleware=[Stamp(), Outbound(), Retries(max_attempts=3), Timeout(30)])
    mail, report = record.handlers[:2]

    assert [layer.name for layer in mail.layers] == [
        "Stamp",
        "Outbound",
        "Retries(max_attempts=3, base_s=1, cap_s=600)",
        "Timeout(300)",
        "watch",
    ]
    assert [layer.name for layer in report.layers][-1] == "Timeout(30)"
    assert [(layer.consume, layer.publish) for layer in mail.layers[:2]] == [(True, True), (False, True)]
    assert record.publish_layers == ["Stamp", "Outbound"]
    text = text_of(record)
    assert "every publish passes: Stamp → Outbound → broker" in text
    assert "chain    Stamp → Retries(max_attempts=3, base_s=1, cap_s=600) → Timeout(300) → watch → " in text


async def test_a_handler_says_what_it_takes_and_how_it_runs() -> None:
    """Which function runs a job, of which queue, within which limits, is the first question about a worker."""
    record = await described(middleware=[RateLimit(50), Timeout(30)])
    mail, report, _ = record.handlers

    assert (mail.job, mail.queue, mail.runs, mail.concurrency, mail.expires_s) == (
        "mail",
        "emails",
        "on the loop",
        100,
        60,
    )
    assert mail.job_class.endswith("test_describe:Mail")
    assert mail.handler.endswith(".send")
    assert (report.runs, report.concurrency) == ("in a thread", 8)
    assert (mail.timeout_s, report.timeout_s, mail.starts_per_s) == (300, 30, 50)
    assert f"({mail.job_class}), an async def, on the event loop\n" in text_of(record)
    assert f"({report.job_class}), a def, in a thread\n" in text_of(record)
    limits = "100 at once per process (default); time limit 300 s; 50 starts per second; expires 60 s after the publish"
    assert limits in text_of(record)
    assert (mail.expired, report.expired) == ("drop", "dead")
    assert (
        "8 at once per process (default); time limit 30 s; 50 starts per second; expired jobs become dead letters"
        in text_of(record)
    )


async def test_retry_waits_are_shown_rule_by_rule() -> None:
    """How long a failing job stays in the system, and what is never tried again, is what an incident is about."""
    rules = (Rule((ValueError, KeyError), bury=True), Rule(OSError, immediate=2, max_attempts=3, base_s=10))
    record = await described(middleware=[Retries(*rules, max_attempts=4, base_s=1, cap_s=600)])
    waits = record.handlers[0].retries

    assert [(one.on, one.max_attempts, one.immediate, one.ceilings_s) for one in waits] == [
        ("ValueError, KeyError", 1, 0, []),
        ("OSError", 3, 2, [10, 20]),
        (None, 4, 0, [1, 2, 4]),
    ]
    text = text_of(record)
    assert "retries  ValueError, KeyError: buried at once" in text
    assert "OSError: 2 more tries in place, then waits of ≤10 s, ≤20 s, then buried (after 3 runs)" in text
    assert "any other failure: waits of ≤1 s, ≤2 s, ≤4 s, then buried (after 4 runs)" in text


async def test_waits_and_stops_of_tenacity_are_shown() -> None:
    """How long a failing job stays is then known to the strategy alone, so it must be readable."""
    told = Rule(KeyError, wait=lambda attempt, error: 1, immediate=1)
    patient = Rule(OSError, wait=wait_exponential_jitter(max=60), stop=stop_after_attempt(8))
    backs_off = Rule(ValueError, cap_s=8, stop=stop_after_delay(3600))
    record = await described(middleware=[Retries(told, patient, backs_off)])
    waits = record.handlers[0].retries

    assert [(one.max_attempts, one.wait, one.stop) for one in waits[1:3]] == [
        (None, "wait_exponential_jitter(max=60)", "stop_after_attempt(8)"),
        (None, None, "stop_after_delay(3600)"),
    ]
    text = text_of(record)
    assert "KeyError: 1 more try in place, then waits by the lambda at test_describe.py:" in text
    assert "OSError: waits by wait_exponential_jitter(max=60), then buried (by stop_after_attempt(8))\n" in text
    each = "waits of ≤1 s, ≤2 s, ≤4 s, ≤8 s each time"
    assert f"ValueError: {each}, then buried (by stop_after_delay(3600))\n" in text


@pytest.mark.parametrize(
    ("attempts", "cap_s", "said"),
    [
        (1, 600, "retries  buried at once"),
        (2, 600, "retries  waits of ≤1 s, then buried (after 2 runs)"),
        (1_000_000, 8, "retries  waits of ≤1 s, ≤2 s, ≤4 s, ≤8 s each time, then buried (after 1000000 runs)"),
    ],
)
async def test_many_waits_stay_readable(attempts: int, cap_s: float, said: str) -> None:
    """A thousand attempts must not print a thousand waits."""
    record = await described(middleware=[Retries(max_attempts=attempts, cap_s=cap_s)])

    assert said in text_of(record)
    assert all(len(waits.ceilings_s) <= MOST_WAITS for handler in record.handlers for waits in handler.retries)


async def test_without_retries_it_says_that_a_failure_buries() -> None:
    """Who forgot the layer finds out here, and not in the dead letters."""
    record = await described()

    assert record.handlers[0].retries == []
    assert "retries  none: a failure buries the job at once" in text_of(record)


async def test_queues_say_how_their_levels_are_served() -> None:
    """That a classic queue may starve its low level must be known before it does."""
    record = await described(broker="amqp://shop:hunter2@rabbit.example/")
    orders = {queue.name: (queue.type, queue.levels, queue.order) for queue in record.queues}

    levels = ["urgent", "high", "normal", "low"]
    assert orders["emails"] == ("quorum", levels, "by level, with ageing: no level starves")
    assert orders["reports"] == ("classic", levels, "strict priority: lower levels can starve")
    assert orders["plain"] == ("quorum", ["normal"], "one level, first in, first out")


async def test_a_queue_type_that_a_broker_does_not_know_is_shown_as_ignored() -> None:
    """An app with classic queues runs on SQLite and in tests; somebody who expects RabbitMQ's order there must be told."""
    record = await described()
    [reports] = [queue for queue in record.queues if queue.name == "reports"]

    assert (reports.type, reports.type_ignored) == ("classic", True)
    assert reports.order == "by level, with ageing: no level starves"
    assert "queue reports (type classic, ignored by this broker; " in text_of(record)


async def test_on_rabbitmq_the_physical_queues_are_named() -> None:
    """What the management page shows are these names, and nothing else."""
    record = await described(broker="amqp://shop:hunter2@rabbit.example/")
    physical = {queue.name: queue.physical for queue in record.queues}

    assert set(physical["emails"]) == {
        "emails",
        "emails.low",
        "emails.high",
        "emails.urgent",
        "emails.suspects",
        "emails.dead",
    }
    assert set(physical["reports"]) == {"reports", "reports.suspects", "reports.dead"}
    assert set(physical["plain"]) == {"plain", "plain.suspects", "plain.dead"}
    assert "  physical queues: emails" in text_of(record)


async def test_no_password_is_shown() -> None:
    """What describe prints ends in tickets."""
    record = await described(broker="amqp://shop:hunter2@rabbit.example/")

    assert record.broker == "amqp://shop:***@rabbit.example/"
    assert "hunter2" not in text_of(record)


class Size(Job[int], name="size", queue=plain, keep=Keep(result_s=60, required=True, body=True)):
    n: int


class Count(Job[int], name="count", queue=plain, keep=Keep()):
    n: int


async def test_what_is_kept_of_a_job_and_where_is_shown() -> None:
    """Nobody knows where results are, and when they go."""
    app = make_app(broker="amqp://rabbit.example/", store="postgresql://shop:hunter2@db/shop")

    @app.handler
    async def size(job: Size) -> int:
        return job.n

    record = await describe(app, NOW)

    keeps = {handler.job: handler.keep for handler in record.handlers}
    assert keeps["mail"] is None
    assert keeps["size"] == KeepRecord(result_s=60, failed_s=604_800, required=True, max_bytes=1_048_576, body=True)
    assert record.store == "postgresql://shop:***@db/shop"
    text = text_of(record)
    assert "states and results are in postgresql://shop:***@db/shop" in text
    assert (
        "a result for 60 s, at most 1048576 bytes; a failure for 604800 s; the body too; acknowledged only once" in text
    )
    assert "states and results" not in text_of(await described())


async def test_results_that_nothing_can_keep_are_refused_here() -> None:
    """A worker that can't start is noticed in the deploy, not before."""
    nowhere, wrong = App("shop", broker="amqp://rabbit.example/"), App("shop", broker="sqlite:///shop.db")
    unkept = App("shop", broker="sqlite:///shop.db")

    @nowhere.handler
    async def count(job: Count) -> int:
        return job.n

    @wrong.handler
    async def count_wrong(job: Count) -> str:
        return ""

    @unkept.handler
    async def note(job: Note) -> int:
        return job.n

    with pytest.raises(ConfigurationError, match="Count has keep=, but nothing keeps the results of jobs"):
        await describe(nowhere, NOW)
    with pytest.raises(ConfigurationError, match="returns str, but the result of Count is int"):
        await describe(wrong, NOW)
    with pytest.raises(ConfigurationError, match="returns int, but Note has no result"):
        await describe(unkept, NOW)


async def test_schedules_show_their_next_slots_in_their_zone() -> None:
    """Whether 02:30 on the night of the change is what was meant shows here, and is the same in any zone of the reader's."""
    app = make_app()
    app.cron("30 2 * * *", Note(n=1), name="night", tz="Europe/Paris")
    app.cron("0 9 * * *", Note(n=2), name="off", enabled=False)
    app.cron("0 0 30 2 *", Note(n=3), name="never")
    record = await describe(app, NOW)

    night, off, never = record.schedules
    assert night.next == ["2026-03-29T03:30:00+02:00", "2026-03-30T02:30:00+02:00", "2026-03-31T02:30:00+02:00"]
    assert (off.enabled, never.next) == (False, [])
    text = text_of(record)
    assert "night: 30 2 * * * in Europe/Paris" in text
    assert "off (off): 0 9 * * * in UTC" in text
    assert "none: the schedule has no further slot" in text


async def test_an_app_of_schedules_alone_is_described_and_an_empty_one_refused() -> None:
    """A cron app has no handlers; an app with neither most likely lacks its modules=."""
    cron = App("cron", broker="sqlite:///shop.db")
    cron.cron("0 9 * * *", Note(n=1), name="daily")

    assert (await describe(cron, NOW)).handlers == []
    with pytest.raises(ConfigurationError, match=r"has no handler and no schedule; list their modules"):
        await describe(App("empty", broker="sqlite:///shop.db"), NOW)


async def test_what_a_worker_would_refuse_is_refused_here() -> None:
    """That is what describe is run for in a pipeline, before the deploy."""
    twice = make_app()

    @twice.handler
    async def again(job: Mail) -> None: ...

    with pytest.raises(ConfigurationError, match="two handlers for job 'mail'"):
        await describe(twice, NOW)
    with pytest.raises(
        ConfigurationError, match="three quarters of the 1800 s after which the broker delivers the job again"
    ):
        await described(broker="amqp://127.0.0.1:1/", middleware=[Timeout(1799)])
    unlimited = await described(broker="sqlite:///jobs.db", middleware=[Timeout(1799)])
    assert 1799 in {handler.timeout_s for handler in unlimited.handlers}
    with pytest.raises(ConfigurationError, match="has no known scheme"):
        await described(broker="rabbit://host/")


async def test_describing_connects_to_nothing() -> None:
    """It must run in a pipeline, where there is no broker."""
    record = await described(broker="amqp://guest:guest@127.0.0.1:1/")

    assert record.features.shared
