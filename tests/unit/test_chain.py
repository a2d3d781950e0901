"""How layers fold, and which are refused when the app is made."""

from collections.abc import Callable
from typing import Any

import pytest

from leveret import App, Attempt, ConfigurationError, Consume, Envelope, Job, Outcome, Publish, Queue, Receipt
from leveret.chain import layers_of
from leveret.middleware import Retries, Timeout
from leveret.testing import running

work = Queue("chain")
Unchecked: Any = App
"""What the type checkers would refuse."""


class Work(Job, name="chain.work", queue=work):
    """A job."""


class Noted:
    """A layer that writes down when it is entered and left."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        self.notes.append(f">{self.name}")
        outcome = await proceed(attempt)
        self.notes.append(f"<{self.name}")
        return outcome


async def test_first_in_the_list_is_outermost_and_a_handlers_own_come_innermost() -> None:
    """A retry would run outside of its trace, a rate limit inside of its time-out."""
    notes: list[str] = []
    app = App("order", broker="memory://", middleware=[Noted("a", notes), Noted("b", notes)])

    @app.handler(middleware=[Noted("c", notes)])
    async def run(job: Work) -> None:
        notes.append("run")

    async with running(app) as lab:
        await lab.publish(Work())
        await lab.drain()

    assert notes == [">a", ">b", ">c", "run", "<c", "<b", "<a"]


def test_a_handlers_once_layer_stands_where_the_apps_stood() -> None:
    """A Timeout(300) inside the app's Timeout(30) would end at 30."""
    retries, short, long = Retries(), Timeout(30), Timeout(300)

    assert layers_of((short, retries), (long,)) == (long, retries)
    assert layers_of((retries,), (long,)) == (retries, long)


async def test_a_layer_that_forgets_to_return_is_an_error_and_not_done() -> None:
    """A burial would become done: a failed job would be lost without a word."""

    async def forgets(attempt: Attempt, proceed: Consume) -> Outcome:
        await proceed(attempt)
        return None  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    app = App("forgets", broker="memory://", middleware=[forgets])

    @app.handler
    async def run(job: Work) -> None: ...

    async with running(app) as lab:
        await lab.publish(Work())
        await lab.drain()

        (buried,) = lab.buried
    assert "forgets" in str(buried.error)
    assert "missing return" in str(buried.error)


class Sync:
    def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        raise NotImplementedError


class Short:
    async def consume(self, attempt: Attempt) -> Outcome:
        raise NotImplementedError


class Misnamed:
    async def consum(self, attempt: Attempt, proceed: Consume) -> Outcome:
        raise NotImplementedError


class SecondMisspelt:
    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        raise NotImplementedError

    async def publsh(self, envelope: Envelope, proceed: Publish) -> Receipt:
        raise NotImplementedError


class WrongReadiness:
    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        raise NotImplementedError

    async def ready_in_s(self) -> float:
        raise NotImplementedError


async def one_parameter(attempt: Attempt) -> Outcome:
    raise NotImplementedError


_retries = Retries()


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([Sync()], "consume must be `async def"),
        ([Short()], "consume must be `async def"),
        ([Misnamed()], r"\(rename consum\(\) to consume\(\)\?\)"),
        ([SecondMisspelt()], r"publsh\(\); did you mean publish\(\)"),
        ([WrongReadiness()], "ready_in_s must be `def"),
        ([one_parameter], "async def middleware"),
        ([lambda attempt, proceed: None], "async def middleware"),
        ([Retries], "is a class"),
        ([7], r"neither consume\(\) nor publish\(\)"),
        (7, "middleware= takes a list"),
        ([_retries, _retries], "listed twice"),
        ([Retries(), Retries(max_attempts=2)], "two Retries in one list"),
    ],
)
def test_a_layer_of_a_wrong_shape_is_refused_when_the_app_is_made(layers: Any, says: str) -> None:
    """It would never run, and nobody would notice until it was needed."""
    with pytest.raises(ConfigurationError, match=says):
        App("wrong", middleware=layers)
    app = Unchecked("right")
    with pytest.raises(ConfigurationError, match=says):
        app.handler(middleware=layers)(one_parameter)


async def test_a_time_out_that_the_broker_would_undercut_is_refused_at_start() -> None:
    """The broker would close the channel under the job and deliver it again, for ever."""
    app = App("slow", broker="amqp://127.0.0.1:1/?consumer_timeout_s=120", middleware=[Timeout(100)])

    @app.handler
    async def run(job: Work) -> None: ...

    with pytest.raises(ConfigurationError, match=r"run: a time-out of 100 s is above three quarters"):
        async with app.worker(queues=[]):
            pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Unchecked(""), "an app's name"),
        (lambda: Unchecked("x", broker=7), "broker must be a URL"),
        (lambda: Unchecked("x", lifespan="shop"), "lifespan must be a function"),
        (lambda: Unchecked("x", modules="shop.handlers"), "modules must be a list"),
        (lambda: Unchecked("x", around_sync=7), "around_sync must be a function"),
        (lambda: Unchecked("x", settings={}), "settings must be a Settings"),
        (lambda: Unchecked("x").worker(queues="emails"), "queues must be a list"),
    ],
)
def test_a_wrong_argument_of_the_app_is_one_clear_error(make: Callable[[], Any], says: str) -> None:
    """The mistake would show as a traceback from somewhere deep, at start-up in production."""
    with pytest.raises(ConfigurationError, match=says):
        make()
