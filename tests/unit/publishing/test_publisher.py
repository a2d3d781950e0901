"""What a publisher refuses before a byte is sent, and what it puts on the way."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from leveret import (
    App,
    Attempt,
    BrokerUnavailable,
    Envelope,
    InvalidJob,
    Job,
    MessageTooLarge,
    Outgoing,
    OutgoingOptions,
    Priority,
    Publish,
    Publisher,
    PublishError,
    PublishManyError,
    PublishTimeout,
    Queue,
    Receipt,
    Settings,
)
from leveret.brokers.memory.broker import MemoryBroker
from leveret.headers import HeaderValue
from leveret.testing import Lab, running

mails = Queue("mails")


class Mail(Job, name="mail.send", queue=mails, expires_s=3600):
    """A job to publish."""

    order_id: int
    share: float = 0.5


class Abstract(Job):
    """Names no job."""


class Left(msgspec.Struct):
    """One of two."""


class Right(msgspec.Struct):
    """The other, and nothing tells which."""


class Undecodable(Job, name="mail.undecodable", queue=mails):
    """Could be encoded, and by no worker decoded."""

    side: Left | Right


class Flat(Job, name="flat.one", queue=Queue("flat", priorities=False)):
    """Of a queue of one level."""


class Text(Job, name="text.store", queue=Queue("texts")):
    """Of any size."""

    text: str


class Tenant:
    """Sends a header."""

    async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
        return await proceed(envelope.with_headers({"x-tenant-id": "acme"}))


app = App(
    "publishing",
    broker="memory://",
    middleware=[Tenant()],
    settings=Settings(max_body_bytes=2000, warn_body_bytes=1000),
)


@app.handler
async def send(job: Mail, attempt: Attempt[None]) -> None:
    """Publish a follower once."""
    if job.order_id == 77:
        await attempt.publish(Mail(order_id=78))


@pytest_asyncio.fixture
async def lab() -> AsyncGenerator[Lab]:
    """Run the app."""
    async with running(app) as opened:
        yield opened


@pytest_asyncio.fixture
async def publisher() -> AsyncGenerator[Publisher]:
    """Publish to a memory broker."""
    async with app.publisher() as opened:
        yield opened


class Nowhere(tzinfo):
    """A time zone that doesn't say its offset."""

    def utcoffset(self, _: datetime | None) -> None:
        """Nothing."""

    tzname = dst = utcoffset


NOW = datetime.now(timezone.utc)
WRONG: list[tuple[Job, dict[str, Any], str]] = [
    (Mail(order_id="seven"), {}, ": field order_id: expected int, got str$"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (Mail(order_id=7, share=float("nan")), {}, ": field share: expected float, got null$"),
    (Mail(order_id=object()), {}, "can't be encoded"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (Abstract(), {}, "is abstract"),
    (Undecodable(Left()), {}, "a worker can't decode Undecodable"),
    (Mail(order_id=7), {"priority": "urgent"}, "priority must be a Priority, such as Priority.URGENT, not 'urgent'"),
    (Flat(), {"priority": Priority.HIGH}, "only the priority NORMAL, not HIGH"),
    (Mail(order_id=7), {"delay_s": -1}, "delay_s must be 0 to 48 days"),
    (Mail(order_id=7), {"delay_s": float("nan")}, "delay_s must be 0 to 48 days"),
    (Mail(order_id=7), {"delay_s": timedelta(seconds=3)}, "delay_s must be a number"),
    (Mail(order_id=7), {"delay_s": 49 * 86400, "expires_s": 90 * 86400}, "above the limit of 48 days"),
    (Mail(order_id=7), {"delay_s": 1, "at": NOW}, "exclude each other"),
    (Mail(order_id=7), {"at": NOW.replace(tzinfo=None)}, "aware datetime"),
    (Mail(order_id=7), {"expires_s": 5, "delay_s": 5}, "the job would expire"),
    (Mail(order_id=7), {"delay_s": 3600}, "the job would expire"),
    (Mail(order_id=7), {"expires_s": 0}, "expires_s must be above 0"),
    (Mail(order_id=7), {"job_id": ""}, "job_id must be a str"),
    (Mail(order_id=7), {"job_id": "x" * 201}, "job_id must be a str"),
    (Mail(order_id=7), {"correlation_id": 7}, "correlation_id must be a str"),
    (Mail(order_id=7), {"headers": {"lv-attempt": 3}}, "belong to leveret"),
    (Mail(order_id=7), {"headers": {"x-death": "x"}}, "belong to the broker"),
    (Mail(order_id=7), {"headers": {"x": [1]}}, "the value must be a str"),
    (Mail(order_id=7), {"headers": {"x": 1 << 63}}, "64 bits"),
    (Mail(order_id=7), {"timeout_s": 0}, "timeout_s must be above 0"),
    (Mail(order_id=7), {"timeout_s": 10**400}, "timeout_s must be above 0"),
    (Mail(order_id=7), {"delay_s": 10**400}, "delay_s must be 0 to 48 days"),
    (Mail(order_id=7), {"expires_s": 1e306}, "expires_s must be above 0"),
    (Mail(order_id=7), {"at": NOW.replace(tzinfo=Nowhere())}, "aware datetime"),
    (Mail(order_id=7), {"job_id": "\ud800"}, "surrogates not allowed"),
    (Mail(order_id=7), {"correlation_id": "\ud800"}, "surrogates not allowed"),
    (Mail(order_id=7), {"headers": {"\ud800": "x"}}, "surrogates not allowed"),
    (Mail(order_id=7), {"headers": {"x": "\ud800"}}, "surrogates not allowed"),
    (Mail(order_id=7), {"headers": {"x": float("nan")}}, "a number must be finite"),
    (Mail(order_id=7), {"headers": {"x": float("inf")}}, "a number must be finite"),
    (Mail(order_id=7), {"headers": ["x"]}, "headers must be a mapping"),
    (Mail(order_id=7), {"headers": "x"}, "headers must be a mapping"),
]


@pytest.mark.parametrize(("job", "options", "says"), WRONG)
async def test_what_is_wrong_is_refused_at_the_publisher(
    publisher: Publisher, job: Job, options: dict[str, Any], says: str
) -> None:
    """It would be buried later, at night, far from the code that is wrong."""
    with pytest.raises(InvalidJob, match=says):
        await publisher.publish(job, **options)


async def test_one_wrong_job_of_many_costs_no_other(publisher: Publisher) -> None:
    """A producer that hands over a thousand must not find half of them unsent because of what one header holds."""
    jobs = [Outgoing(Mail(order_id=number), headers={"x": "\ud800"} if number == 3 else None) for number in range(6)]

    with pytest.raises(PublishManyError) as failed:
        await publisher.publish_many(jobs)

    assert [isinstance(result, Receipt) for result in failed.value.results] == [True, True, True, False, True, True]
    assert isinstance(failed.value.results[3], InvalidJob)


@pytest.mark.parametrize("hand_over", [iter, list])
async def test_headers_are_those_of_the_moment_when_they_were_given(
    hand_over: Callable[[Iterable[Outgoing]], Iterable[Outgoing]],
) -> None:
    """One dict that is filled anew for each job of a batch would send the last one's tenant with all."""

    def jobs() -> Iterator[Outgoing]:
        headers = dict[str, HeaderValue]()
        for number in range(3):
            headers["x-number"] = number
            yield Outgoing(Mail(order_id=number), headers=headers)
        headers["x-number"] = -1

    sent = list[object]()

    class Seen:
        """Sees what is sent, once all is handed over."""

        async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
            await asyncio.sleep(0)
            sent.append(envelope.headers["x-number"])
            return await proceed(envelope)

    async with App("headers", broker="memory://", middleware=[Seen()]).publisher() as publisher:
        await publisher.publish_many(hand_over(jobs()))

    assert sent == [0, 1, 2]


async def test_an_outgoing_or_a_class_is_no_job(publisher: Publisher) -> None:
    """Its options would be dropped without a word."""
    for wrong, given in ((Outgoing(Mail(order_id=7)), "Outgoing; pass"), (Mail, "the class Mail"), ({"n": 1}, "dict")):
        with pytest.raises(InvalidJob, match=rf"publish\(\) takes a Job instance, not {given}"):
            await publisher.publish(wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"prioriti": Priority.HIGH},
            "publish() got an unexpected keyword argument 'prioriti'; did you mean 'priority'?",
        ),
        ({"job_id": "7", "delay": 60}, "publish() got an unexpected keyword argument 'delay'; did you mean 'delay_s'?"),
        ({"x": 1, "timeout_s": 1}, "publish() got an unexpected keyword argument 'x'"),
    ],
)
async def test_a_misspelt_option_is_refused_by_every_call_that_publishes(
    publisher: Publisher, options: dict[str, Any], error: str
) -> None:
    """An option that is dropped without a word is a delayed job that runs now, or an urgent one that waits."""
    app, refused = App("misspelt", broker="memory://"), list[str]()
    blocking = app.blocking_publisher()

    @app.handler
    async def handle(mail: Mail, attempt: Attempt) -> None:
        with pytest.raises(TypeError) as inside:
            await attempt.publish(mail, **options)
        refused.append(str(inside.value))

    async def in_a_thread(mail: Mail, **options: Any) -> None:
        await asyncio.to_thread(lambda: blocking.publish(mail, **options))

    async with running(app) as lab:
        await lab.publish(Mail(order_id=7))
        await lab.drain()
        for publish in (publisher.publish, lab.publish, in_a_thread):
            with pytest.raises(TypeError) as outside:
                await publish(Mail(order_id=7), **options)
            refused.append(str(outside.value))
        assert len(lab.published) == 1
    await asyncio.to_thread(blocking.close)

    assert refused == [error] * 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"prioriti": Priority.LOW},
            "Outgoing() got an unexpected keyword argument 'prioriti'; did you mean 'priority'?",
        ),
        ({"timeout_s": 5}, "Outgoing() got an unexpected keyword argument 'timeout_s'"),
    ],
)
def test_an_outgoing_refuses_an_option_that_one_job_cannot_have(options: dict[str, Any], error: str) -> None:
    """`timeout_s` of one job would be ignored: `publish_many` has one for all its jobs."""
    with pytest.raises(TypeError) as refused:
        Outgoing(Mail(order_id=7), **options)

    assert str(refused.value) == error


async def test_an_option_of_none_is_an_option_left_out() -> None:
    """A wrapper passes None for the options that its caller left out; each must then have its default."""
    none: OutgoingOptions = {
        "priority": None,
        "delay_s": None,
        "at": None,
        "job_id": None,
        "correlation_id": None,
        "headers": None,
        "expires_s": None,
    }
    app = App("none", broker="memory://")

    @app.handler
    def handle(mail: Mail) -> None: ...

    async with running(app) as lab:
        await lab.publish(Mail(order_id=7), **none)
        await lab.publish(Mail(order_id=7))
        given, plain = (msgspec.structs.replace(one.envelope, job_id="", deadline=0.0) for one in lab.published)

    assert given == plain


async def test_a_body_over_the_limit_is_refused_before_it_is_sent(publisher: Publisher) -> None:
    """RabbitMQ would close the channel, and with it every publish in flight."""

    class Big(Job, name="mail.big", queue=mails):
        text: str

    with pytest.raises(MessageTooLarge) as refused:
        await publisher.publish(Big(text="x" * 5000))

    assert refused.value.size_bytes > refused.value.limit_bytes == 2000


async def test_headers_over_the_limit_are_refused(publisher: Publisher) -> None:
    """A header frame above frame_max ends the whole connection."""
    with pytest.raises(MessageTooLarge, match="headers"):
        await publisher.publish(Mail(order_id=7), headers={"x": "y" * 40_000})


async def test_two_definitions_of_one_queue_are_refused(publisher: Publisher) -> None:
    """Their publishers would declare it differently, and one of them would fail in production."""

    class Twin(Job, name="mail.twin", queue=Queue("mails", type="classic")):
        pass

    await publisher.publish(Mail(order_id=7))
    with pytest.raises(InvalidJob, match="two definitions"):
        await publisher.publish(Twin())
    with pytest.raises(InvalidJob, match="two definitions"):
        await publisher.publish(Twin())


async def test_validation_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    """Who trusts the types of his code would pay for nothing."""
    unchecked = App("unchecked", broker="memory://unchecked", settings=Settings(validate=False))
    async with unchecked.publisher() as publisher:
        receipt = await publisher.publish(Mail(order_id="seven"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert receipt.state == "confirmed"


async def test_publish_many_returns_receipts_in_order(publisher: Publisher) -> None:
    """A caller could not tell which job has which id."""
    receipts = await publisher.publish_many([Outgoing(Mail(order_id=n), job_id=f"many-{n}") for n in range(2500)])

    assert [receipt.job_id for receipt in receipts] == [f"many-{n}" for n in range(2500)]


async def test_a_failed_item_of_publish_many_cannot_go_unnoticed(publisher: Publisher) -> None:
    """A list of results is ignored by callers: the wrong job would be lost in silence."""
    with pytest.raises(PublishManyError) as failed:
        await publisher.publish_many([Mail(order_id=1), Mail(order_id="two"), Mail(order_id=3)])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    assert [type(result).__name__ for result in failed.value.results] == ["Receipt", "InvalidJob", "Receipt"]


async def test_a_batch_whose_time_is_over_says_that_the_time_was_for_all(publisher: Publisher) -> None:
    """'No time was left' to send one of a million would be looked for in the network, not in timeout_s."""
    with pytest.raises(
        PublishManyError,
        match=r"3 of 3 jobs weren't confirmed .* the job wasn't sent: the timeout_s of publish_many, which is for all",
    ):
        await publisher.publish_many((Mail(order_id=n) for n in range(3)), timeout_s=1e-9)


async def test_a_layer_that_raises_fails_its_own_job_of_many() -> None:
    """One tenant's bad header would leave the fate of all the others unknown."""

    async def publish(envelope: Envelope, proceed: Publish) -> Receipt:
        if envelope.job_id == "bad":
            msg = "no tenant"
            raise LookupError(msg)
        return await proceed(envelope)

    layer: Any = type("Picky", (), {"publish": staticmethod(publish)})()
    picky = App("picky", broker="memory://picky", middleware=[layer])
    async with picky.publisher() as publisher:
        with pytest.raises(PublishManyError) as failed:
            await publisher.publish_many([Outgoing(Mail(order_id=1), job_id="bad"), Mail(order_id=2)])

    first, second = failed.value.results
    assert isinstance(first, PublishError)
    assert isinstance(first.__cause__, LookupError)
    assert isinstance(second, Receipt)


async def test_large_jobs_of_many_dont_all_wait_at_once() -> None:
    """A thousand jobs of 1 MB, each in a task of its own, take a gigabyte: the process is killed for a batch that it could have sent."""

    class Weigh:
        on_the_way = most = 0

        async def publish(self, envelope: Envelope, proceed: Publish) -> Receipt:
            self.on_the_way += len(envelope.body)
            self.most = max(self.most, self.on_the_way)
            await asyncio.sleep(0)
            try:
                return await proceed(envelope)
            finally:
                self.on_the_way -= len(envelope.body)

    weigh = Weigh()
    async with App("large", broker="memory://", middleware=[weigh]).publisher() as opened:
        receipts = await opened.publish_many((Text(text="x" * (3 << 20)) for _ in range(30)), timeout_s=30)

    assert len(receipts) == 30
    assert weigh.most <= 16 << 20


async def test_a_closed_publisher_says_so(publisher: Publisher) -> None:
    """A service that is shutting down would hang, or get an error of the client library."""
    async with app.publisher() as opened:
        pass
    with pytest.raises(BrokerUnavailable, match="closed"):
        await opened.publish(Mail(order_id=7))


async def test_a_publisher_on_a_loop_that_isnt_its_own_says_so(publisher: Publisher) -> None:
    """On a loop that ends it would make the connection that everybody else's publishes wait for; on one beside it, it would hang for ever."""

    def elsewhere() -> None:
        with pytest.raises(BrokerUnavailable, match=r"another event loop .* app\.blocking_publisher\(\)") as refused:
            asyncio.run(publisher.publish(Mail(order_id=1), job_id="id-1"))
        assert refused.value.job_id == "id-1"
        with pytest.raises(BrokerUnavailable, match="another event loop"):
            asyncio.run(publisher.publish_many([Mail(order_id=1)]))

    await asyncio.to_thread(elsewhere)
    assert (await publisher.publish(Mail(order_id=1))).state == "confirmed"


async def test_the_envelope_holds_what_was_asked_for(lab: Lab) -> None:
    """Priority, id, line, headers or expiry would be lost on the way."""
    await lab.publish(
        Mail(order_id=7), priority=Priority.URGENT, job_id="one", correlation_id="line", headers={"x-a": 1}, delay_s=60
    )

    (published,) = lab.published
    envelope = published.envelope
    assert published.job == Mail(order_id=7)
    assert (envelope.job_id, envelope.priority, envelope.correlation_id) == ("one", Priority.URGENT, "line")
    assert envelope.headers == {"x-a": 1, "x-tenant-id": "acme"}
    assert envelope.app == "publishing"
    assert envelope.expires_at_ms is not None
    assert envelope.due_ms is not None
    assert envelope.expires_at_ms - envelope.due_ms == 3_540_000


async def test_a_job_published_in_a_handler_belongs_to_the_line_of_its_job(lab: Lab) -> None:
    """What one order set going couldn't be found in the logs."""
    receipt = await lab.publish(Mail(order_id=77))
    await lab.drain()

    assert [one.envelope.correlation_id for one in lab.published] == [None, receipt.job_id]


async def test_ids_sort_by_the_time_of_their_making(publisher: Publisher) -> None:
    """An index on them would scatter its writes."""
    ids: list[str] = []
    for _ in range(3):
        ids.append((await publisher.publish(Mail(order_id=1))).job_id)
        await asyncio.sleep(0.002)  # UUIDv7 has milliseconds: the clock itself is what is tested

    assert ids == sorted(ids)
    assert {one[14] for one in ids} == {"7"}


async def test_a_publisher_that_was_not_entered_says_how_to_enter_it() -> None:
    """Who forgets `async with` reads of an attribute of contextlib's insides, and has no idea what to change."""
    app = App("shop", broker="memory://")
    publisher: Any = app.publisher()

    for forgotten in ("publish", "publish_many"):
        with pytest.raises(
            AttributeError, match=rf"has no '{forgotten}' before .* `async with app\.publisher\(\) as publisher:`"
        ):
            getattr(publisher, forgotten)
    async with publisher as entered:
        assert (await entered.publish(Mail(7))).state == "confirmed"
    with pytest.raises(BrokerUnavailable, match="this publisher is closed"):
        await entered.publish(Mail(8))


@pytest.mark.parametrize("resend", [False, True])
async def test_a_job_that_an_earlier_try_may_have_published_is_never_said_to_be_unpublished(
    monkeypatch: pytest.MonkeyPatch, resend: bool
) -> None:
    """With `resend` the last try may fail with nothing sent; a caller who believes that gives the job a new id, and it runs twice."""
    errors = iter([PublishTimeout("lost", maybe_published=True), BrokerUnavailable("away")])

    async def fail(*_: object) -> None:
        raise next(errors)

    monkeypatch.setattr(MemoryBroker, "publish", fail)
    async with app.publisher() as publisher:
        with pytest.raises(PublishTimeout) as caught:
            await publisher.publish(Mail(order_id=1), resend=resend)
    assert caught.value.maybe_published
    assert len(list(errors)) == (0 if resend else 1), "only who asks for it gets a second try"


def test_a_plain_with_around_a_publisher_says_what_to_write() -> None:
    """Python's own text is about an _AsyncGeneratorContextManager; django's and Celery's users write `with`."""
    block: Any = App("unit").publisher()
    with pytest.raises(TypeError, match=r"write `async with app\.publisher\(\) as publisher:`"), block:
        pass


async def test_a_wrong_field_is_one_traceback(publisher: Publisher) -> None:
    """Three chained ones, of msgspec, of leveret's codec and of the publisher, say the same thing on forty lines."""
    with pytest.raises(InvalidJob) as refused:
        await publisher.publish(Mail(order_id="seven"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


async def test_publish_many_leads_an_option_of_a_job_to_outgoing(publisher: Publisher) -> None:
    """Each job of the call has its own priority; who gives one for all must learn where it goes."""
    wrong: Any = {"priority": Priority.HIGH}
    says = r"publish_many\(\) takes no priority, .* publish_many\(\[Outgoing\(job, priority=…\)\]\)"
    with pytest.raises(TypeError, match=says):
        await publisher.publish_many([Mail(order_id=7)], **wrong)
    with pytest.raises(TypeError, match=says):
        App("unit", broker="memory://").blocking_publisher().publish_many([Mail(order_id=7)], **wrong)
    misspelt: Any = {"timeout": 5}
    with pytest.raises(TypeError, match="unexpected keyword argument 'timeout'; did you mean 'timeout_s'"):
        await publisher.publish_many([], **misspelt)
