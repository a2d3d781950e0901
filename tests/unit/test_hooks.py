"""Fields of types that msgspec doesn't know: a job class's `enc_hook` and `dec_hook`, from the publisher to the handler."""

import asyncio
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest

from leveret import App, InvalidJob, Job, Queue, Settings
from leveret.codec import Decoder, UndecodableError, encoder
from leveret.testing import running

QUEUE = Queue("orders")


class Customer(pydantic.BaseModel):
    """A user's model."""

    email: str
    credit: Decimal = Decimal("0.5")


class Point:
    """A type that neither msgspec nor pydantic knows."""


def encode(value: Any) -> Any:
    return value.model_dump(mode="json")


def decode(kind: type[Any], value: Any) -> Any:
    return kind.model_validate(value)


class ShopJob(Job, enc_hook=encode, dec_hook=decode):
    """Abstract: its subclasses have its hooks."""


class Bill(ShopJob, name="bill", queue=QUEUE):
    customer: Customer
    others: dict[str, Customer] = msgspec.field(default_factory=dict[str, Customer])


class Bare(Job, name="bare", queue=QUEUE):
    customer: Customer


class Shout(ShopJob, name="shout", queue=QUEUE, enc_hook=lambda value: {"email": value.email.upper()}):
    customer: Customer


ADA = Customer(email="ada@example.org", credit=Decimal("1.25"))


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
async def test_a_model_arrives_as_a_model(encoding: Any) -> None:
    """Who has pydantic models would write each of them a second time for the queue."""
    app, seen = App("shop", settings=Settings(encoding=encoding)), list[Bill]()

    @app.handler
    async def handle(bill: Bill) -> None:
        seen.append(bill)

    async with running(app) as lab:
        await lab.publish(Bill(ADA, {"bob": Customer(email="bob@example.org")}))
        await lab.drain()
        assert lab.published[0].job == seen[0] == Bill(ADA, {"bob": Customer(email="bob@example.org")})


def test_each_hook_is_inherited_by_itself() -> None:
    """A job that needs one other hook would have to repeat both, or would silently lose one."""
    body = encoder(Shout, "json")(Shout(ADA))

    assert body == b'{"customer":{"email":"ADA@EXAMPLE.ORG"}}'
    assert Decoder(Shout).decode(body, "application/json") == Shout(Customer(email="ADA@EXAMPLE.ORG"))


async def test_what_a_hook_refuses_is_refused_at_the_publisher() -> None:
    """A wrong job would be buried far from the code that made it."""
    app = App("shop")
    app.handler(job=Bill)(lambda _: None)
    odd: Any = Bill(Customer.model_construct(email=None))
    async with running(app) as lab:
        with pytest.raises(
            InvalidJob, match=r"^bill to queue orders: the job can't be encoded: 'Point' object has no attribute"
        ):
            await lab.publish(Bill(Point()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        with pytest.raises(
            InvalidJob, match=r"can't be decoded as Bill: 1 validation error for Customer email Input should be"
        ):
            await lab.publish(odd)


async def test_what_a_hook_refuses_at_a_worker_is_buried_with_its_words(caplog: pytest.LogCaptureFixture) -> None:
    """A foreign producer's mistake must be found in the dead letter, on one line, and must not stop the jobs behind it."""

    class Foreign(Job, name="bill", queue=QUEUE):
        customer: dict[str, int]

    app, seen = App("shop"), list[str]()

    @app.handler
    async def handle(bill: Bill) -> None:
        seen.append(bill.customer.email)

    async with running(app) as lab:
        await lab.publish(Foreign({"credit": 1}))
        await lab.publish(Bill(ADA))
        await lab.drain()
    assert seen == ["ada@example.org"]
    buried = "is buried in orders.dead: the body can't be decoded as Bill: 1 validation error for Customer email Field required"
    assert buried in caplog.text


def test_any_error_of_a_hook_is_an_undecodable_body() -> None:
    """Any other exception would be a crash of the consumer, not a dead letter."""

    def broken(kind: type[Any], value: Any) -> Any:
        raise KeyError(f"no {kind.__name__}\nhere")

    class Broken(Job, name="broken", queue=QUEUE, dec_hook=broken):
        customer: Customer

    with pytest.raises(
        UndecodableError, match=r"^the body can't be decoded as Broken: KeyError: 'no Customer\\nhere'$"
    ):
        Decoder(Broken).decode(b'{"customer": {}}', "application/json")


async def test_without_hooks_the_error_says_what_to_give() -> None:
    """A text that only names the type leaves the user to search for what would support it."""
    app = App("shop")
    app.handler(job=Bare)(lambda _: None)
    async with running(app) as lab:
        with pytest.raises(
            InvalidJob, match="type Customer can't be encoded; give the job class enc_hook= and dec_hook="
        ):
            await lab.publish(Bare(ADA))
    with pytest.raises(
        UndecodableError, match="type Customer can't be decoded; give the job class enc_hook= and dec_hook="
    ):
        Decoder(Bare).decode(b'{"customer": {}}', "application/json")


@pytest.mark.parametrize("error", [SystemExit(3), BaseException("a panic of a native library")])
async def test_a_hook_that_raises_more_than_an_exception_stops_no_worker(error: BaseException) -> None:
    """SystemExit ended the worker at every start; a native library's panic blocked a place in the window, without a line."""
    armed = False

    def panic(kind: type[Any], value: Any) -> Any:
        if armed:
            raise error
        return kind()

    class Odd(Job, name="odd", queue=QUEUE, enc_hook=lambda _: 1, dec_hook=panic):
        point: Point

    class Even(Job, name="even", queue=QUEUE):
        """A job without a hook."""

    app = App("unit")

    @app.handler
    async def odd(job: Odd) -> None: ...

    @app.handler
    async def even(job: Even) -> None: ...

    async with running(app) as lab:
        await lab.publish(Odd(Point()))
        armed = True
        await lab.publish(Even())
        await lab.drain()

    assert [type(run.job) for run in lab.done] == [Even]


def test_a_dec_hook_that_raises_cancelled_error_is_a_body_that_cannot_be_decoded() -> None:
    """As for every other error of a hook: it would look as if somebody had cancelled the run."""

    def cancelled(_: type, __: Any) -> Any:
        raise asyncio.CancelledError

    class Stuck(Job, name="stuck", queue=QUEUE, dec_hook=cancelled):
        customer: Customer

    with pytest.raises(UndecodableError, match="CancelledError"):
        Decoder(Stuck).decode(b'{"customer":"Ada"}', "application/json")
