"""Index a folder of text: `make demo`, or `python examples/index_files/try_out.py FOLDER --limit 500`."""

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
import sysconfig
from itertools import count
from pathlib import Path

NAME, ROOT, STDLIB = "examples.index_files:app", Path(__file__).resolve().parents[2], sysconfig.get_path("stdlib")
SKIPPED = {"__pycache__", "site-packages", "dist-packages", ".git", ".demo"}


def claim() -> str:
    """Return the first number that no other run has; its lock is held until this process ends."""
    for number in map(str, count(1)):
        (ROOT / ".demo" / number).mkdir(parents=True, exist_ok=True)
        lock = os.open(ROOT / ".demo" / number / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return number
    raise AssertionError


async def run(sizes: dict[str, int]) -> None:
    import asyncio
    import logging

    import rich
    from rich.progress import Progress
    from rich.table import Table

    from examples.index_files import FILES, HOME, TOTALS, IndexFile, app, open_index
    from leveret import Outgoing, Priority

    levels = (Priority.HIGH, Priority.NORMAL, Priority.LOW)  # of small, middling and large files
    jobs = [Outgoing(IndexFile(path), priority=levels[(size > 4096) + (size > 65536)]) for path, size in sizes.items()]
    index = open_index()
    logging.basicConfig(filename=HOME / "demo.log", level=logging.INFO)
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
    print("retried: one file in fifty fails on purpose, and runs again a moment later")
    print("dead: a file that isn't text is buried by its handler, with the reason")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=STDLIB, help="default: Python's standard library")
    parser.add_argument("--limit", type=int, metavar="N", help="index at most N files")
    given = parser.parse_args()
    folder = Path(given.folder).resolve()
    if not folder.is_dir():
        parser.error(f"{given.folder} is not a folder")
    how_long = ", which takes 10 to 20 s" if given.folder == STDLIB else ""
    print(
        f"indexing this folder through a queue{how_long}:\n  {folder}", flush=True
    )  # before the imports, which take a while
    sys.path.insert(0, str(ROOT))
    import asyncio

    from leveret import LeveretError

    number = os.environ["DEMO_RUN"] = claim()
    queue, tool = f"demo.files.{number}", Path(sysconfig.get_path("scripts"), "leveret")
    drop = [tool, "dead", "drop", queue, "--yes", "--app", NAME]  # an earlier run's
    subprocess.call(drop, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = [p for p in folder.rglob("*") if not p.is_dir() and SKIPPED.isdisjoint(p.relative_to(folder).parts)]
    if not found:
        sys.exit("the folder has no files")
    with subprocess.Popen([tool, "cron", NAME], cwd=ROOT, env={**os.environ, "LEVERET_LOG": "warning"}) as cron:
        try:
            asyncio.run(run({str(path): path.lstat().st_size for path in sorted(found)[: given.limit]}))
        except LeveretError as error:
            sys.exit(f"Error: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
        finally:
            cron.terminate()
    shared = "LEVERET_BROKER" in os.environ
    where = [] if shared else ["--broker", f"sqlite:///{os.path.relpath(ROOT / '.demo' / number / 'jobs.db')}"]
    print("Look further, with the same LEVERET_BROKER:" if shared else "Look further:")
    for words in (["dead", "list"], ["queues"]):
        print(" ", shlex.join([os.path.relpath(tool), *words, queue, *where]))


if __name__ == "__main__":
    main()
