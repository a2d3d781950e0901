"""The suites that need a RabbitMQ, on each version: `python -m tests.matrix`, or `make test-matrix`. A table at the end, and in a file.

--subset runs what `.ci/run` has time for: on 4.0 and 4.3 the contract of a broker and the fault tests marked `versions`, and on the last
version those of the cluster with this mark.
A version that can't be had here is skipped by name; with CI=true that is a failure.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.nodes import Unavailable
from tests.rabbit.node import SUITES, installation_of

_ROOT = Path(__file__).parents[1]
_BUILD = _ROOT / "build"
_CONTRACT = ("tests/contract", "-m", "rabbit and not fault")
_FAULTS = ("tests/contract", "tests/fault", "-m", "rabbit and fault and not cluster")
_CLUSTER = ("tests/fault", "-m", "rabbit and fault and cluster")


@dataclass
class Row:
    """One suite on one version."""

    version: str
    suite: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    counts: list[tuple[str, str]] = field(default_factory=list)
    took_s: float = 0.0


def read(report: Path, row: Row) -> Row:
    """Return the row with what pytest's JUnit report says: each failed or skipped test by name, and each test's own counts."""
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            row.failed.append(name)
        elif (skipped := case.find("skipped")) is not None:
            row.skipped.append(f"{name}: {skipped.get('message')}")
        else:
            row.passed += 1
        row.counts += [(name, one.get("value", "")) for one in case.iter("property") if one.get("name") == "counts"]
    return row


def run(version: str, suite: str, selection: tuple[str, ...], name: str) -> Row:
    """Run one suite on one version."""
    report = _BUILD / f"matrix-{version}-{suite}.xml"
    report.unlink(missing_ok=True)
    print(f"== RabbitMQ {name}: {suite}", flush=True)
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", "-o", "junit_family=xunit1", *selection],
        cwd=_ROOT,
        env={**os.environ, "LEVERET_TEST_RABBIT": version},
        check=False,
    )
    row = Row(name, suite, took_s=time.monotonic() - began)
    if report.exists():
        row = read(report, row)
    if ended.returncode and not row.failed:
        row.failed.append(f"pytest ended with {ended.returncode}")
    return row


def page(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of the result: a table, what failed or was skipped by name, and the counts of each fault."""
    yield "| RabbitMQ | suite | passed | failed | skipped | minutes |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row.version} | {row.suite} | {row.passed} | {len(row.failed)} | {len(row.skipped)} | {row.took_s / 60:.1f} |"
        )
    for title in ("failed", "skipped"):
        named = [f"- {row.version}, {row.suite}: {name}" for row in rows for name in getattr(row, title)]
        if named:
            yield from ("", f"{title.capitalize()}:", "", *named)
    if counted := [(row.version, *count) for row in rows for count in row.counts]:
        yield from ("", "| RabbitMQ | fault | counts |", "|---|---|---|")
        yield from (
            f"| {version} | {name.rpartition('.')[2].removeprefix('test_').replace('_', ' ')} | {text} |"
            for version, name, text in counted
        )


def main() -> int:
    """Run the suites; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument(
        "--subset", action="store_true", help="what .ci/run has time for, on the versions after the first"
    )
    parser.add_argument("--versions", help=f"some of {','.join(SUITES)}, separated by commas")
    parser.add_argument("--suites", default="contract,faults,cluster", help="some of them, separated by commas")
    parser.add_argument("--out", type=Path, default=_BUILD / "matrix.md", help="where the table goes")
    arguments = parser.parse_args()
    versions = (arguments.versions or ",".join(list(SUITES)[arguments.subset :])).split(",")
    some = " and versions" if arguments.subset else ""
    suites = {
        "contract": ("tests/contract/test_broker.py", *_CONTRACT[1:]) if arguments.subset else _CONTRACT,
        "faults": (*_FAULTS[:-1], _FAULTS[-1] + some),
        "cluster": (*_CLUSTER[:-1], _CLUSTER[-1] + some),
    }
    if strange := (set(versions) - set(SUITES)) | (set(arguments.suites.split(",")) - set(suites)):
        parser.error(f"no {', '.join(sorted(strange))} here; known: {', '.join([*SUITES, *suites])}")
    _BUILD.mkdir(exist_ok=True)
    rows: list[Row] = []
    for version in versions:
        try:
            name = installation_of(version).version
        except Unavailable as error:
            verdict = [str(error)]
            rows.append(
                Row(version, "-", failed=verdict)
                if os.environ.get("CI") == "true"
                else Row(version, "-", skipped=verdict)
            )
            continue
        chosen = [
            suite
            for suite in arguments.suites.split(",")
            if suite != "cluster" or version == versions[-1] or not arguments.subset
        ]
        rows += [run(version, suite, suites[suite], name) for suite in chosen]
    text = "\n".join(page(rows))
    arguments.out.write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {arguments.out}")
    return any(row.failed for row in rows)


if __name__ == "__main__":
    sys.exit(main())
