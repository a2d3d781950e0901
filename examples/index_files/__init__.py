"""An app that indexes text files, one job a file; `make demo`, which is try_out.py, runs it over a folder.

Small files come first; what isn't text is buried, with its reason; one in fifty fails once and is retried; cron prints totals."""

import json
import os
import re
import sqlite3
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from leveret import App, Attempt, Bury, Consume, Job, Outcome, Priority, Queue
from leveret.middleware import Retries, Timeout

RUN = os.environ.get("DEMO_RUN", "1")  # runs side by side have a number, and with it a queue and a folder, each
HOME, FILES, MOST = Path(__file__).resolve().parents[2] / ".demo" / RUN, Queue(f"demo.files.{RUN}"), 4
TOTALS = f"""SELECT count(*), total(state = 'done'), total(attempts > 1),
    total(state = 'bury' OR state = 'failed' AND attempts = {MOST}), total(size) FROM files"""


class IndexFile(Job, name="file.index", queue=FILES):
    path: str


class PrintTotals(Job, name="totals.print", queue=FILES, priority=Priority.URGENT, expires_s=5): ...


def open_index() -> sqlite3.Connection:  # each statement commits by itself, from any thread
    HOME.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(HOME / "index.db", timeout=30, isolation_level=None, check_same_thread=False)
    db.executescript("""PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;
        CREATE TABLE IF NOT EXISTS files (path PRIMARY KEY, state, attempts DEFAULT 0, size DEFAULT 0, words)""")
    return db


async def note(attempt: Attempt[sqlite3.Connection], proceed: Consume) -> Outcome:  # our own middleware
    state = "failed"
    try:
        outcome = await proceed(attempt)
        state = type(outcome).__name__.lower()
        return outcome
    finally:
        if isinstance(job := attempt.job, IndexFile):
            row = (state, attempt.number, job.path)
            attempt.resources.execute("UPDATE files SET state = ?, attempts = ? WHERE path = ?", row)


LAYERS = [
    Retries(max_attempts=MOST),
    note,
    Timeout(60),
]  # first is outermost: `note` is inside, so it is retried as well
LOCAL = f"sqlite:///{HOME}/jobs.db"
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
    print(f"cron: {done:,} of {published:,} files indexed, {words:,} words; {dead:,} dead letters")
