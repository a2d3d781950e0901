"""`leveret queues` and `leveret dead`, through the installed command."""

import json
import os
import pty
import re
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from pamqp.commands import Basic

from tests.cli.command import LEVERET, PATIENCE_S, Project
from tests.rabbit.node import Rabbit
from tests.rabbit.raw import Raw


def bury(project: Project) -> dict[str, str]:
    """Bury three invoices whose handler raised, and one report that said so itself; return their ids, by name."""
    ids = {
        "first": project.publish("SendInvoice", {"order_id": -1}, "--priority", "high", "--header", "x-tenant-id=7"),
        "second": project.publish("SendInvoice", {"order_id": -2}),
        "third": project.publish("SendInvoice", {"order_id": -3}, "--expires", "60"),
        "report": project.publish("Report", {"title": "r"}),
    }
    with project.start("work", "--concurrency", "1") as worker:
        worker.wait_for("buried in", count=4)
        worker.stop()
    return ids


@pytest.fixture(scope="module")
def with_letters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with the dead letters of `bury`, for `buried` to copy; their ids, by name."""
    project = Project(tmp_path_factory.mktemp("with_letters"))
    return project.folder, bury(project)


@pytest.fixture
def buried(project: Project, with_letters: tuple[Path, dict[str, str]]) -> dict[str, str]:
    """The dead letters of `bury`, in a folder that is the test's alone: their ids, by name."""
    folder, ids = with_letters
    shutil.copytree(folder, project.folder, dirs_exist_ok=True)
    return ids


def listed(project: Project, queue: str = "emails", *options: str) -> list[str]:
    ran = project.run("dead", "list", queue, *options, "--json")
    assert ran.code == 0, ran
    return [letter["id"] for letter in ran.json]


def test_queues_shows_every_queue_of_the_app(project: Project, buried: dict[str, str]) -> None:
    """The first look of whoever is on call."""
    table = project.run("queues")
    rows = {row["queue"]: row for row in project.run("queues", "--json").json}

    assert table.code == 0, table
    heads, *lines = [line.split() for line in table.out.splitlines()]
    assert [line[0] for line in lines] == ["emails", "reports", "plain"]
    assert set(heads) <= set(rows["emails"])  # one word for one thing, here and in the JSON
    assert (rows["emails"]["dead"], rows["reports"]["dead"], rows["emails"]["ready"]) == (3, 1, 0)
    assert set(rows) == {"emails", "reports", "plain"}


def test_queues_without_an_app_needs_names_and_knows_what_is_not_there(
    project: Project, buried: dict[str, str]
) -> None:
    """A misspelt name must not look like an empty queue."""
    unnamed = project.run("queues", "--broker", "sqlite:///shop.db")
    misspelt = project.run("queues", "emials", "--broker", "sqlite:///shop.db")

    assert (unnamed.code, misspelt.code) == (2, 2)
    assert "name the queues, or the app with --app module:app" in unnamed.line
    assert "no queue 'emials' on sqlite:///shop.db" in misspelt.line
    assert project.run("queues", "emails", "--broker", "sqlite:///shop.db", "--json").json[0]["dead"] == 3


def test_looking_into_a_file_that_is_not_there_does_not_make_it(project: Project) -> None:
    """A mistyped path would look like a queue that is empty."""
    assert project.run("queues", "emails", "--broker", "sqlite:///mistyped.db").code in (1, 2)
    assert not (project.folder / "mistyped.db").exists()


def test_purge_asks_and_deletes_only_what_waits(project: Project, buried: dict[str, str]) -> None:
    """Deleting is for good: without a yes nothing goes, and the dead stay."""
    project.publish("SendInvoice", {"order_id": 1})
    project.publish("SendInvoice", {"order_id": 2}, "--priority", "urgent")

    refused = project.run("queues", "purge", "emails")
    before = project.run("queues", "emails", "--json").json[0]
    purged = project.run("queues", "purge", "emails", "--yes")
    after = project.run("queues", "emails", "--json").json[0]

    assert refused.code == 2
    assert (
        "Delete 2 waiting jobs of queue emails on sqlite:///shop.db for good? stdin is not a terminal; confirm with --yes"
        in refused.line
    )
    assert before["ready"] == 2
    assert (purged.code, purged.out) == (0, "purged 2 jobs of queue emails\n")
    assert (after["ready"], after["dead"]) == (0, 3)
    project.publish("SendInvoice", {"order_id": 3})
    assert project.run("queues", "purge", "emails", "--yes").out == "purged 1 job of queue emails\n"


@pytest.mark.parametrize(("answer", "left"), [("n", 3), ("y", 0)])
def test_drop_asks_a_person_and_obeys(project: Project, buried: dict[str, str], answer: str, left: int) -> None:
    """On a terminal the question is asked there, and anything but a yes changes nothing."""
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [LEVERET, "dead", "drop", "emails"],
        cwd=project.folder,
        env=project.environment({}),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    out, err = command.communicate(timeout=PATIENCE_S)
    os.close(ours)

    assert b"Delete 3 dead letters of queue emails on sqlite:///shop.db for good?" in err
    assert command.returncode == (0 if answer == "y" else 1), (out, err)
    assert len(listed(project)) == left


def test_list_is_oldest_first_with_the_reason_and_changes_nothing(project: Project, buried: dict[str, str]) -> None:
    """Looking is what one does before one knows what to do."""
    table = project.run("dead", "list", "emails")

    assert table.code == 0, table
    assert listed(project)[:1] == [buried["first"]]  # it was the urgent one
    assert set(listed(project)) == {buried[name] for name in ("first", "second", "third")}
    assert len(table.out.splitlines()) == 4
    assert "ValueError: order -2: no answer from postgresql://shop:***@db/shop" in table.out
    assert "hunter2" not in table.out
    assert "no paper for r" in project.run("dead", "list", "reports").out


def test_filters_pick_what_they_say(project: Project, buried: dict[str, str]) -> None:
    """An operator replays a cause, not a queue: a filter that lets more through makes it worse."""
    second, third = buried["second"], buried["third"]
    for options, found in (
        (("--error", "ValueError"), ["first", "second", "third"]),
        (("--error", "Error"), []),
        (("--error", "ORDER -2"), ["second"]),
        (("--job", "invoice.send", "--limit", "1"), ["first"]),
        (("--job", "report.write"), []),
        (("--id", third, "--id", second), ["second", "third"]),
        (("--id", third, "--error", "order -2"), []),
    ):
        assert sorted(listed(project, "emails", *options)) == sorted(buried[name] for name in found), options


def test_list_says_when_there_is_more_than_it_shows(project: Project, buried: dict[str, str]) -> None:
    """100 rows of 40 000 must not look like all."""
    limited = project.run("dead", "list", "emails", "--limit", "2")

    assert len(limited.out.splitlines()) == 3
    assert "and more" in limited.err
    assert project.run("dead", "list", "emails", "--limit", "3").err == ""


def test_show_has_headers_every_failed_run_and_the_body(project: Project, buried: dict[str, str]) -> None:
    """What is needed to find the cause is in one place, and no password of anybody's is."""
    text = project.run("dead", "show", "emails", buried["first"])
    record = project.run("dead", "show", "emails", buried["first"], "--json").json

    assert text.code == 0, text
    for part in (
        buried["first"],
        "invoice.send",
        "emails, high",
        "x-tenant-id: 7",
        "Traceback",
        "ValueError: order -1",
        '"order_id": -1',
    ):
        assert part in text.out
    assert "hunter2" not in text.out
    assert record["body"] == {"order_id": -1, "email": "a@example.org", "seconds": 0.0}
    assert [(failure["attempt"], failure["error"]) for failure in record["failures"]] == [(1, "ValueError")]
    assert "hunter2" not in json.dumps(record)
    assert project.run("dead", "show", "emails", "nobody").code == 2


def test_replay_runs_it_again_as_new(project: Project) -> None:
    """Same id, level and headers; the first run again, or it would be buried at once; and no expiry, or it would be dropped."""
    buried = bury(project)  # in a copy, the files of the second run would have other names, and so its traceback
    assert (
        project.run("dead", "replay", "emails", "--dry-run").out == "3 dead letters of queue emails would be replayed\n"
    )
    assert len(listed(project)) == 3

    ran = project.run("dead", "replay", "emails", "--id", buried["first"], "--id", buried["third"])

    assert (ran.code, ran.out, ran.err) == (0, "2 dead letters of queue emails replayed\n", "")
    assert listed(project) == [buried["second"]]
    assert project.run("queues", "emails", "--json").json[0]["levels"] == {
        "urgent": 0,
        "high": 1,
        "normal": 1,
        "low": 0,
    }
    with project.start("work") as worker:
        worker.wait_for("buried in", count=2)
        worker.stop()
    assert [line.split()[3:] for line in project.said[-2:]] == [["attempt=1", "pass=1"]] * 2
    assert re.findall(
        r"Traceback|same traceback as above", project.run("dead", "show", "emails", buried["first"]).out
    ) == [
        "Traceback",
        "same traceback as above",
    ]
    letter = project.run("dead", "show", "emails", buried["first"], "--json").json
    assert letter["headers"] == {"x-tenant-id": "7"}
    assert [failure["attempt"] for failure in letter["failures"]] == [1, 1]  # its history is kept
    assert (letter["priority"], letter["passes"], letter["expires_at_ms"]) == ("high", 1, None)


def test_drop_deletes_what_was_picked_and_says_how_many(project: Project, buried: dict[str, str]) -> None:
    """What a person throws away must be that and nothing else."""
    dry = project.run("dead", "drop", "emails", "--error", "order -2", "--dry-run", "--json")
    ran = project.run("dead", "drop", "emails", "--error", "order -2", "--yes", "--json")
    missing = project.run("dead", "drop", "emails", "--id", "nobody", "--yes")

    assert dry.json == {"queue": "emails", "dropped": 1, "failed": [], "dry_run": True}
    assert ran.json == {"queue": "emails", "dropped": 1, "failed": [], "dry_run": False}
    assert sorted(listed(project)) == sorted([buried["first"], buried["third"]])
    assert missing.code == 2
    assert "has no dead letter with id 'nobody'" in missing.line


def test_a_reader_that_closes_the_pipe_gets_no_traceback(project: Project, buried: dict[str, str]) -> None:
    """`| head` is how everybody looks at a long table."""
    for arguments in (
        "dead list emails",
        "dead list emails --json",
        "queues",
        "describe",
        "dead show emails " + buried["first"],
    ):
        shell = ["bash", "-c", f"{LEVERET} {arguments} | true"]
        ran = subprocess.run(
            shell, cwd=project.folder, env=project.environment({}), capture_output=True, timeout=PATIENCE_S, check=False
        )
        assert ran.stderr == b"", arguments


@pytest.mark.rabbit
@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_dead_letters_on_rabbitmq(project: Project, rabbit: Rabbit, kind: str) -> None:
    """List, show, replay and drop on the broker of production, on both types of queue."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    project.write(
        "shop.py",
        (project.folder / "shop.py").read_text().replace('Queue("emails")', f'Queue("{name}", type="{kind}")'),
    )
    env = {"LEVERET_BROKER": rabbit.url}
    ids = [project.publish("SendInvoice", {"order_id": -n}, "--priority", "urgent", **env) for n in (1, 2)]
    with project.start("work", "-q", name, **env) as worker:
        worker.wait_for("buried in", count=2)
        worker.stop()

    assert sorted(letter["id"] for letter in project.run("dead", "list", name, "--json", **env).json) == sorted(ids)
    assert "ValueError: order -2" in project.run("dead", "show", name, ids[1], **env).out
    assert project.run("dead", "replay", name, "--id", ids[0], **env).out == f"1 dead letter of queue {name} replayed\n"
    assert project.run("dead", "drop", name, "--yes", **env).out == f"1 dead letter of queue {name} dropped\n"
    [depth] = project.run("queues", name, "--json", **env).json
    assert (depth["ready"], depth["dead"]) == (1, 0)
    with project.start("work", "-q", name, **env) as worker:
        worker.wait_for("buried in")
        worker.stop()
    assert [line.split()[3:] for line in project.said[-1:]] == [["attempt=1", "pass=1"]]
    assert project.run("dead", "list", name, "--json", LEVERET_APP="", **env).json[0]["priority"] == "urgent"


@pytest.mark.rabbit
async def test_a_letter_with_a_count_at_its_end_is_replayed(project: Project, rabbit: Rabbit, raw: Raw) -> None:
    """A foreign producer may send the largest number there is: one more can't be written, and its letter would lie there for ever."""
    name, most = f"cli-{uuid.uuid4().hex[:8]}", (1 << 63) - 1
    project.write("shop.py", (project.folder / "shop.py").read_text().replace('Queue("emails")', f'Queue("{name}")'))
    env = {"LEVERET_BROKER": rabbit.url}
    project.publish("SendInvoice", {"order_id": 1}, **env)  # this declares it
    headers: dict[str, Any] = {"lv-pass": most, "lv-origin": name, "lv-priority": "normal"}
    await raw.publish(
        f"{name}.dead",
        b'{"order_id": 2}',
        properties=Basic.Properties(message_id="foreign", message_type="invoice.send", headers=headers),
    )

    ran = project.run("dead", "replay", name, **env)

    assert (ran.code, ran.out) == (0, f"1 dead letter of queue {name} replayed\n"), ran
    assert [job.headers["lv-pass"] for job in await raw.take_all(name) if job.properties.message_id == "foreign"] == [
        most
    ]


@pytest.mark.rabbit
def test_a_letter_that_cannot_be_replayed_stays_and_does_not_stop_the_rest(project: Project, rabbit: Rabbit) -> None:
    """One letter whose queue is gone must neither be lost nor keep the others from running; the exit code tells."""
    here, gone = (f"cli-{uuid.uuid4().hex[:8]}" for _ in range(2))
    project.write(
        "contract.py",
        f"from leveret import App, Bury, Job, Queue\nclass Ping(Job, name='ping', queue=Queue({here!r})): ...\n"
        "app = App('a')\n@app.handler\nasync def ping(job: Ping) -> Bury: return Bury('no')\n",
    )
    env = {"LEVERET_BROKER": rabbit.url, "LEVERET_APP": "contract:app"}
    ids = [project.run("publish", "contract:Ping", "{}", **env).out.strip() for _ in range(3)]
    with project.start("work", **env) as worker:
        worker.wait_for("buried in", count=3)
        worker.stop()
    project.write(
        "spoil.py",
        f"""
import asyncio, sys, aio_pika
async def main(url):
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue({here!r} + ".dead")
        letters = [await queue.get() for _ in range(3)]
        for letter in letters:
            headers = dict(letter.headers) | ({{"lv-origin": {gone!r}}} if letter.message_id == {ids[1]!r} else {{}})
            copy = aio_pika.Message(letter.body, headers=headers, message_id=letter.message_id, type=letter.type, content_type=letter.content_type)
            await channel.default_exchange.publish(copy, queue.name)
            await letter.ack()
asyncio.run(main(sys.argv[1]))
""",
    )
    subprocess.run(
        [os.path.dirname(LEVERET) + "/python", "spoil.py", rabbit.url],  # noqa: PTH120
        cwd=project.folder,
        check=True,
        timeout=PATIENCE_S,
    )

    ran = project.run("dead", "replay", here, **env)

    assert ran.code == 1, ran
    assert ran.out == f"2 dead letters of queue {here} replayed, 1 failed and stays\n"
    assert f"job {ids[1]} stays in {here}.dead" in ran.line
    assert gone in ran.line
    assert [letter["id"] for letter in project.run("dead", "list", here, "--json", **env).json] == [ids[1]]


def test_an_empty_table_is_a_sentence(project: Project) -> None:
    """Bare headings look like a command that failed halfway; and a filter that matches nothing like an empty queue."""
    project.write("empty.py", "from leveret import App\n\napp = App('empty', broker='sqlite:///shop.db')\n")
    project.publish("Note", {})

    assert project.run("dead", "list", "emails").out == "no dead letters in emails\n"
    assert (
        project.run("dead", "list", "emails", "--job", "note").out
        == "no dead letters in emails that match the options\n"
    )
    assert project.run("dead", "list", "emails", "--json").json == []
    assert project.run("queues", "--app", "empty:app").out == "no queues: the app has no handlers\n"
    assert project.run("queues", "--app", "empty:app", "--json").json == []


def test_rows_of_a_table_are_not_padded(project: Project) -> None:
    """A row with one long reason would wrap all others on a terminal, and add spaces to whatever is copied from it."""
    for title in ("a", "a much longer title than the other"):
        project.publish("Report", {"title": title})
    with project.start("work") as worker:
        worker.wait_for("buried in", 2)
        worker.stop()

    for command in (("queues",), ("dead", "list", "reports")):
        lines = project.run(*command).out.splitlines()
        assert len(lines) > 2
        assert [line for line in lines if line != line.rstrip()] == []
