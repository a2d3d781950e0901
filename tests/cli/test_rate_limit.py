"""`RateLimit` under `leveret work --processes`: what a provider behind the handlers would count."""

import statistics
import time
from collections import Counter
from itertools import pairwise

import pytest

from tests.cli.command import Project, until

JOBS = 40
APP = """
import os, time
from pathlib import Path
from leveret import App, Job, Queue
from leveret.middleware import RateLimit

class Call(Job, name="call", queue=Queue("calls")):
    pass

app = App("shop", default_broker="sqlite:///shop.db", middleware=[RateLimit(10)])

@app.handler
async def call(job: Call) -> None:
    with Path("said").open("a") as file:
        file.write(f"{time.monotonic()} {os.getpid()}\\n")

async def fill(count):
    async with app.publisher() as publisher:
        await publisher.publish_many([Call() for _ in range(count)])
"""


@pytest.mark.parametrize("processes", [2, 3])
def test_the_limit_is_reached_though_one_process_has_the_backlog(project: Project, processes: int) -> None:
    """Divided by the number of processes, a limit of 10 starts 5 or 3 per second, and the backlog grows that the provider would take."""
    project.write("shop.py", APP)
    project.call(f"import asyncio, shop; asyncio.run(shop.fill({JOBS}))")

    with project.start("work", "--processes", str(processes)) as running:
        until(lambda: len(project.said) == JOBS, lambda: running.log)
        running.stop()

    starts = sorted(float(line.split()[0]) for line in project.said)
    holders = Counter(line.split()[1] for line in project.said)
    assert max(holders.values()) > JOBS * 0.9  # or the test shows nothing
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert 1 / statistics.median(gaps) == pytest.approx(10, rel=0.05)  # a machine that stalls once moves the mean alone
    # from the first that wasn't late itself
    assert min((JOBS - 1 - place) / (starts[-1] - start) for place, start in enumerate(starts[:10])) < 10.5


def test_a_limit_that_changes_at_a_reload_is_shared_again(project: Project) -> None:
    """In the memory of the old code every worker would find the old limit, and warn and start its share alone until a restart."""
    project.write("shop.py", APP)
    with project.start("work", "--processes", "2", "--reload") as running:
        running.wait_for(r"worker (\d+) of app shop takes", 2)
        time.sleep(1)  # watchfiles doesn't say when it begins to watch

        project.write("shop.py", APP.replace("RateLimit(10)", "RateLimit(20)"))
        running.wait_for(r"worker (\d+) of app shop takes", 4)
        running.stop()

    assert "rate limit" not in running.log
