"""Many short tasks at once, as `dead replay` runs them."""

import asyncio

import pytest

from leveret.cli.together import Together


async def test_at_most_so_many_tasks_and_bytes_run_at_once() -> None:
    """500 letters of 15 MiB under way at once would be 7 GiB; one letter above the limit must still be replayed."""
    running: list[int] = []
    seen: list[list[int]] = []

    async def work(size: int) -> None:
        running.append(size)
        seen.append([*running])
        await asyncio.sleep(0.001)
        running.remove(size)

    async with Together(most=3, most_bytes=10) as together:
        for size in (1, 2, 3, 4, 5, 6, 20, 7, 0):
            await together.start(work(size), size)

    assert [sizes[-1] for sizes in seen] == [1, 2, 3, 4, 5, 6, 20, 7, 0]
    assert max(map(len, seen)) == 3
    assert [sizes for sizes in seen if sum(sizes) > 10] == [[20]]


async def test_what_was_started_ends_before_a_ctrl_c_is_obeyed() -> None:
    """A job that was published and whose letter isn't removed is in both places, and runs again with the next replay."""
    done, begun, goes_on = list[int](), list[int](), asyncio.Event()

    async def work(number: int) -> None:
        begun.append(number)
        await goes_on.wait()
        done.append(number)

    async def command() -> None:
        async with Together(most=2, most_bytes=10) as together:
            for number in range(100):
                await together.start(work(number), 0)

    task = asyncio.create_task(command())
    while len(begun) < 2:
        await asyncio.sleep(0)
    task.cancel()  # as asyncio.run does at a Ctrl-C
    await asyncio.sleep(0)
    goes_on.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [0, 1]


async def test_a_bug_in_a_task_is_raised() -> None:
    """A replay that failed unseen would be counted as done."""

    async def work() -> None:
        raise KeyError("bug")

    async def command() -> None:
        async with Together(most=2, most_bytes=10) as together:
            for _ in range(100):
                await together.start(work(), 0)

    with pytest.raises(KeyError):
        await command()
