"""PostgreSQL's programs on this machine or in a Debian package, unpacked; PgBouncer's and faketime's beside them."""

import functools
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import nodes
from tests.nodes import NOBODY, Unavailable, absent, unpack, unpacks, write

HELP = "set LEVERET_TEST_POSTGRES to a URL, install postgresql, start Docker, or be root on Debian"

SUITES = {"bookworm": 15, "trixie": 17}
"""The Debian suites that the tests run on, and the PostgreSQL of each."""

_OLDEST = 14
_DEFAULT = "bookworm"
_TOOLS = ("postgres", "initdb", "pg_basebackup")
_PACKAGES = ("postgresql", "pgbouncer", "faketime")


@dataclass(frozen=True)
class Installation(nodes.Unprivileged):
    """A folder of PostgreSQL's programs, or of PgBouncer's."""

    ends_by: str = "QUIT"

    def run(self, folder: Path, program: str, *arguments: str, password: str = "") -> str:
        """Run one of the programs to its end, and return its output; RuntimeError with its stderr if it fails."""
        done = subprocess.run(
            self.argv(folder, f"{self.tools}/{program}", *arguments),
            cwd=folder,
            env={**self.environ(folder), "PGPASSWORD": password},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
        return done.stdout

    @property
    def major(self) -> int:
        """The version, such as 15."""
        return _major(self)

    def template(self) -> Path:
        """Return a folder with `data`, a new server's, and `password`, its superuser's; made at first use and kept in the cache folder."""
        kept = cache() / f"template-{self.major}-{NOBODY if os.geteuid() == 0 else os.geteuid()}"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="leveret-postgres-") as name:
                made, inside = Path(name), self.inside(Path(name))
                if os.geteuid() == 0:
                    os.chown(made, NOBODY, NOBODY)
                write(made / "password", secrets.token_hex(16))
                options = ["-U", "postgres", "-A", "scram-sha-256", "--pwfile", f"{inside}/password", "--no-sync"]
                self.run(made, "initdb", "-D", f"{inside}/data", "-E", "UTF8", "--locale", "C", *options)
                part = kept.with_name(f".{kept.name}-{os.getpid()}")
                copy(made, part)
            try:
                part.rename(kept)
            except OSError:  # another run of the tests was faster
                shutil.rmtree(part)
        return kept


@functools.cache
def _major(installation: Installation) -> int:
    said = installation.run(Path(tempfile.gettempdir()), "postgres", "--version")
    found = re.search(r"\d+", said)
    assert found is not None, said
    return int(found[0])


def copy(source: Path, target: Path) -> None:
    """Copy a folder with its files' owners and rights."""
    subprocess.run(["cp", "-a", source, target], check=True, timeout=120)


def cache() -> Path:
    """Return the folder of what is kept between two runs of the tests."""
    return Path(os.environ.get("LEVERET_POSTGRES_CACHE") or Path.home() / ".cache" / "leveret-postgres")


def local_installation() -> Installation | None:
    """Return this machine's newest PostgreSQL of those that leveret supports, the one on PATH first; None if it has none."""
    on_path = shutil.which("postgres")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: -int(folder.parent.name))
    found = (Installation(str(folder)) for folder in folders if all((folder / tool).exists() for tool in _TOOLS))
    return next((one for one in found if one.major >= _OLDEST), None)


def package(suite: str) -> str:
    """Return what `unpacked_installation` would use, without downloading anything."""
    if not unpacks() or suite not in SUITES:
        return f"none of {suite}, so the tests that need one are skipped, or fail with CI=true\n{HELP}"
    root = cache() / suite
    there = (root / ".ready").exists()
    what = (
        "private nodes of Debian's" if there else "Debian's packages, downloaded by the first test that needs them, of"
    )
    return f"{what} {suite} in\n{root} (450 MB; to remove it: rm -r that folder)"


def unpacked_installation(suite: str = _DEFAULT) -> Installation:
    """Return the PostgreSQL of a Debian suite, one of `SUITES`, unpacked at first use.

    Raises:
        Unavailable: The suite isn't known, or can't be had here; the message says why.
    """
    if suite not in SUITES:
        raise Unavailable(f"no PostgreSQL of {suite}: the tests know {', '.join(SUITES)}")
    if not unpacks():
        raise Unavailable(f"no PostgreSQL of {suite}: {HELP}")
    root = unpack(f"PostgreSQL of {suite}", cache() / suite, suite, *_PACKAGES)
    return Installation(f"/usr/lib/postgresql/{SUITES[suite]}/bin", root)


def pgbouncer_for(server: Installation) -> Installation:
    """Return PgBouncer's programs: of the server's own suite, this machine's, or Debian's, unpacked at first use."""
    if server.root is None and (local := shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")):
        return Installation(str(Path(local).parent), ends_by="KILL")
    return Installation("/usr/sbin", server.root or _beside("pgbouncer"), ends_by="KILL")


def faketime_for(server: Installation) -> Path:
    """Return the library that steps a process's clock: of the server's own suite, this machine's, or Debian's, unpacked at first use."""
    where = "usr/lib/*/faketime/libfaketime.so.1"
    if found := next((server.root or Path("/")).glob(where), None):
        return found
    return next(_beside("faketime").glob(where))


def _beside(what: str) -> Path:
    """Return a folder with what stands beside a local server; the test ends if it can't be had."""
    if not unpacks():
        absent(f"no {what}: install it, or be root on Debian")
    try:
        return unpack(what, cache() / f"{_DEFAULT}-beside", _DEFAULT, *_PACKAGES[1:])
    except Unavailable as error:
        absent(str(error))
