"""The suites that need a server, on each version: `python -m tests.matrix`, or `make test-matrix`. A table at the end, and in a file.

RabbitMQ 3.10, 4.0 and 4.3, PostgreSQL 15 and 17, Redis 7.0 and Valkey 8, each of a Debian suite.
--subset runs what `.ci/run` has time for: on the versions after a server's first the contract of a broker and the fault tests marked
`versions`, and on the last RabbitMQ those of the cluster with this mark.
A version that can't be had here is skipped by name; with CI=true that is a failure.
"""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.nodes import Unavailable
from tests.postgres import installation as postgres
from tests.rabbit import node as rabbit
from tests.redis import installation as redis

_ROOT = Path(__file__).parents[1]
_BUILD = _ROOT / "build"


_SUITES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "RabbitMQ": {
        "contract": ("tests/contract", "-m", "rabbit and not fault"),
        "faults": ("tests/contract", "tests/fault", "-m", "rabbit and fault and not cluster"),
        "cluster": ("tests/fault", "-m", "rabbit and fault and cluster"),
    },
    "PostgreSQL": {
        "contract": ("tests/contract", "tests/postgres", "-m", "postgres and not fault"),
        "faults": ("tests/contract", "tests/postgres", "tests/fault", "-m", "postgres and fault"),
    },
    "Redis": {
        "contract": ("tests/contract", "tests/redis", "-m", "redis and not fault"),
        "faults": ("tests/contract", "tests/redis", "tests/fault", "-m", "redis and fault"),
    },
}
"""By server and name: what pytest runs. The last word says which marks."""


@dataclass(frozen=True)
class Version:
    """One version of a server, and how the tests are told to run on it."""

    server: str
    key: str
    variable: str
    value: str

    def found(self) -> str:
        """Return its name for the table, unpacked if need be. Raises Unavailable."""
        if self.server == "RabbitMQ":
            return f"RabbitMQ {rabbit.installation_of(self.key).version}"
        if self.server == "PostgreSQL":
            return f"PostgreSQL {postgres.unpacked_installation(self.value).major}"
        return redis.unpacked_installation(self.value).version


_RABBITS = [Version("RabbitMQ", key, "LEVERET_TEST_RABBIT", key) for key in rabbit.SUITES]
_POSTGRESES = [
    Version("PostgreSQL", f"{major}", "LEVERET_POSTGRES_SUITE", suite) for suite, major in postgres.SUITES.items()
]
_REDISES = [
    Version("Redis", what.lower().replace(" ", "-"), "LEVERET_REDIS_SUITE", suite)
    for suite, (what, _) in redis.SUITES.items()
]
_VERSIONS = {version.key: version for version in (*_RABBITS, *_POSTGRESES, *_REDISES)}
_LATER = (*_RABBITS[1:], *_POSTGRESES[1:], *_REDISES[1:])


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


def run(version: Version, suite: str, selection: tuple[str, ...], name: str) -> Row:
    """Run one suite on one version."""
    report = _BUILD / f"matrix-{version.key}-{suite}.xml"
    report.unlink(missing_ok=True)
    print(f"== {name}: {suite}", flush=True)
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", "-o", "junit_family=xunit1", *selection],
        cwd=_ROOT,
        env={**os.environ, version.variable: version.value},
        check=False,
    )
    row = Row(name, suite, took_s=time.monotonic() - began)
    if report.exists():
        row = read(report, row)
    if ended.returncode and not row.failed:
        row.failed.append(f"pytest ended with {ended.returncode}")
    return row


def part_of(suite: str, selection: tuple[str, ...]) -> tuple[str, ...]:
    """Return what `--subset` runs of a suite: of the contract that of a broker, and of the faults those marked `versions`."""
    if suite == "contract":
        return ("tests/contract/broker", *selection[-2:])
    return (*selection[:-1], f"{selection[-1]} and versions")


def page(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of the result: a table, what failed or was skipped by name, and the counts of each fault."""
    yield "| server | suite | passed | failed | skipped | minutes |"
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
        yield from ("", "| server | fault | counts |", "|---|---|---|")
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
    parser.add_argument("--versions", help=f"some of {','.join(_VERSIONS)}, separated by commas")
    parser.add_argument("--suites", default=",".join(_SUITES["RabbitMQ"]), help="some of them, separated by commas")
    parser.add_argument("--out", type=Path, default=_BUILD / "matrix.md", help="where the table goes")
    arguments = parser.parse_args()
    usual = [version.key for version in (_LATER if arguments.subset else _VERSIONS.values())]
    keys = arguments.versions.split(",") if arguments.versions else usual
    chosen = arguments.suites.split(",")
    if strange := (set(keys) - set(_VERSIONS)) | (set(chosen) - set(_SUITES["RabbitMQ"])):
        parser.error(f"no {', '.join(sorted(strange))} here; known: {', '.join([*_VERSIONS, *_SUITES['RabbitMQ']])}")
    _BUILD.mkdir(exist_ok=True)
    rows: list[Row] = []
    for version in (_VERSIONS[key] for key in keys):
        try:
            name = version.found()
        except Unavailable as error:
            verdict = [str(error)]
            rows.append(
                Row(version.key, "-", failed=verdict)
                if os.environ.get("CI") == "true"
                else Row(version.key, "-", skipped=verdict)
            )
            continue
        for suite, selection in _SUITES[version.server].items():
            if suite in chosen and not (arguments.subset and suite == "cluster" and version != _RABBITS[-1]):
                rows.append(run(version, suite, part_of(suite, selection) if arguments.subset else selection, name))
    text = "\n".join(page(rows))
    arguments.out.write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {arguments.out}")
    return any(row.failed for row in rows)


if __name__ == "__main__":
    sys.exit(main())
