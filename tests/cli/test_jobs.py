"""`leveret jobs`, through the installed command."""

import asyncio
import os
import pty
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from leveret.brokers.sqlite import open_store
from leveret.ids import new_job_id
from leveret.runtime import Runtime
from leveret.store import Change, Progress, Record, State
from tests.cli.command import LEVERET, PATIENCE_S, Project


class Stored:
    """The store of a project, as a worker and a publisher fill it."""

    def __init__(self, project: Project) -> None:
        self.url = f"sqlite:///{project.folder / 'shop.db'}"
        self.ids: dict[str, str] = {}

    def write(self, *changes: Change | Progress) -> None:
        """Enter changes."""

        async def write() -> None:
            store = open_store(self.url, Runtime(app="shop"))
            await store.write(changes)
            await store.close()

        asyncio.run(write())

    def find(self, job_id: str) -> Sequence[Record]:
        """Return the records of an id, the last first."""

        async def find() -> Sequence[Record]:
            store = open_store(self.url, Runtime(app="shop"))
            try:
                return await store.find(job_id)
            finally:
                await store.close()

        return asyncio.run(find())


def change(job_id: str, state: State, publish: int = 1, **fields: Any) -> Change:
    usual: dict[str, Any] = {
        "queue": "emails",
        "job": "invoice.send",
        "passes": 0,
        "attempt": 1,
        "keep_s": 3600,
        "at_ms": 1_700_000_000_000,
    }
    return Change(job_id=job_id, publish=publish, state=state, **usual | fields)


@pytest.fixture
def stored(project: Project) -> Stored:
    """One job in each of some states."""
    stored = Stored(project)
    ids = stored.ids = {name: new_job_id() for name in ("done", "failed", "running", "queued")}
    stored.write(
        change(ids["done"], "done", result=b'{"width":3}', content_type="application/json", queue="reports"),
        change(ids["failed"], "failed", attempt=4, passes=3, error="OSError: postgresql://a:hunter2@db/shop is gone"),
        change(ids["running"], "running", body=b'{"order_id":7}'),
        Progress(job_id=ids["running"], publish=1, passes=0, attempt=1, fraction=0.4, note="two of five"),
        change(ids["queued"], "queued"),
    )
    return stored


def listed(project: Project, *options: str) -> list[str]:
    ran = project.run("jobs", "list", *options, "--json")
    assert ran.code == 0, ran
    return [job["id"] for job in ran.json]


def test_list_shows_the_last_jobs_first_and_by_options(project: Project, stored: Stored) -> None:
    """An operator can't see what runs, or reads through everything to find it."""
    ids = stored.ids
    table = project.run("jobs", "list")

    heads, *rows = table.out.splitlines()
    assert heads.split() == ["id", "job", "queue", "state", "attempt", "since", "text"]
    assert [row.split()[0] for row in rows] == [ids["queued"], ids["running"], ids["failed"], ids["done"]]
    assert "running 40%" in rows[1]
    assert "two of five" in rows[1]
    assert "OSError" in rows[2]
    assert "hunter2" not in table.out
    assert listed(project, "--state", "running") == [ids["running"]]
    assert listed(project, "--queue", "reports", "--job", "invoice.send") == [ids["done"]]
    assert listed(project, "--limit", "2") == [ids["queued"], ids["running"]]
    assert "more than 2" in project.run("jobs", "list", "--limit", "2").err
    assert "no jobs in sqlite:///" in project.run("jobs", "list", "--state", "expired").out
    assert project.run("jobs", "list", "--state", "over").code == 2


def test_show_tells_one_job_with_its_result_and_every_publish(project: Project, stored: Stored) -> None:
    """A user asks what came out of a job, and nobody can tell."""
    ids = stored.ids
    stored.write(change(ids["done"], "queued", publish=2, at_ms=1_700_000_001_000))

    last, first = project.run("jobs", "show", ids["done"], "--json").json
    text = project.run("jobs", "show", ids["running"]).out

    assert (last["state"], last["publish"], last["result"]) == ("queued", 2, None)
    assert (first["state"], first["publish"], first["result"]) == ("done", 1, {"width": 3})
    assert "running 40%" in text
    assert re.search(r'"order_id": 7', text)
    assert f"leveret dead show shop:app emails {ids['failed']}" in project.run("jobs", "show", ids["failed"]).out


def test_an_id_that_nobody_knows_says_so(project: Project, stored: Stored) -> None:
    """A misspelt id looks like a job without a state."""
    for command in ("show", "abort", "drop"):
        ran = project.run("jobs", command, "unknown-id", *(["--yes"] if command == "drop" else []))
        assert ran.code == 2, ran
        assert "knows no job 'unknown-id'" in ran.line
    assert "too short for the beginning of an id" in project.run("jobs", "show", stored.ids["done"][:5]).line


def test_words_that_no_store_can_have_are_one_line(project: Project, stored: Stored) -> None:
    """A slip of the finger is twenty lines of Python."""
    odd = os.fsdecode(b"\xff")
    for words in (["show", odd], ["abort", odd], ["list", "--queue", odd], ["drop", "--job", odd, "--yes"]):
        ran = project.run("jobs", *words)
        assert ran.code == 2, ran
        assert "can't keep or find a value" in ran.line
    assert "not in the range" in project.run("jobs", "list", "--limit", "9" * 20).line


def test_a_body_is_shown_however_its_publisher_encoded_it(project: Project, stored: Stored) -> None:
    """An operator sees base64, although the job is plain."""
    stored.write(change("packed", "queued", body=msgspec.msgpack.encode({"order_id": 8})))

    [record] = project.run("jobs", "show", "packed", "--json").json

    assert (record["body"], record["body_base64"]) == ({"order_id": 8}, None)


def test_the_beginning_of_an_id_is_enough_where_no_other_job_has_it(project: Project, stored: Stored) -> None:
    """An operator types 36 characters, or aborts another job."""
    base = "0198e2a4-5b6c-7000-8000-00000000000"
    stored.write(change(f"{base}1", "queued"), change(f"{base}2", "queued"))

    several = project.run("jobs", "abort", base)
    one = project.run("jobs", "show", f"{base}2", "--json")

    assert several.code == 2
    assert "2 jobs have an id that begins with" in several.line
    assert [record.state for record in stored.find(f"{base}1")] == ["queued"]
    assert [record["id"] for record in one.json] == [f"{base}2"]
    only = stored.ids["done"]
    assert [record["id"] for record in project.run("jobs", "show", only[:35], "--json").json] == [only]


def test_abort_ends_what_waits_asks_what_runs_and_leaves_what_has_ended(project: Project, stored: Stored) -> None:
    """A job that must not run can't be stopped."""
    ids = stored.ids
    stored.write(change(ids["queued"], "delayed", publish=2))

    ran = project.run("jobs", "abort", ids["queued"], ids["running"])
    over = project.run("jobs", "abort", ids["done"], "--json")

    assert ran.code == 0, ran
    assert ran.out.splitlines() == [
        f"job {ids['queued']} is aborted",
        f"job {ids['queued']} is aborted",
        f"job {ids['running']} runs: its worker is asked to end it",
    ]
    assert {record.state for record in stored.find(ids["queued"])} == {"aborted"}
    assert [record.asked for record in stored.find(ids["running"])] == [True]
    assert (over.code, over.json[0]["answer"], over.json[0]["state"]) == (1, "finished", "done")


def test_drop_asks_and_deletes_records_only(project: Project, stored: Stored) -> None:
    """A store that grew can't be emptied, or is emptied by mistake."""
    ids = stored.ids
    everything = project.run("jobs", "drop", "--yes")
    unasked = project.run("jobs", "drop", "--queue", "emails")
    counted = project.run("jobs", "drop", "--queue", "emails", "--dry-run")
    by_id = project.run("jobs", "drop", ids["done"], "--yes")
    by_queue = project.run("jobs", "drop", "--queue", "emails", "--state", "failed", "--yes", "--json")

    assert (everything.code, unasked.code) == (2, 2)
    assert "give ids, or one of --state, --queue and --job" in everything.err
    assert "confirm with --yes" in unasked.line
    assert counted.out == "3 records would be dropped\n"
    assert by_id.out == "1 record dropped\n"
    assert by_queue.json == {"dropped": 1, "dry_run": False}
    assert listed(project) == [ids["queued"], ids["running"]]


def test_the_store_is_the_apps_or_an_urls_and_one_that_is_not_there_says_so(project: Project, stored: Stored) -> None:
    """A command looks into another store than the app's, or makes a file where there was none."""
    unset = project.run("jobs", "list", LEVERET_APP="")
    both = project.run("jobs", "list", "shop:app", "--store", stored.url)
    memory = project.run("jobs", "list", "--store", "memory://")
    rabbit = project.run("jobs", "list", "--store", "amqp://localhost/")
    nothing = project.run("jobs", "list", "--store", "sqlite:///mistyped.db")

    assert (unset.code, both.code, memory.code, rabbit.code) == (2, 2, 2, 2)
    assert unset.line.startswith("leveret: no job store given; give an app")
    assert "--store URL" in unset.line
    assert "can't be combined" in both.line
    assert "exists only inside the process" in memory.line
    assert "keeps no results" in rabbit.line
    assert (nothing.code, nothing.out) == (0, "no jobs in sqlite:///mistyped.db\n")
    assert not Path(project.folder / "mistyped.db").exists()
    assert len(listed(project, "--store", stored.url)) == 4


def test_a_terminal_shows_short_ids_that_can_be_copied(project: Project, stored: Stored) -> None:
    """The ids take half of the line, or what was copied finds two jobs."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "LEVERET_APP": "shop:app", "COLUMNS": "200"}
    done = subprocess.run(
        [LEVERET, "jobs", "list"], cwd=project.folder, stdout=theirs, env=environment, check=True, timeout=PATIENCE_S
    )
    os.close(theirs)
    shown = b""
    while b"done" not in shown:
        shown += os.read(ours, 10_000)
    os.close(ours)

    [short] = [line.split()[0] for line in shown.decode().splitlines() if "reports" in line]
    assert done.returncode == 0
    assert 8 <= len(short) < 36
    assert [record["id"] for record in project.run("jobs", "show", short, "--json").json] == [stored.ids["done"]]
