"""Index a folder of text, one job a file: `make demo`, or `python examples/index_files.py FOLDER --limit 500`.

Small files come first; what isn't text is buried, with its reason; one in fifty fails once and is retried; cron prints totals."""

import asyncio
import json
import logging
import os
import re
import sqlite3
import subprocess
import sysconfig
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import click
import rich
from rich.progress import Progress
from rich.table import Table

from leveret import App, Attempt, Bury, Consume, Job, LeveretError, Outcome, Outgoing, Priority, Queue
from leveret.middleware import Retries, Timeout

NAME, FILES, LOCAL = "examples.index_files:app", Queue("demo.files"), "sqlite:///.demo/jobs.db"
LEVELS = (Priority.HIGH, Priority.NORMAL, Priority.LOW)  # of small, middling and large files
FOLDER = click.Path(exists=True, resolve_path=True, path_type=Path)
SKIPPED = {"__pycache__", "site-packages", "dist-packages", ".git", ".demo"}
TOTALS = "SELECT count(*), total(state = 'done'), total(attempts > 1), total(state = 'bury'), total(size) FROM files"


class IndexFile(Job, name="file.index", queue=FILES):
    path: str


class PrintTotals(Job, name="totals.print", queue=FILES, priority=Priority.URGENT, expires_s=5): ...


def open_index() -> sqlite3.Connection:  # each statement commits by itself, from any thread
    Path(".demo").mkdir(exist_ok=True)
    db = sqlite3.connect(".demo/index.db", timeout=30, isolation_level=None, check_same_thread=False)
    db.executescript("""PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;
        CREATE TABLE IF NOT EXISTS files (path PRIMARY KEY, state, attempts DEFAULT 0, size DEFAULT 0, words)""")
    return db


async def note(attempt: Attempt[sqlite3.Connection], proceed: Consume) -> Outcome:  # a layer of our own
    outcome = await proceed(attempt)
    if isinstance(job := attempt.job, IndexFile):
        row = (type(outcome).__name__.lower(), attempt.number, job.path)
        attempt.resources.execute("UPDATE files SET state = ?, attempts = ? WHERE path = ?", row)
    return outcome


LAYERS = [note, Retries(max_attempts=4), Timeout(60)]  # first is outermost: `note` sees how every run ends
app = App("demo", default_broker=LOCAL, lifespan=lambda: nullcontext(open_index()), middleware=LAYERS)
app.cron("* * * * * *", PrintTotals(), name="totals")  # six fields: seconds first


@app.handler
def index_file(job: IndexFile, attempt: Attempt[sqlite3.Connection]) -> None:  # a `def` runs in a thread
    if attempt.number == 1 and sum(job.path.encode()) % 50 == 0:
        raise ConnectionError("made up: it comes back in a moment")
    try:
        words = Counter(re.findall(r"[^\W\d_]{2,}", Path(job.path).read_text("utf-8").lower()))
    except (OSError, UnicodeDecodeError) as error:
        raise Bury(f"{Path(job.path).name} is no readable text") from error
    row = (words.total(), json.dumps(words), job.path)  # a job runs at least once: another time writes the same
    attempt.resources.execute("UPDATE files SET size = ?, words = ? WHERE path = ?", row)


@app.handler
def print_totals(job: PrintTotals, attempt: Attempt[sqlite3.Connection]) -> None:
    published, done, _, dead, words = map(int, attempt.resources.execute(TOTALS).fetchone())
    rich.print(f"cron: {done:,} of {published:,} files are indexed, {words:,} words; {dead:,} are dead letters")


async def run(sizes: dict[str, int]) -> None:
    jobs = [Outgoing(IndexFile(path), priority=LEVELS[(size > 4096) + (size > 65536)]) for path, size in sizes.items()]
    index = open_index()
    logging.basicConfig(filename=".demo/demo.log", level=logging.INFO)
    index.execute("DELETE FROM files")
    index.executemany("INSERT INTO files (path) VALUES (?)", [(path,) for path in sizes])
    with Progress() as progress:
        bar = progress.add_task("indexing", total=len(jobs))
        async with app.worker(queues=[FILES.name]), app.publisher() as publisher:
            await publisher.publish_many(jobs, timeout_s=60)
            while not progress.finished:
                await asyncio.sleep(0.1)
                published, done, retried, dead, _ = map(int, index.execute(TOTALS).fetchone())
                progress.update(bar, completed=done + dead)
    rate = round(published / (progress.tasks[bar].finished_time or 1))
    table = Table("job", "published", "done", "retried", "dead", "jobs/s")
    table.add_row("file.index", *map(str, (published, done, retried, dead, rate)))
    rich.print(table)


@click.command(help=__doc__)
@click.argument("folder", default=sysconfig.get_path("stdlib"), type=FOLDER)
@click.option("--limit", type=int, help="Index so many files at most.")
def main(folder: Path, limit: int | None) -> None:
    found = [p for p in folder.rglob("*") if not p.is_dir() and SKIPPED.isdisjoint(p.relative_to(folder).parts)]
    os.chdir(Path(__file__).parent.parent)  # .demo, and the commands at the end, mean the same from anywhere
    leveret, quiet = os.path.relpath(Path(sysconfig.get_path("scripts"), "leveret")), subprocess.DEVNULL
    drop = [leveret, "dead", "drop", FILES.name, "--yes", "--app", NAME]  # an earlier run's
    subprocess.call(drop, stdout=quiet, stderr=quiet)
    with subprocess.Popen([leveret, "cron", NAME], env={**os.environ, "LEVERET_LOG": "warning"}) as cron:
        try:
            asyncio.run(run({str(path): path.lstat().st_size for path in sorted(found)[:limit]}))
        except LeveretError as error:
            raise click.ClickException(str(error)) from None
        finally:
            cron.terminate()
    print(f"Look further, with the same LEVERET_BROKER if one is set:\n  {leveret} dead list {FILES.name} --app {NAME}")
    print(f"  {leveret} queues --app {NAME}")


if __name__ == "__main__":
    main()
