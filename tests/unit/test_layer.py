"""What middleware may have besides `consume` and `publish`: its shape is checked when the app is made, and nothing else of it is read."""

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from leveret import App, Attempt, ConfigurationError, Consume, Job, Outcome, Queue
from leveret.cli.description import AppRecord, describe
from leveret.layer import readiness_of
from leveret.middleware import LayerFacts, RateLimit, Readiness, Retries, RetryWaits, Rule, Timeout
from leveret.runtime import Runtime
from leveret.testing import running

Unchecked: Any = LayerFacts
"""What the type checkers would refuse."""


class Work(Job, name="layer.work", queue=Queue("layer")):
    """A job."""


_IMPATIENT = "amqp://127.0.0.1:1/?consumer_timeout_s=120"
"""A broker that takes a job away after two minutes; nothing here connects to it."""


class Own:
    """Middleware of a user's."""

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        return await proceed(attempt)


def make_app(*layers: Any, broker: str = "memory://") -> App[None]:
    app = App("own", broker=broker, middleware=layers)

    @app.handler
    async def run(job: Work) -> None: ...

    return app


async def described(app: App[None]) -> AppRecord:
    return await describe(app, datetime(2026, 3, 28, tzinfo=timezone.utc))


def own(**members: Any) -> Any:
    """Return middleware whose class has `members` too."""
    return type("Named", (Own,), members)()


async def _async(self: object) -> Any:
    raise NotImplementedError


def _short() -> Any:
    raise NotImplementedError


def _long(self: object, one: object, two: object) -> Any:
    raise NotImplementedError


def _raises(self: object) -> Any:
    raise KeyError("there is no such setting")


def _returns(value: object) -> Callable[[object], Any]:
    return lambda self: value


@pytest.mark.parametrize("function", [_async, _short, _long, "soon"], ids=["async", "no self", "arguments", "a text"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ready_in_s", "def ready_in_s(self) -> float"),
        ("starts_now", "def starts_now(self) -> int"),
        ("passes_publish", "def passes_publish(self) -> bool"),
        ("bind", "def bind(self, runtime) -> None"),
        ("facts", "def facts(self) -> LayerFacts"),
    ],
)
def test_each_optional_method_of_a_wrong_shape_is_refused_when_the_app_is_made(
    name: str, shape: str, function: Any
) -> None:
    """The worker would end with a TypeError from somewhere deep, or take a coroutine for a yes."""
    with pytest.raises(ConfigurationError) as refused:
        make_app(own(**{name: function}))

    assert str(refused.value) == f"app 'own': the middleware Named: {name} must be `{shape}`"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"starts_per_s": "many"}, "starts_per_s must be a finite number >= 0 or None, not 'many'"),
        ({"starts_per_s": True}, "starts_per_s must be a finite number >= 0 or None, not True"),
        ({"starts_per_s": -1}, "starts_per_s must be a finite number >= 0 or None, not -1"),
        ({"starts_per_s": float("inf")}, "starts_per_s must be a finite number >= 0 or None, not inf"),
        ({"starts_per_s": _returns(1.0)}, "starts_per_s must be a finite number >= 0 or None, not <bound"),
        ({"starts_per_s": property(_raises)}, "starts_per_s raises KeyError: 'there is no such setting'"),
        ({"facts": _returns(None)}, "facts() returns NoneType, not LayerFacts"),
        ({"facts": _returns({"limit_s": 30})}, "facts() returns dict, not LayerFacts"),
        ({"facts": _raises}, "facts() raises KeyError: 'there is no such setting'"),
        (
            {"facts": lambda _: RetryWaits(max_attempts=3)},
            "facts() raises ValueError: RetryWaits: max_attempts=3 needs",
        ),
        (
            {"facts": lambda _: RetryWaits(max_attempts=None, wait="by chance")},
            "facts() raises ValueError: RetryWaits: max_attempts=None needs stop",
        ),
        ({"facts": _returns(Unchecked(limit_s="soon"))}, "Expected `int | float | null`, got `str` - at `$.limit_s`"),
        ({"facts": _returns(LayerFacts(tries_in_place=-1))}, "Expected `int` >= 0 - at `$.tries_in_place`"),
        ({"facts": _returns(Unchecked(retries=("never",)))}, "at `$.retries[0]`"),
        ({"fact": _returns(LayerFacts())}, "has a method fact(); did you mean facts()?"),
        ({"starts_nows": _returns(1)}, "has a method starts_nows(); did you mean starts_now()?"),
    ],
)
def test_what_it_says_is_checked_when_the_app_is_made(members: dict[str, Any], says: str) -> None:
    """A wrong fact would show at the start of a worker, or in `describe`, as an error about leveret's own lines."""
    with pytest.raises(ConfigurationError) as refused:
        make_app(own(**members))

    assert str(refused.value).startswith("app 'own': the middleware Named")
    assert says in str(refused.value)


def test_a_callable_instance_is_checked_like_a_class_with_consume() -> None:
    """It is middleware too: its misspelt `bind` would never be called."""

    class Called:
        async def __call__(self, attempt: Attempt, proceed: Consume) -> Outcome:
            return await proceed(attempt)

        def bind(self) -> None: ...

    with pytest.raises(ConfigurationError, match="bind must be `def bind"):
        make_app(Called())


def test_a_handlers_own_middleware_is_named_with_its_handler() -> None:
    """An app has dozens of handlers: the error must say whose list it is."""
    app = make_app()
    with pytest.raises(ConfigurationError, match=r"^handler \S+handle: the middleware Named: facts\(\) returns int"):

        @app.handler(middleware=[own(facts=_returns(7))])
        async def handle(job: Work) -> None: ...


async def test_attributes_that_only_look_like_those_of_retries_and_timeout_are_left_alone() -> None:
    """A user's middleware with a list called `rules` ended every start-up with an AttributeError."""

    class Firewall(Own):
        rules = ("a",)
        limit_s = "soon"
        max_attempts = "many"

        def __init__(self) -> None:
            self.base_s, self.cap_s, self.immediate, self.waits_s = 1, [2], object(), None

    app = make_app(Firewall(), Retries(max_attempts=2), Timeout(30))

    (handler,) = (await described(app)).handlers
    assert (handler.timeout_s, [waits.max_attempts for waits in handler.retries]) == (30, [2])
    async with running(app) as lab:
        await lab.publish(Work())
        await lab.drain()
        assert len(lab.done) == 1


async def test_facts_are_read_whatever_the_class() -> None:
    """Own middleware that ends or retries runs would escape the check of limits, and `describe` would deny it."""

    class Patient(Own):
        def facts(self) -> LayerFacts:
            waits = RetryWaits(on="HTTPError", max_attempts=6, immediate=1, ceilings_s=(1, 5, 30))
            return LayerFacts(limit_s=100, tries_in_place=1, retries=(waits,))

    (handler,) = (await described(make_app(Patient()))).handlers
    (waits,) = handler.retries
    assert handler.timeout_s == 100
    assert (waits.on, waits.max_attempts, waits.immediate) == ("HTTPError", 6, 1)
    assert waits.ceilings_s == [1, 5, 30, 30, 30]
    with pytest.raises(ConfigurationError, match="a time-out of 100 s is above three quarters"):
        await described(make_app(Patient(), broker=_IMPATIENT))


async def test_tries_in_place_of_one_count_for_the_limit_of_another() -> None:
    """`Retries` runs a `Timeout` inside it again: three times 40 s hold a delivery longer than 100 s."""
    app = make_app(Retries(Rule(OSError, immediate=2)), Timeout(40), broker=_IMPATIENT)

    with pytest.raises(ConfigurationError, match="a time-out of 40 s, 3 times per attempt, is above three quarters"):
        await described(app)


async def test_a_limit_outside_the_tries_in_place_is_counted_once() -> None:
    """A `Timeout` round `Retries` ends all tries together; counted three times, a right program would not start."""
    app = make_app(Timeout(80), Retries(Rule(OSError, immediate=2)), broker=_IMPATIENT)

    assert (await described(app)).handlers[0].timeout_s == 80


async def test_facts_that_change_their_type_later_are_refused_too() -> None:
    """They are read again when a worker starts: there, too, one clear error must come."""
    answers: list[object] = [LayerFacts(), None]

    def fickle(self: object) -> object:
        return answers.pop(0)

    app = make_app(own(facts=fickle))

    with pytest.raises(ConfigurationError, match=r"^handler \S+run: the middleware Named: facts\(\) returns NoneType"):
        await described(app)


class OnlyReady(Own):
    def ready_in_s(self) -> float:
        return 3.0


class Inherits(Own, Readiness):
    def ready_in_s(self) -> float:
        return 3.0

    @property
    def starts_per_s(self) -> float:
        return 5.0


def test_readiness_needs_only_ready_in_s() -> None:
    """Middleware written before `starts_now` and `starts_per_s` were there must go on working."""
    only, inherits = readiness_of(OnlyReady(), "here"), readiness_of(Inherits(), "here")

    assert only is not None
    assert inherits is not None
    assert (only.ready_in_s(), only.starts_now(), only.starts_per_s) == (3.0, 1, None)
    assert (inherits.ready_in_s(), inherits.starts_now(), inherits.starts_per_s) == (3.0, 1, 5.0)
    assert readiness_of(Own(), "here") is None


def test_readiness_is_as_of_now() -> None:
    """The share of a rate limit is known once the worker binds it: an earlier figure would be too high by the number of processes."""
    limit = RateLimit(50)
    before = readiness_of(limit, "here")
    limit.bind(Runtime(app="own", processes=2))
    after = readiness_of(limit, "here")

    assert before is not None
    assert after is not None
    assert (before.starts_per_s, after.starts_per_s) == (50, 25)


def test_a_subclass_of_readiness_without_ready_in_s_cannot_be_made() -> None:
    """A misspelt method would leave the queue without its brake."""

    class Misspelt(Own, Readiness):
        def ready_in(self) -> float:
            return 3.0

    with pytest.raises(TypeError, match="ready_in_s"):
        Misspelt()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
