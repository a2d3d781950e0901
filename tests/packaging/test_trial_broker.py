"""A broker that somebody else wrote needs nothing of leveret's but its contract."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_HARNESS = """
from tests.contract.harness.memory import MemoryHarness
from tests.contract.store.harness import MemoryStoreHarness
from trial_broker.jobs import memory_records
from trial_broker.store import memory_store


class TrialHarness(MemoryHarness):
    example = "trial://"

    def open_store(self, url):
        return memory_store(url)


class TrialStoreHarness(MemoryStoreHarness):
    example = "trial://"

    @property
    def records(self):
        return memory_records(self.url)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package `trial_broker`, a copy of memory under another scheme, installed as pip would: by its entry point."""
    package = tmp_path / "trial_broker"
    shutil.copytree(_ROOT / "brokers/memory", package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in package.glob("*.py"):
        file.write_text(re.sub(r"memory(?=://|:/)", "trial", file.read_text()))
    (package / "harness.py").write_text(_HARNESS)
    info = tmp_path / "trial_broker-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trial-broker\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[leveret.brokers]\ntrial = trial_broker\n")
    return tmp_path


@pytest.mark.timeout(300)  # on a busy machine its two processes are the fourth and the fifth
def test_a_broker_in_a_package_of_its_own_passes_the_conformance_suite(installed: Path) -> None:
    """Whoever needs another broker must be able to write one without a fork of leveret, and to know that it is right."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/contract",
            "-q",
            "-n",
            "2",  # it mostly waits for delays
            "-p",
            "no:cacheprovider",
            "-m",
            "not fault",
        ],
        check=False,
        cwd=_ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(installed),
            "LEVERET_TEST_HARNESS": "trial_broker.harness:TrialHarness",
            "LEVERET_TEST_STORE": "trial_broker.harness:TrialStoreHarness",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )

    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert passed is not None
    assert int(passed[1]) > 160
    assert "skipped" not in done.stdout
