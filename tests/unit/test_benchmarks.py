"""benchmarks/peers: what it refuses, what it writes, and that docs/performance.md says what it says. Nothing is measured here."""

import argparse
import asyncio
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.peers import __main__ as program
from benchmarks.peers import contestants
from benchmarks.peers.contestants import (
    ARQ,
    CELERY,
    CONTESTANTS,
    DRAMATIQ,
    LEVERET,
    PGQUEUER,
    POSTGRESQL,
    PROCRASTINATE,
    RABBITMQ,
    REDIS,
    SAQ,
    TASKIQ,
    Contestant,
    environment,
    missing,
)
from benchmarks.peers.harness import Keeper, Refused
from benchmarks.peers.measures import UNITS, Unit
from benchmarks.peers.publish import Lanes, kept, one_by_one
from benchmarks.peers.report import Figures, Goal, goals, goals_on_postgresql, goals_on_redis, show_beside, tables
from benchmarks.peers.shape import RESULT, Sender

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
UNIT = {unit.name: unit for unit in UNITS}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the program; a broker that it looks for is an error."""
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    monkeypatch.setattr(program, "open_server", lambda *_: pytest.fail("nothing was to be measured"))
    try:
        return program.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def result(*rows: tuple[Unit, Contestant, str, dict[str, float] | str]) -> dict[str, Any]:
    """Return a run's JSON."""
    figures = Figures()
    for row in rows:
        figures.add(*row)
    machine = {"name": "m", "processor": "p", "cpus": "2", "system": "s", "python": "3", "load": "0"}
    return {
        "date": "2026-01-01",
        "machine": machine,
        "servers": {"RabbitMQ": "4"},
        "versions": {},
        "rounds": 1,
        "toy": False,
        "arguments": {"jobs": 1},
        "figures": figures.as_json(),
    }


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where results go by default."""
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "leveret,nosuch"], "--only: no nosuch here; known: leveret, raw aio-pika, Celery"),
        (["--measure", "publsh"], "--measure: no publsh here; known: publish, consume"),
        (["--kind", "quorums"], "--kind: no quorums here; known: quorum, classic"),
        (["--rounds", "0"], "--rounds: at least 1"),
        (["--show", "nosuch.json"], "there is no file nosuch.json"),
        (["--only", "leveret", "--measure", "consume", "--kind", "plain"], "nothing to measure"),
    ],
)
def test_what_can_only_be_empty_is_refused(
    arguments: list[str], said: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped name gave an empty result, exit code 0, and the committed figures were gone."""
    assert run(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(results.iterdir())


def test_a_result_takes_a_name_that_is_free(results: Path) -> None:
    """Two runs of a day on a machine: the second would silently replace figures that the docs cite."""
    run_of_today, default = result(), argparse.Namespace(out=None)
    for taken in ("2026-01-01-m.json", "2026-01-01-m-b.svg"):
        (results / taken).touch()
    assert program.output(default, run_of_today) == results / "2026-01-01-m-c.json"
    assert program.output(argparse.Namespace(out="x.json"), run_of_today) == Path(
        "x.json"
    )  # named: its user's own choice
    assert program.output(argparse.Namespace(out=""), run_of_today) is None


def test_showing_a_result_writes_nothing_and_begins_with_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looking at a committed result changed its plot; and figures merged from several runs looked like one run's."""
    file = tmp_path / "X.json"
    file.write_text(
        json.dumps(
            result((UNIT["publish pipelined"], LEVERET, "quorum", {"per_s": 9.0, "cpu_us": 1.0}))
            | {"note": "of two runs"}
        )
    )
    monkeypatch.setattr(program, "draw", lambda *_: pytest.fail("it drew"))
    assert run(monkeypatch, "--show", str(file)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("note: of two runs\n")
    assert "best peer" not in printed  # none took part
    assert list(tmp_path.iterdir()) == [file]


def goal(figures: Figures, beside: str) -> Goal:
    """Return the one goal that is beside this."""
    (found,) = (one for one in goals(figures) if one.beside.startswith(beside))
    return found


def test_a_best_peer_says_who_was_not_measured() -> None:
    """The best of those that were measured on one queue type may not be the best: a verdict must not pretend it."""
    unit, figures = UNIT["publish pipelined"], Figures()
    for name, peer, kind, rate in (
        (unit, LEVERET, "quorum", 90.0),
        (unit, CELERY, "quorum", 10.0),
        (unit, TASKIQ, "quorum", 9.0),
    ):
        figures.add(name, peer, kind, {"per_s": rate, "cpu_us": 1.0})
    assert goal(figures, "× Celery").cells[1:] == (
        "9.00",
        "× Celery (quorum), on quorum only, without FastStream",
        "≥ 8",
        "reached",
    )
    for peer, rate in ((CELERY, 15.0), (DRAMATIQ, 5.0), (TASKIQ, 4.0)):
        figures.add(unit, peer, "plain", {"per_s": rate, "cpu_us": 1.0})
    assert goal(figures, "× Celery").cells[1:] == ("6.00", "× Celery (classic), without FastStream", "≥ 8", "MISSED")


def test_delays_are_compared_with_all_that_wait_in_the_broker() -> None:
    """Celery's delayed jobs wait in the broker on quorum queues: leaving it out would hide that it is the best."""
    unit, figures = UNIT["delayed by 5 s, lateness"], Figures()
    for peer, kind, late in (
        (LEVERET, "quorum", 7.0),
        (CELERY, "quorum", 1.0),
        (CELERY, "plain", 0.1),
        (TASKIQ, "quorum", 3.0),
        (TASKIQ, "plain", 3.0),
    ):
        figures.add(unit, peer, kind, dict.fromkeys(unit.metrics, late))
    every = [found for found in goals(figures) if found.what.startswith(unit.name)]
    assert [(found.reached, found.beside, found.verdict) for found in every] == [
        (7.0, "× Celery (quorum)", "MISSED")
    ] * 2


def test_nobody_is_compared_with_a_peer_on_another_server() -> None:
    """A queue in a database and one in a broker promise different things: the best of both would be the best of neither."""
    unit, figures = UNIT["publish pipelined"], Figures()
    for peer, kind, rate in (
        (LEVERET, "quorum", 90.0),
        (TASKIQ, "quorum", 10.0),
        (LEVERET, "postgresql", 60.0),
        (PGQUEUER, "postgresql", 20.0),
        (PROCRASTINATE, "postgresql", 30.0),
    ):
        figures.add(unit, peer, kind, {"per_s": rate, "cpu_us": 1.0})
    assert goal(figures, "× Taskiq").reached == 9.0
    there = {found.beside: found.cells[1:] for found in goals_on_postgresql(figures) if found.what == "publish_many"}
    assert there == {
        "× PgQueuer": ("3.00", "× PgQueuer", "≥ 1.2", "reached"),
        "× Procrastinate": ("2.00", "× Procrastinate", "≥ 4", "MISSED"),
        "× SAQ": ("–", "× SAQ", "≥ 4", "not measured"),
    }
    assert [(title, len(rows)) for title, _, _, rows in tables(figures)] == [
        ("publish pipelined", 2),
        ("publish pipelined, PostgreSQL", 3),
    ]


def test_the_table_of_the_docs_has_a_row_for_each_who_was_measured() -> None:
    """A page that is typed off by hand has other figures than the run; and a refused round must not look like a 0."""
    figures = Figures()
    rate = {"per_s": 12345.6, "cpu_us": 9.87}
    figures.add(UNIT["publish pipelined"], LEVERET, "postgresql", rate)
    figures.add(UNIT["publish pipelined"], LEVERET, "quorum", rate)
    figures.add(UNIT["publish pipelined"], PGQUEUER, "postgresql", "the queue holds 7")
    figures.add(UNIT["publish pipelined"], PROCRASTINATE, "postgresql", rate)
    with io.StringIO() as file:
        show_beside(Console(file=file, width=200), figures)
        rows = [[cell.strip() for cell in line.split("|")] for line in file.getvalue().splitlines() if "12," in line]
    assert rows == [["", name, "–", "12,346 (9.87)", "–", "–", "–", ""] for name in ("leveret", "Procrastinate")]


def test_a_worker_on_postgresql_may_have_more_memory_than_one_on_rabbitmq() -> None:
    """The goal is a difference of two rows of one run: a row that is missing is no difference of 0."""
    figures = Figures()

    def more() -> list[str]:
        return [found.cells[1] for found in goals_on_postgresql(figures) if found.what.startswith("memory")]

    figures.add(UNIT["memory"], LEVERET, "postgresql", {"idle_mb": 33.5, "after_mb": 38.0})
    assert more() == ["–", "–"]
    figures.add(UNIT["memory"], LEVERET, "quorum", {"idle_mb": 27.0, "after_mb": 27.5})
    assert more() == ["6.50", "10.5"]


def test_a_goal_on_redis_is_beside_those_on_redis() -> None:
    """SAQ runs on two servers, and results are kept beside RabbitMQ too: a row of another server would decide the verdict."""
    figures = Figures()
    awaited, kept_there = UNIT["a result awaited one by one, on Redis"], UNIT["jobs with results, kept by Redis"]
    for unit, one, kind, value in (
        (UNIT["consume, one process"], LEVERET, "redis", 90.0),
        (UNIT["consume, one process"], SAQ, "postgresql", 80.0),
        (UNIT["consume, one process"], TASKIQ, "quorum", 60.0),
        (UNIT["consume, one process"], SAQ, "redis", 6.0),
        (UNIT["consume, one process"], ARQ, "redis", 10.0),
        (awaited, LEVERET, "redis", 1.5),
        (awaited, ARQ, "redis", 1.0),
        (awaited, SAQ, "redis", 2.0),
        (kept_there, LEVERET, "quorum", 60.0),
        (kept_there, TASKIQ, "quorum", 10.0),
        (kept_there, CELERY, "quorum", 15.0),
    ):
        figures.add(unit, one, kind, dict.fromkeys(unit.metrics, value))
    found = {(row.what, row.beside): row.reached for row in goals_on_redis(figures) if row.reached is not None}
    assert found == {
        ("consume", "× arq, without streaq"): 9.0,
        ("a result, p50", "× SAQ"): 0.75,
        ("a result, p99", "× SAQ"): 0.75,
        ("jobs with results, RabbitMQ quorum", "× Taskiq"): 6.0,
        ("jobs with results, RabbitMQ quorum", "× Celery"): 4.0,
    }


def test_without_redis_no_results_are_kept_beside_rabbitmq() -> None:
    """A machine without Redis would begin a measurement that has no store."""
    asked = argparse.Namespace(measure="results", kind="")
    assert {one.server for _, who in program.turns(asked, CONTESTANTS) for one, _ in who} == {RABBITMQ, REDIS}
    assert program.turns(asked, CONTESTANTS, without=[REDIS]) == []
    assert {one.server for _, who in program.turns(asked, CONTESTANTS, without=[RABBITMQ]) for one, _ in who} == {REDIS}


@pytest.mark.parametrize(
    "one",
    [one for one in CONTESTANTS if one.server in (POSTGRESQL, REDIS)],
    ids=lambda one: f"{one.name}, {one.server.name}",
)
def test_the_jobs_of_each_contestant_can_be_counted(one: Contestant) -> None:
    """Where nothing says how many jobs are left, a job that was lost, or that wasn't settled, passes for done."""
    assert one.waiting


def test_packages_that_contradict_the_others_are_looked_for_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arq wants another redis-py than the rest: its row would name the version that it doesn't run on, or it would run on that."""
    monkeypatch.setattr(contestants, "MADE", tmp_path)
    assert "`make bench-peers` installs it" in (missing(ARQ) or "")
    for name in ARQ.packages:
        folder = tmp_path / ARQ.apart / f"{name}-0.7.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7\n")
    assert missing(ARQ) is None
    assert ARQ.versions == ", ".join(f"{name} 0.7" for name in ARQ.packages)
    assert environment(ARQ, url="", kind="redis")["PYTHONPATH"] == str(tmp_path / ARQ.apart)
    assert str(tmp_path) not in environment(SAQ, url="", kind="redis").get("PYTHONPATH", "")


async def sent_and_read(results: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Publish three jobs whose results are these, as `publish.py` does where they are kept, and return what happened."""
    happened = list[str]()

    async def one(at: int, delay_s: float | None) -> int:
        happened.append("published")
        return len(happened) - 1

    async def read(handles: list[Any]) -> list[Any]:
        happened.append(f"read {len(handles)}")
        return [results[handle % len(results)] for handle in handles]

    class Line:
        """The input of the process."""

        def readline(self) -> str:
            happened.append("asked")
            return "\n"

    monkeypatch.setattr(sys, "stdin", Line())
    monkeypatch.setattr("benchmarks.peers.publish.WARM_UP", 1)
    sender = Sender(one, None, read=read)
    await kept(sender, Lanes(sender), 2)
    return happened


def test_results_are_read_when_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading that began before the jobs were worked off would be measured as waiting."""
    assert asyncio.run(sent_and_read([RESULT], monkeypatch)) == [*["published"] * 3, "asked", "read 3"]
    assert json.loads(capsys.readouterr().out)["sent"] == 3


def test_a_wrong_result_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contestant that loses results, or hands out None, would be the fastest."""
    with pytest.raises(RuntimeError, match="1 of 3 results are wrong, such as None"):
        asyncio.run(sent_and_read([RESULT, RESULT, None], monkeypatch))


def test_a_result_is_timed_from_the_publish_to_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that begins after the publish hides its round trip; one that ends before the read hides the wait."""
    clock = [100]
    monkeypatch.setattr("benchmarks.peers.publish.time.monotonic_ns", lambda: clock[0])

    async def one(at: int, delay_s: float | None) -> None:
        clock[0] += 5

    async def read(handles: list[Any]) -> list[Any]:
        clock[0] += 7
        return [RESULT]

    assert asyncio.run(one_by_one(Sender(one, None, read=read), 3)) == {"took_ns": [12, 12, 12]}


def test_a_publisher_that_dies_says_why() -> None:
    """A peer that can't publish with results would end the whole run, or leave a row without a reason."""
    absent = Contestant("absent", "with_nosuch.py", (), "")
    with Keeper(absent, "", "quorum", 1, "") as keeper, pytest.raises(Refused, match=r"No module named .*with_nosuch"):
        keeper.published()


def test_without_a_server_the_rest_is_measured() -> None:
    """A machine without RabbitMQ must still measure PostgreSQL, and not begin a relay that has no broker."""
    asked = argparse.Namespace(measure="publish,relay", kind="postgresql,quorum")
    assert [unit.measure for unit, _ in program.turns(asked, CONTESTANTS)] == ["publish", "publish", "relay"]
    left = program.turns(asked, CONTESTANTS, without=[RABBITMQ])
    assert [unit.measure for unit, _ in left] == ["publish", "publish"]
    assert {one.server for _, who in left for one, _ in who} == {POSTGRESQL}


def test_a_value_shows_on_which_side_of_its_bound_it_is() -> None:
    """0.5004 printed as 0.50 beside ≤ 0.5 looks reached."""
    assert Goal("", 0.5004, "", 0.5, at_least=False).cells[1:] == ("0.5004", "", "≤ 0.5", "MISSED")
    assert Goal("", None, "", 0.5, at_least=False).cells[1] == "–"


def test_the_docs_give_the_verdicts_that_the_program_gives() -> None:
    """A goal that was missed and that the page calls reached, or leaves out: each row is what the results say that the page links to, in that order."""
    page = PAGE.read_text(encoding="utf-8")
    page = page.partition("## Beside its peers on Redis")[0]
    links = dict.fromkeys(re.findall(r"\]\(\.\./(benchmarks/results/[^)]+\.json)\)", page))
    runs = [goals(Figures.of_json(json.loads((ROOT / link).read_text())["figures"])) for link in links]
    expected: list[tuple[str, ...]] = []
    for rows in zip(*runs, strict=True):
        place, found = next(((place, row) for place, row in enumerate(rows) if row.reached is not None), (0, rows[0]))
        what, reached, beside, bound, verdict = found.cells
        verdict = verdict.replace("MISSED", "**missed**") + (
            ", the run before" if place > 1 else ""
        )  # this version has two
        expected.append((what, reached, beside, bound, verdict))
    table = page.partition("## What was to be reached\n")[2].partition("|---")[2].partition("\n\n")[0]
    assert [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()[1:]] == expected


@pytest.mark.parametrize(
    ("title", "goals_there"),
    [
        ("Beside its peers on PostgreSQL", goals_on_postgresql),
        ("Beside its peers on Redis, and with results", goals_on_redis),
    ],
)
def test_the_docs_give_the_verdicts_of_a_server(title: str, goals_there: Callable[[Figures], list[Goal]]) -> None:
    """As above, for the section on one server and its run."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    [link] = re.findall(r"\]\(\.\./(benchmarks/results/[^)]+\.json)\)", section)
    figures = Figures.of_json(json.loads((ROOT / link).read_text())["figures"])
    expected = [(*found.cells[:4], found.verdict.replace("MISSED", "**missed**")) for found in goals_there(figures)]
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert [row for row in rows if row[1:4] in {found[1:4] for found in expected}] == expected
