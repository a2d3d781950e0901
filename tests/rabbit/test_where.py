"""The program behind the profile in docs/performance.md."""

import subprocess
import sys
from pathlib import Path

from tests.rabbit.node import Rabbit


def test_the_profile_still_runs(rabbit: Rabbit) -> None:
    """A figure in the docs that its program can't show any more is a claim."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.where", rabbit.url, "3000"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "CPU us per job" in line] == [
        "publish pipelined",
        "consume, standard chain",
    ]
