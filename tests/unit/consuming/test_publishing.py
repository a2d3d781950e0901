"""What handlers publish: a publish that a handler doesn't finish is a failure of its run, not a lost job."""

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest

from leveret import App, Attempt, BlockingHandle, Bury, Job, PublishError, Queue, Receipt
from leveret.middleware import Retries, Rule
from leveret.testing import Lab, running
from leveret.testing import attempt as make_attempt


class Parent(Job, name="parent", queue=Queue("parents")):
    """Its handler publishes."""


class Child(Job, name="child", queue=Queue("children")):
    """What it publishes."""


async def run(handler: Callable[..., Any], *layers: Any) -> Lab:
    """Run one `Parent` through `handler`."""
    app = App("publishes", broker="memory://", middleware=list(layers))
    app.handler(job=Parent)(handler)

    @app.handler
    async def child(job: Child) -> None: ...

    async with running(app) as lab:
        await lab.publish(Parent())
        await lab.drain()
    return lab


def reason(lab: Lab) -> str:
    """Return why the parent was buried."""
    (buried,) = lab.buried
    assert isinstance(buried.outcome, Bury)
    return buried.outcome.reason


def place(function: Callable[..., Any], lines: int) -> str:
    """Return the file and line so many lines below the head of `function`."""
    return f"{__file__}:{inspect.getsourcelines(function)[1] + lines}"


async def test_a_def_handler_publishes_and_waits_for_the_confirm() -> None:
    """A handler of an ORM couldn't publish a child before its job is done, with the child's correlation to it."""
    seen: list[Receipt] = []

    def handler(job: Parent, attempt: Attempt) -> None:
        seen.append(attempt.publish_blocking(Child(), job_id="child-1"))

    lab = await run(handler)
    parent, child = lab.published
    assert seen == [BlockingHandle("child-1")]
    assert {type(run.job) for run in lab.done} == {Parent, Child}
    assert child.envelope.correlation_id == parent.envelope.job_id


async def test_an_error_of_a_blocking_publish_is_raised_in_the_handler() -> None:
    """A child that can't be published would be lost."""

    def handler(job: Parent, attempt: Attempt) -> None:
        attempt.publish_blocking(Child(), expires_s=1, delay_s=2)

    assert isinstance((await run(handler)).buried[0].error, PublishError)


async def test_a_blocking_publish_on_the_loop_is_refused() -> None:
    """The worker would stand still for ever."""

    async def handler(job: Parent, attempt: Attempt) -> None:
        attempt.publish_blocking(Child())

    said = reason(await run(handler))
    assert said.startswith("RuntimeError: publish_blocking would block the event loop")
    assert said.endswith("write await attempt.publish(…)")


@pytest.mark.filterwarnings("error")
async def test_a_publish_that_a_def_handler_cannot_await_fails_the_run() -> None:
    """The job would be done, and its child lost, with a RuntimeWarning at best."""

    def handler(job: Parent, attempt: Attempt) -> None:
        attempt.publish(Child())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]

    said = reason(await run(handler))
    assert said == (
        f"RuntimeError: attempt.publish at {place(handler, 1)} was never awaited, so nothing was sent; "
        "write attempt.publish_blocking(…)"
    )


@pytest.mark.filterwarnings("error")
async def test_a_publish_without_await_fails_the_run() -> None:
    """The job would be done, and its child lost."""

    async def handler(job: Parent, attempt: Attempt) -> None:
        await attempt.publish(Child())
        attempt.publish(Child())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
        attempt.publish(Child())  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
        raise Bury("no")

    said = reason(await run(handler))
    assert said == (
        f"RuntimeError: attempt.publish at {place(handler, 2)} was never awaited (and 1 more), so nothing was sent; "
        "write await attempt.publish(…)"
    )


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.filterwarnings("error")
async def test_a_publish_in_a_task_that_is_not_awaited_fails_the_run(starts: bool) -> None:
    """A worker that stops, or a broker that refuses, would lose the child of a job that is done."""
    tasks: list[asyncio.Task[Receipt]] = []

    async def handler(job: Parent, attempt: Attempt) -> None:
        tasks.append(asyncio.create_task(attempt.publish(Child())))
        if starts:
            await asyncio.sleep(0)

    said = reason(await run(handler))
    assert said == (
        f"RuntimeError: the publish at {place(handler, 1)} hadn't finished when the handler ended; wait for it in the handler"
    )
    assert (await tasks[0]).state == "confirmed"


async def test_awaited_publishes_are_forgotten() -> None:
    """A handler that publishes well would be failed, or grow with each of its publishes."""

    async def handler(job: Parent, attempt: Attempt) -> None:
        await asyncio.gather(*(attempt.publish(Child()) for _ in range(3)))
        async with asyncio.TaskGroup() as group:
            group.create_task(attempt.publish(Child()))
        assert not attempt.unfinished

    assert len((await run(handler)).done) == 5


async def test_a_try_in_place_is_not_blamed_for_the_try_before() -> None:
    """A run that went well would be repeated for what an earlier try left behind."""
    tries: list[int] = []
    left: list[Any] = []

    async def handler(job: Parent, attempt: Attempt) -> None:
        tries.append(1)
        if len(tries) == 1:
            left.append(attempt.publish(Child()))
            raise OSError

    assert len((await run(handler, Retries(Rule(OSError, immediate=1)))).done) == 1
    left[0].close()


def test_an_attempt_of_a_test_publishes_from_a_def_handler() -> None:
    """A `def` handler that publishes couldn't be called in a test."""
    assert make_attempt().publish_blocking(Child()).state == "confirmed"


async def test_an_attempt_of_a_test_publishes_from_a_thread() -> None:
    """A `def` handler that publishes couldn't be called in an asynchronous test."""
    attempt, threads = make_attempt(), set[threading.Thread]()

    def handler() -> Receipt:
        threads.add(threading.current_thread())
        return attempt.publish_blocking(Child())

    assert (await asyncio.to_thread(handler)).state == "confirmed"
    assert threading.main_thread() not in threads
