"""The program of Redis or Valkey, on this machine or in a Debian package, unpacked."""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import nodes
from tests.nodes import Unavailable, unpack, unpacks

HELP = "set LEVERET_TEST_REDIS to a URL, install redis-server or valkey-server, start Docker, or be root on Debian"

SUITES: Mapping[str, tuple[str, str]] = {
    "bookworm": ("Redis 7.0", "redis-server"),
    "trixie": ("Valkey 8", "valkey-server"),
}
"""The Debian suites that the tests run on: what each has, and the name of its package and of its program."""

_OLDEST = 7
_DEFAULT = "bookworm"


@dataclass(frozen=True)
class Installation(nodes.Unprivileged):
    """The folder of the program, and which of the two it is."""

    program: str = "redis-server"

    @property
    def version(self) -> str:
        """What it is, such as "Redis 7.0.15"."""
        return _version(self)


@functools.cache
def _version(installation: Installation) -> str:
    folder = Path(tempfile.gettempdir())
    said = subprocess.run(
        installation.argv(folder, f"{installation.tools}/{installation.program}", "--version"),
        env=installation.environ(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    found = re.match(r"(\w+) server v=([\d.]+)", said)
    assert found is not None, said
    return f"{found[1]} {found[2]}"


def cache() -> Path:
    """Return the folder of what is kept between two runs of the tests."""
    return Path(os.environ.get("LEVERET_REDIS_CACHE") or Path.home() / ".cache" / "leveret-redis")


def local_installation() -> Installation | None:
    """Return the server on PATH, if leveret supports its version; None if there is none."""
    for _, program in SUITES.values():
        if path := shutil.which(program):
            found = Installation(str(Path(path).parent), program=program)
            if int(found.version.split()[1].partition(".")[0]) >= _OLDEST:
                return found
    return None


def package(suite: str) -> str:
    """Return what `unpacked_installation` would use, without downloading anything."""
    if not unpacks() or suite not in SUITES:
        return f"none of {suite}, so the tests that need one are skipped, or fail with CI=true\n{HELP}"
    root = cache() / suite
    there = (root / ".ready").exists()
    what = (
        "private servers of Debian's" if there else "Debian's package, downloaded by the first test that needs it, of"
    )
    return f"{what} {suite} in\n{root} (155 MB; to remove it: rm -r that folder)"


def unpacked_installation(suite: str = _DEFAULT) -> Installation:
    """Return the server of a Debian suite, one of `SUITES`, unpacked at first use.

    Raises:
        Unavailable: The suite isn't known, or can't be had here; the message says why.
    """
    if suite not in SUITES:
        raise Unavailable(f"no Redis of {suite}: the tests know {', '.join(SUITES)}")
    what, program = SUITES[suite]
    if not unpacks():
        raise Unavailable(f"no {what}: {HELP}")
    return Installation("/usr/bin", unpack(f"{what} of {suite}", cache() / suite, suite, program), program=program)
