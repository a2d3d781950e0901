"""What is configured wrong: one line that names it, exit 2, no traceback and no password; and what survives retries."""

import json
from collections.abc import Callable

import pytest

from leveret import PublishManyError
from tests.cli.command import Project, Ran
from tests.fault.bench import Bench, stray_tracebacks
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw

PASSWORD = "hunter2"


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A folder with shop.py and nothing else."""
    return Project(tmp_path_factory.mktemp("project"))


def line_of(ran: Ran) -> str:
    """The one line of a refusal."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    [line] = [line for line in ran.err.splitlines() if line.startswith("leveret: ")]
    return line


@pytest.mark.parametrize(
    ("url", "names"),
    [
        (f"ampq://guest:{PASSWORD}@localhost/", "amqp://"),
        ("localhost:5672", "no known scheme"),
        (f"amqp://guest:{PASSWORD}@/", "names no host"),
        (f"amqp://guest:{PASSWORD}@localhost:56x72/", "56x72"),
        (f"amqp://guest:{PASSWORD}@localhost:99999/", "99999"),
        (f"amqp://guest:{PASSWORD}@localhost:0/", "port 0"),
        (f"amqp://guest:{PASSWORD}@localhost/?heartbeat=never", "heartbeat"),
        (f"amqp://guest:{PASSWORD}@localhost/?hartbeat=3", "hartbeat"),
        (f"amqps://guest:{PASSWORD}@localhost/?cafile=/nowhere.pem", "/nowhere.pem"),
        (f"amqp://guest:{PASSWORD}@[::1/", "URL"),
        (f"amqp://guest:pa/{PASSWORD}@localhost/", "URL"),  # not percent-encoded
        (f"amqp://guest:{PASSWORD}/pa@localhost/", "URL"),
        (f"amqp://guest:{PASSWORD}@pa@localhost:x/", "URL"),
        (f"amqp://guest:{PASSWORD}?x@localhost/", "URL"),
        (f"amqp://guest:{PASSWORD}#x@localhost/", "URL"),
        (f"amqp://guest:pa@{PASSWORD}@localhost:x/", "URL"),
        (f"amqp://guest:{PASSWORD}@{'a' * 70}.example/", "a" * 70),
        (f"amqp://guest:{PASSWORD}@host..example/", "host..example"),
    ],
)
def test_a_wrong_url_is_one_line_without_its_password(project: Project, url: str, names: str) -> None:
    """The log of a failed deploy is read by many, and kept for years."""
    line = line_of(project.run("work", LEVERET_BROKER=url))

    assert names in line
    assert PASSWORD not in line


WRONG: dict[str, tuple[str, str]] = {
    "no URL": ("app = App('shop')\napp.handler(note)\n", "LEVERET_BROKER"),
    "no handler": ("app = App('shop', default_broker='memory://')\n", "has no handler"),
    "annotation missing": ("@app.handler\nasync def f(job): ...\n", "wrong.f"),
    "annotation of no job": ("@app.handler\nasync def f(job: int): ...\n", "wrong.f"),
    "annotation unresolved": ("@app.handler\nasync def f(job: 'Elsewhere'): ...\n", "@app.handler(job="),
    "abstract job": ("@app.handler\nasync def f(job: Abstract): ...\n", "Abstract"),
    "too many parameters": ("@app.handler\nasync def f(job: Note, attempt, more): ...\n", "wrong.f"),
    "two handlers": ("@app.handler\nasync def f(job: Note): ...\n", "two handlers"),
    "layer without a method": ("class Mute: ...\napp = App('shop', middleware=[Mute()])\n", "Mute"),
    "layer not awaited": (
        "class Flat:\n    def consume(self, attempt, proceed): ...\napp = App('shop', middleware=[Flat()])\n",
        "Flat",
    ),
    "layer of one parameter": ("async def short(attempt): ...\napp = App('shop', middleware=[short])\n", "short"),
    "layer misspelt": (
        "class Typo:\n    async def cosume(self, attempt, proceed): ...\napp = App('shop', middleware=[Typo()])\n",
        "Typo",
    ),
    "layer is a class": (
        "from leveret.middleware import RateLimit\napp = App('shop', middleware=[RateLimit])\n",
        "RateLimit",
    ),
    "cron expression": ("@app.cron('61 * * * *')\ndef f(): ...\n", "61 * * * *"),
    "cron of words": ("@app.cron('every monday')\ndef f(): ...\n", "every monday"),
    "time zone": ("@app.cron('0 9 * * *', tz='Europe/Belrin')\ndef f(): ...\n", "Europe/Belrin"),
    "queue name": ("Queue('lv.mine')\n", "lv.mine"),
    "settings": ("from leveret import Settings\nSettings(reconnect_base_s=20)\n", "reconnect_cap_s"),
    "lifespan called": ("app = App('shop', lifespan=open(__file__))\n", "lifespan"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_program_is_one_line_that_names_the_thing(project: Project, case: str) -> None:
    """Whoever reads it at three in the morning didn't write it."""
    text, names = WRONG[case]
    project.write("wrong.py", f"from leveret import App, Queue\nfrom shop import *\n{text}")

    line = line_of(project.run("work", "wrong:app"))

    assert names in line, line


def test_a_queue_that_no_handler_has_is_one_line_with_those_there_are(project: Project) -> None:
    """A worker of a misspelt queue would run for ever, take nothing, and look well."""
    line = line_of(project.run("work", "--queue", "emials"))

    assert "'emials'" in line
    assert "emails" in line


@pytest.mark.rabbit
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_wrong_password_and_a_missing_vhost_are_one_line_at_once(
    project: Project, rabbit: Rabbit, processes: str
) -> None:
    """Waiting wouldn't help, so nothing waits."""
    before, at, host = rabbit.url.rpartition("@")
    user = before.rpartition(":")[0]

    password = line_of(project.run("work", "-p", processes, LEVERET_BROKER=f"{user}:{PASSWORD}{at}{host}"))
    vhost = line_of(
        project.run("work", "-p", processes, LEVERET_BROKER=f"{before}{at}{host.partition('/')[0]}/nowhere")
    )

    assert "refused the login of user" in password
    assert PASSWORD not in password
    assert "has no vhost 'nowhere'" in vhost


@pytest.mark.rabbit
@pytest.mark.parametrize("type", ["quorum", "classic"])
async def test_a_queue_that_is_there_with_other_arguments_is_refused_by_worker_and_publisher(
    bench: Callable[..., Bench], rabbit: Rabbit, raw: Raw, type: str
) -> None:
    """It holds somebody's jobs: it is left as it is, and the line says what differs."""
    one = bench(rabbit.url, type)
    await raw.declare(one.queue.name, {"x-queue-type": "classic", "x-max-priority": 9})
    worker = one.start()

    assert await worker.ended() == 2, worker.log
    [line] = [line for line in worker.log.splitlines() if line.startswith("leveret: ")]
    assert one.queue.name in line
    assert "inequivalent arg" in line
    assert not stray_tracebacks(worker.log)
    with pytest.raises(PublishManyError, match="inequivalent arg"):
        await one.publish(one.recorder.Note(), timeout_s=10)
    assert await raw.count(one.queue.name) == 0


async def test_a_users_header_is_there_on_the_third_attempt(any_bench: Bench) -> None:
    """Whose job it is must not be forgotten with its first failure: the third attempt would run for nobody, or for the wrong one."""
    bench = any_bench
    async with bench.app.publisher() as publisher:
        await publisher.publish(bench.recorder.Flaky(2), job_id="job", headers={"x-tenant-id": "acme"}, timeout_s=20)
    worker = await bench.working()
    await bench.until_ended(["job"])
    await worker.drained()

    assert [(words[2], words[5]) for words in bench.recorder.lines("start")] == [
        ("1", "acme"),
        ("2", "acme"),
        ("3", "acme"),
    ]


def test_a_wrong_url_of_a_program_that_publishes_is_an_error_without_its_password(project: Project) -> None:
    """The same line, from inside a web service."""
    ran = project.run(
        "publish", "shop:Note", json.dumps({}), "--broker", f"amqp://guest:{PASSWORD}@localhost/?heartbeat=x"
    )

    assert PASSWORD not in line_of(ran)
