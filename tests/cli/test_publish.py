"""`leveret publish`."""

import json
import re
import uuid
from datetime import datetime, timedelta, timezone

import pytest

from tests.cli.command import Project
from tests.rabbit.node import Rabbit


def test_publish_prints_the_id_once_the_job_is_there(project: Project) -> None:
    """What a script takes from it must be the id that it can look for."""
    ran = project.run("publish", "shop:SendInvoice", '{"order_id": 7}', "--priority", "high")

    assert ran.code == 0, ran
    assert ran.err == ""
    uuid.UUID(ran.out.strip())
    assert project.run("queues", "emails", "--json").json[0]["levels"] == {
        "urgent": 0,
        "high": 1,
        "normal": 0,
        "low": 0,
    }


def test_publish_reads_standard_input(project: Project) -> None:
    """A large payload, or a secret one, doesn't belong on a command line."""
    ran = project.run(
        "publish", "shop:SendInvoice", "-", "--id", "my-own", stdin='{"order_id": 7, "email": "ä@example.org"}'
    )

    assert (ran.code, ran.out) == (0, "my-own\n")


def test_publish_without_an_app_takes_a_broker(project: Project) -> None:
    """A contract module and a URL are all that another team has."""
    ran = project.run("publish", "shop:Note", "{}", "--broker", "sqlite:///other.db", LEVERET_APP="")

    assert ran.code == 0, ran
    assert project.run("queues", "plain", "--broker", "sqlite:///other.db", "--json").json[0]["ready"] == 1
    assert project.run("publish", "shop:Note", "{}", LEVERET_APP="", LEVERET_BROKER="sqlite:///other.db").code == 0


def test_publish_carries_headers_delay_and_expiry(project: Project) -> None:
    """An option that is taken and not carried is worse than one that isn't there."""
    options = ["--header", "x-tenant-id=7", "-H", "x-note=a=b", "--expires", "60"]
    dead = project.publish("Report", {"title": "r"}, *options)
    project.publish("Report", {"title": "later"}, "--delay", "3600")
    project.publish("Report", {"title": "later"}, "--at", (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat())
    with project.start("work", "-q", "reports") as worker:
        worker.wait_for("buried in")
        worker.stop()
    letter = project.run("dead", "show", "reports", dead, "--json").json

    assert letter["headers"] == {"x-tenant-id": "7", "x-note": "a=b"}
    assert letter["expires_at_ms"] // 1000 == pytest.approx(letter["created_s"] + 60, abs=2)
    assert project.run("queues", "reports", "--json").json[0]["delayed"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("shop:SendInvoice", '{"order_id": "seven"}'),
            "the JSON can't be decoded as SendInvoice: Expected `int`, got `str` - at `$.order_id`",
        ),
        (("shop:SendInvoice", "{}"), "Object missing required field `order_id`"),
        (("shop:SendInvoice", "{"), "the JSON can't be decoded as SendInvoice"),
        (("shop:SendInvoice", "[" * 100_000), "the JSON can't be decoded as SendInvoice"),
        (("shop:SendInvoce", "{}"), "module shop has no 'SendInvoce'; did you mean 'SendInvoice'?"),
        (("shop:Abstract", '{"n": 1}'), "is an abstract job class, without a name and a queue"),
        (("shop:app", "{}"), "'shop:app' isn't a Job class"),
        (("shop:Note", "{}", "--priority", "high"), "takes only the priority NORMAL, not HIGH"),
        (("shop:Note", "{}", "--priority", "soon"), "'soon' is not one of"),
        (
            ("shop:Note", "{}", "--delay", "x"),
            "expected a duration of at least 0, such as 90, 90s, 15m, 1h30m or 2d, not 'x'",
        ),
        (("shop:Note", "{}", "--delay", "9999999"), "is above the limit of 48 days"),
        (("shop:Note", "{}", "--at", "tomorrow"), "expected an ISO time with UTC offset"),
        (("shop:Note", "{}", "--at", "2026-01-01T09:00"), "expected an ISO time with UTC offset"),
        (("shop:Note", "{}", "--at", "2126-01-01T09:00Z"), "more than 48 days from now"),
        (("shop:Note", "{}", "--delay", "1", "--at", "2026-01-01T09:00Z"), "--delay and --at can't be combined"),
        (
            ("shop:Note", "{}", "--delay", "10", "--expires", "5"),
            "the job would expire after 5 s, before its delay of 10 s",
        ),
        (("shop:Note", "{}", "--header", "x"), "--header 'x': expected NAME=VALUE"),
        (("shop:Note", "{}", "--header", "lv-pass=1"), "header 'lv-pass'"),
        (("shop:Note", "{}", "--id", "x" * 201), "job_id must be a str of 1 to 200 bytes"),
    ],
)
def test_publish_refuses_what_is_wrong_before_it_sends(project: Project, arguments: tuple[str, ...], said: str) -> None:
    """A job of the wrong shape would be buried later, far from who made the mistake."""
    ran = project.run("publish", *arguments)

    assert (ran.code, ran.out) == (2, ""), ran
    assert said in ran.line
    assert (
        not (project.folder / "shop.db").exists()
        or not project.run("queues", "emails", "plain", "--json").json[0]["ready"]
    )


def test_publish_to_a_broker_inside_one_process_is_refused(project: Project) -> None:
    """It would print an id, exit with 0, and the job would be gone."""
    ran = project.run("publish", "shop:Note", "{}", "--broker", "memory://")

    assert ran.code == 2
    assert "memory:// exists only inside the process that opens it" in ran.line


def test_publish_to_a_file_that_cannot_be_used_is_a_configuration_error(project: Project) -> None:
    """Exit code 1 makes a script try again: a missing folder needs a person."""
    ran = project.run("publish", "shop:Note", "{}", "--broker", "sqlite:///missing/shop.db")

    assert ran.code == 2
    assert ran.line.startswith("leveret: the SQLite file")
    assert "doesn't exist" in ran.line


@pytest.mark.rabbit
def test_publish_and_queues_on_rabbitmq(project: Project, rabbit: Rabbit) -> None:
    """The same commands on the broker of production."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    project.write(
        "contract.py",
        f"from leveret import Job, Queue\nclass Ping(Job, name='ping', queue=Queue({name!r})):\n    n: int\n",
    )
    for level in ("low", "normal", "urgent", "urgent"):
        assert (
            project.run(
                "publish", "contract:Ping", json.dumps({"n": 1}), "--priority", level, "--broker", rabbit.url
            ).code
            == 0
        )

    [depth] = project.run("queues", name, "--broker", rabbit.url, "--json").json
    table = project.run("queues", name, "--broker", rabbit.url).out
    purged = project.run("queues", "purge", name, "--broker", rabbit.url, "--yes", "--json")

    assert {level: count for level, count in depth["levels"].items() if count} == {"low": 1, "normal": 1, "urgent": 2}
    assert re.search(r"^delayed jobs of all queues on this broker: \d+$", table, re.MULTILINE), table
    assert purged.json == {"queue": name, "purged": 4}
    assert project.run("queues", name, "--broker", rabbit.url, "--json").json[0]["ready"] == 0
