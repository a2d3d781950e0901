"""The fixture `leveret_rabbitmq`: the same test on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime, timezone

import pytest

from leveret import App, Attempt, Bury, ConfigurationError, Job, Queue, Retry, Snooze
from leveret.admin import Depth
from leveret.brokers.rabbitmq.admin import RabbitAdmin
from leveret.runtime import Runtime
from leveret.schemes import broker_module
from leveret.testing import LeveretRunning
from leveret.testing.real import Deletes, running_on_rabbitmq
from leveret.testing.renamed import Names
from tests.rabbit.node import Rabbit

pytestmark = pytest.mark.rabbit

PAPERS = Queue("papers")


class Paper(Job, name="paper", queue=PAPERS):
    """A job."""

    text: str = "plain"


class Copy(Job, name="copy", queue=Queue("copies", type="classic")):
    """A job of a classic queue."""

    text: str


class Unread(Job, name="unread", queue=Queue("unread")):
    """A job that this app has no handler for."""


def office() -> App[None]:
    """Return an app with every way in which a run can end."""
    app = App("office")

    @app.handler
    async def file(job: Paper, attempt: Attempt) -> Bury | Retry | Snooze | None:
        assert attempt.envelope.queue == "papers"
        match job.text:
            case "useless":
                return Bury("useless")
            case "twice" if attempt.number == 1:
                return Retry()
            case "wait" if not attempt.envelope.passes:
                return Snooze(0.25)
            case _:
                await attempt.publish(Copy(job.text))
                return None

    @app.handler
    def copy(job: Copy, attempt: Attempt) -> None:
        attempt.publish_blocking(Unread())

    return app


@pytest.fixture(scope="session")
def leveret_rabbitmq_url(rabbit: Rabbit) -> str:
    """The broker of these tests, as a project would give its own."""
    return rabbit.url


@pytest.fixture(params=["leveret_running", "leveret_rabbitmq"])
def run(request: pytest.FixtureRequest) -> LeveretRunning:
    """Each lab."""
    found: LeveretRunning = request.getfixturevalue(request.param)
    return found


async def test_the_same_test_runs_on_either_lab(run: LeveretRunning) -> None:
    """It is what the fixture is for; a difference between the two would be the memory broker's lie."""
    async with run(office()) as lab:
        ids = [(await lab.publish(Paper(text))).job_id for text in ("plain", "useless", "twice", "wait")]
        await lab.drain()

        assert [[run.number for run in lab.attempts(job_id)] for job_id in ids] == [[1], [1], [1, 2], [1, 1]]
        assert [run.outcome.reason for run in lab.buried] == ["useless"]
        assert sorted(copy.text for copy in lab.published_of(Copy)) == ["plain", "twice", "wait"]
        assert len(lab.published_of(Unread)) == 3
        assert len(lab.done) == 6
        assert all(run.envelope.queue in {"papers", "copies"} for run in lab.done)
        assert not lab.delayed


async def test_run_due_leaves_what_waits(run: LeveretRunning) -> None:
    """A test about the time before a delay is over must not wait for its end."""
    async with run(office()) as lab:
        await lab.publish(Paper(), delay_s=3600)
        await lab.publish(Paper("now"))
        await lab.run_due()
        assert [run.job for run in lab.done] == [Paper("now"), Copy("now")]
        [waiting] = lab.delayed
        assert waiting.job == Paper()
        assert 3590 < (waiting.until - lab.now).total_seconds() <= 3600


async def test_labs_of_one_queue_name_dont_meet_and_leave_nothing(
    leveret_rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests run in parallel, and after tests that failed half-way: a job of one must never run in another."""
    made: list[Names] = []

    def names(prefix: str) -> Names:
        made.append(Names(prefix))
        return made[-1]

    monkeypatch.setattr("leveret.testing.real.Names", names)
    one, other = office(), office()
    async with (
        running_on_rabbitmq(leveret_rabbitmq_url, one) as first,
        running_on_rabbitmq(leveret_rabbitmq_url, other) as second,
    ):
        await first.publish(Paper("of the first"))
        await second.publish(Paper("of the second"))
        await second.publish(Paper("useless"))
        await asyncio.gather(first.drain(), second.drain())
        assert first.published_of(Copy) == (Copy("of the first"),)
        assert second.published_of(Copy) == (Copy("of the second"),)
        depths = [await _depth(leveret_rabbitmq_url, queue.name) for queue in made[1].used]
        assert [(depth.exists, depth.dead) for depth in depths] == [(True, 1), (True, 0), (True, 0)]
    for queue in (*made[0].used, *made[1].used):
        depth = await _depth(leveret_rabbitmq_url, queue.name)
        assert (depth.exists, depth.dead, sum(depth.levels.values())) == (False, 0, 0)


async def _depth(url: str, name: str) -> Depth:
    admin = broker_module(url).open_admin(url, Runtime(app="test"))
    try:
        [depth] = await admin.depths([Queue(name)])
        return depth
    finally:
        await admin.close()


async def test_time_cant_be_moved(leveret_rabbitmq: LeveretRunning) -> None:
    """A test that is written for both labs must fail with the reason, not with a job that didn't run."""
    async with leveret_rabbitmq(office()) as lab:
        with pytest.raises(RuntimeError, match="the time of a real broker can't be moved"):
            lab.advance(60)
        with pytest.raises(RuntimeError, match="the time of a real broker can't be moved"):
            lab.advance_to(datetime.now(timezone.utc))
    with pytest.raises(ConfigurationError, match="the time of a real broker can't be set"):
        leveret_rabbitmq(office(), now=datetime.now(timezone.utc))


async def test_a_job_that_doesnt_end_is_named(
    leveret_rabbitmq: LeveretRunning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test would hang until its own time-out, without a word."""
    monkeypatch.setattr("leveret.testing.real.PATIENCE_S", 0.2)
    async with leveret_rabbitmq(office()) as lab:
        receipt = await lab.publish(Paper(), delay_s=60)
        with pytest.raises(
            RuntimeError, match=re.escape(f"1 jobs haven't ended after 0.2 s, the first is paper {receipt.job_id}")
        ):
            await lab.drain()


async def test_an_app_without_handlers_only_publishes(leveret_rabbitmq: LeveretRunning) -> None:
    """As in the lab in memory."""
    async with leveret_rabbitmq(App("web")) as lab:
        await lab.publish(Paper())
        await lab.drain()
        assert lab.published_of(Paper) == (Paper(),)


def test_the_admin_has_what_the_lab_takes_from_it() -> None:
    """The lab casts the admin to `Deletes`: without this assignment no checker would see a method that was renamed there."""
    url = "amqp://localhost/"
    admin = broker_module(url).open_admin(url, Runtime(app="unit"))
    assert isinstance(admin, RabbitAdmin)
    deletes: Deletes = admin
    assert callable(deletes.delete)
