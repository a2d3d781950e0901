"""How many jobs run at once: what code, LEVERET_CONCURRENCY and the command line set, and which of them counts."""

import asyncio
import logging
import time
from typing import Any

import pytest

from leveret import App, ConfigurationError, Job, Queue
from leveret.cli.description import describe
from leveret.consuming.limits import COMMAND_LINE, Concurrency, Limits, in_environment, limits_of
from leveret.consuming.worker import working
from leveret.process.options import WorkOptions
from leveret.testing import running
from tests.unit.cli.test_describe import NOW

QUEUES = ("emails", "pdf")


class Mail(Job, name="mail", queue=Queue("emails")):
    """A job for the loop."""


class Pdf(Job, name="pdf", queue=Queue("pdf")):
    """A job for a thread."""


def make_app(**options: Any) -> App[None]:
    app = App("shop", broker="memory://", **options)

    @app.handler
    async def mail(job: Mail) -> None: ...

    @app.handler
    def pdf(job: Pdf) -> None: ...

    return app


def limits(app: App[None], options: WorkOptions, *served: str) -> Limits:
    return limits_of([*app.concurrency(), options.limits], served=served or QUEUES, known=QUEUES, app="shop")


@pytest.mark.parametrize(
    ("code", "variable", "command_line", "expected"),
    [
        (None, None, {}, [100, 8]),
        ({"emails": 50}, None, {}, [50, 8]),
        ({"emails": 500}, None, {}, [500, 8]),
        ({"emails": 50, "pdf": 2}, None, {}, [50, 2]),
        (20, None, {}, [20, 20]),
        ({"emails": 50}, "emails=40", {}, [40, 8]),
        ({"emails": 50}, "pdf=3", {}, [50, 3]),
        (20, " 30, emails = 10 ", {}, [10, 30]),
        ({"emails": 50}, "20", {}, [20, 20]),
        (20, "30,emails=10", {"concurrency": 40}, [10, 40]),
        (20, "30,emails=10", {"queues": {"emails": 5, "pdf": None}}, [5, 30]),
        ({"emails": 50}, "", {"queues": {"emails": None}}, [50, 8]),
    ],
)
def test_each_limit_is_the_one_of_the_place_that_takes_precedence(
    monkeypatch: pytest.MonkeyPatch,
    code: Any,
    variable: str | None,
    command_line: dict[str, Any],
    expected: list[int],
) -> None:
    """An operator who sets one queue's limit must neither lose the other limits nor be overruled by code."""
    monkeypatch.delenv("LEVERET_CONCURRENCY", raising=False)
    if variable is not None:
        monkeypatch.setenv("LEVERET_CONCURRENCY", variable)
    found = limits(make_app(concurrency=code), WorkOptions(app="shop:app", **command_line))

    assert [found.of("emails", in_threads=False), found.of("pdf", in_threads=True)] == expected


def test_a_queue_that_this_worker_does_not_take_from_raises_no_other_limit() -> None:
    """A worker of `--queue pdf` would run 500 jobs at once, because the emails may."""
    found = limits(make_app(concurrency={"emails": 500}), WorkOptions(app="shop:app"), "pdf")

    assert found.concurrency == 100


@pytest.mark.parametrize(
    "wrong",
    [
        0,
        -1,
        True,
        1.5,
        "50",
        2**62,
        10**5000,
        {"emails": 0},
        {"emails": "50"},
        {"emails": True},
        {"emails": 2**62},
        {5: 5},
    ],
    ids=lambda wrong: f"{str(wrong)[:20] if wrong != 10**5000 else '10**5000'}",
)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_wrong_number_in_code_is_refused_at_its_line(wrong: Any, embedded: bool) -> None:
    """A worker with a limit of "50" would end in a TypeError at its first job."""
    where = "app 'shop': worker\\(\\)" if embedded else "app 'shop'"
    with pytest.raises(ConfigurationError, match=rf"^{where}: concurrency .*must be a (whole )?number.*, not "):
        make_app().worker(concurrency=wrong) if embedded else make_app(concurrency=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        "many",
        "0",
        "-1",
        "1.5",
        "emails",
        "emails=",
        "=5",
        "emails=x",
        "emails=0",
        "10,,emails=5",
        "10,",
        "٣",
        "100001",
        "9" * 5000,
    ],
)
def test_a_wrong_variable_is_one_line_that_shows_it(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """An operator corrects what the line shows; a variable that is half read would be worse."""
    monkeypatch.setenv("LEVERET_CONCURRENCY", wrong)
    with pytest.raises(ConfigurationError, match=r"^LEVERET_CONCURRENCY .*: expected N or QUEUE=N.*100,emails=50$"):
        make_app().worker()


@pytest.mark.parametrize(("twice", "what"), [("5,6", "the process"), ("emails=5,emails=6", "queue 'emails'")])
def test_a_limit_that_the_variable_sets_twice_is_refused(twice: str, what: str) -> None:
    """Nobody knows which of the two the operator meant."""
    with pytest.raises(ConfigurationError, match=f"the limit of {what} is given twice"):
        in_environment(twice)


def test_queues_with_limits_are_not_a_list_of_names() -> None:
    """The names would be taken and the limits forgotten: a queue that must run one job at a time runs a hundred."""
    with pytest.raises(ConfigurationError, match=r"queues must be a list of names, .*limits go into concurrency="):
        make_app().worker(queues={"emails": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_queue_that_the_app_does_not_have_is_an_error_in_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo would leave the queue without its limit."""
    monkeypatch.delenv("LEVERET_CONCURRENCY", raising=False)
    app = make_app(concurrency={"emials": 5})
    with pytest.raises(
        ConfigurationError, match=r"no handler for queue 'emials' \(queues with handlers: emails, pdf\)"
    ):
        async with working(app):
            pass
    with pytest.raises(ConfigurationError, match="'emials'"):
        await describe(app, NOW)


async def test_a_worker_of_other_queues_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`leveret work --queue pdf` would refuse an app for the limit of its emails."""
    monkeypatch.delenv("LEVERET_CONCURRENCY", raising=False)
    async with working(make_app(concurrency={"emails": 5, "pdf": 2}), queues=["pdf"]) as work:
        assert [one.prefetch for one in work.consumer.subscriptions] == [4]


async def test_a_queue_that_the_app_does_not_have_is_a_warning_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Several services may share an environment; a release that drops a queue must not stop all workers."""
    monkeypatch.setenv("LEVERET_CONCURRENCY", "emials=5,pdf=2")
    with caplog.at_level(logging.WARNING):
        async with working(make_app()) as work:
            assert [one.prefetch for one in work.consumer.subscriptions] == [200, 4]

    [line] = [record.getMessage() for record in caplog.records if "LEVERET_CONCURRENCY" in record.getMessage()]
    assert "'emials' (queues with handlers: emails, pdf); this limit has no effect" in line


async def test_an_embedded_worker_has_the_limits_of_its_call_but_the_environment_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The service that embeds a worker shares its loop: its author and its operator both limit the jobs."""
    monkeypatch.setenv("LEVERET_CONCURRENCY", "pdf=3")
    app, seen = make_app(concurrency={"emails": 7, "pdf": 2}), list[Limits]()

    def noted(*places: Any, **names: Any) -> Limits:
        seen.append(limits_of(*places, **names))
        return seen[0]

    monkeypatch.setattr("leveret.consuming.worker.limits_of", noted)

    async with app.worker(concurrency={"emails": 5, "pdf": 4}):
        pass

    assert seen[0].queues == {"emails": 5, "pdf": 3}


async def test_a_test_does_not_read_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test would fail in the shell of whoever set it."""
    monkeypatch.setenv("LEVERET_CONCURRENCY", "nonsense")
    async with running(make_app(concurrency={"emails": 5})) as lab:
        await lab.publish(Mail())
        await lab.drain()
        assert len(lab.done) == 1


async def test_describe_says_who_set_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With three places that set a limit, an operator changes the wrong one."""
    monkeypatch.setenv("LEVERET_CONCURRENCY", "emails=40")
    app = App("shop", broker="sqlite:///x.db", concurrency={"emails": 50, "pdf": 3})
    for handler in make_app()._registrations:  # pyright: ignore[reportPrivateUsage]
        app.handler(handler.function)

    handlers = (await describe(app, NOW)).handlers

    assert [(one.concurrency, one.concurrency_from) for one in handlers] == [(40, "LEVERET_CONCURRENCY"), (3, "code")]


def test_the_limit_that_binds_is_the_one_that_is_named() -> None:
    """`emails=50` means 8 for `def` handlers; describe must not say that code set the 8."""
    found = limits_of(
        [Concurrency(queues={"emails": 50}), Concurrency(origin=COMMAND_LINE)], served=QUEUES, known=QUEUES, app="shop"
    )

    assert (found.of("emails", in_threads=True), found.origin_of("emails", in_threads=True)) == (8, "default")
    assert (found.of("emails", in_threads=False), found.origin_of("emails", in_threads=False)) == (50, "code")


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        (
            Concurrency(origin=COMMAND_LINE, queues={"pdf": 50, "emails": 500}),
            "queue pdf runs 8 jobs at once, not 50 (command line): 8 is the limit of the process for `def` handlers (default); raise it with --concurrency 50",
        ),
        (
            Concurrency(process=5, queues={"pdf": 2, "emails": 6}),
            "queue emails runs 5 jobs at once, not 6 (code): 5 is the limit of the process (code); raise it with --concurrency 6",
        ),
    ],
)
async def test_a_limit_above_the_one_of_the_process_is_a_warning(
    limits: Concurrency, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`--queue pages=50` that runs 8 at once looks like a slow broker."""
    async with working(make_app(), concurrency=[limits]) as work:
        assert work.at_once == {**limits.queues, line.split()[1]: int(line.split()[3])}
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [line]


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan"), "30", True, None])
def test_a_wrong_grace_of_an_embedded_worker_is_refused_at_its_line(wrong: Any) -> None:
    """It would be a TypeError at the stop, when the jobs still run."""
    with pytest.raises(ConfigurationError, match=r"^app 'shop': worker\(\): grace_s must be a finite number"):
        make_app().worker(grace_s=wrong)


async def test_an_embedded_worker_takes_from_every_queue_and_keeps_to_its_grace() -> None:
    """A service that reloads would wait 30 s for each job that hangs."""
    app, begun = App("shop", broker="memory://"), asyncio.Event()

    @app.handler
    async def mail(job: Mail) -> None:
        begun.set()
        await asyncio.sleep(3600)

    async with app.worker(grace_s=0.1), app.publisher() as publisher:
        await publisher.publish(Mail())
        await begun.wait()
        left = time.monotonic()

    assert time.monotonic() - left < 5
