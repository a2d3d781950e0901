"""Servers as plain child processes, whatever they serve: ports, starting, ending with the tests, Debian's packages unpacked."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, TypeVar
from urllib.parse import urlsplit

import pytest

T = TypeVar("T")

_HERE = Path(__file__).parent

NOBODY = 65534
"""The user and group of servers that root starts and that must not, or should not, run as root."""

# A mount namespace for the node alone: /proc and /dev, and the node's folder as /mnt.
_ENTER = """set -e; root=$1 folder=$2; shift 2
mount --rbind /proc "$root/proc"; mount --rbind /dev "$root/dev"; mount --bind "$folder" "$root/mnt"
exec chroot "$root" "$@"
"""


class Unavailable(Exception):
    """This machine has no such server; the message says what would help."""


def absent(reason: str) -> NoReturn:
    """End a test that can't run here: skip it by the reason, or fail it where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class Server:
    """A server for tests: `url` always works; the levers work only if the tests own the process."""

    def __init__(self, url: str, *, why_no_levers: str = "") -> None:
        self.url = url
        self.why_no_levers = why_no_levers

    def _no_lever(self) -> NoReturn:
        pytest.skip(self.why_no_levers)

    async def start(self) -> None:
        """Start the server with its old data, and return once it answers. A running server is left alone."""
        self._no_lever()

    async def stop(self) -> None:
        """Stop the server as an administrator would; kill it after 60 s."""
        self._no_lever()

    async def kill9(self) -> None:
        """End the server at once: none of its code runs. Its data stays for the next `start`."""
        self._no_lever()

    def pause(self) -> None:
        """Hang the server: connections stay up, and nothing answers."""
        self._no_lever()

    def resume(self) -> None:
        """End `pause`."""
        self._no_lever()

    async def close(self) -> None:
        """End all processes that were started for the server."""


def ours(found: Server | T) -> T:
    """Return the programs that were found to run servers of; skip the test if it is a server that isn't ours."""
    if isinstance(found, Server):
        pytest.skip(found.why_no_levers)
    return found


@dataclass(frozen=True)
class Installation:
    """A server's programs, which can be run as child processes."""

    tools: str  # the folder of the programs
    root: Path | None = None  # a folder to run them in by chroot

    def argv(self, folder: Path, *command: str) -> list[str]:
        """Return the arguments that run `command` from here, with the node's folder mounted at `inside`."""
        if self.root is None:
            return list(command)
        enter = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", _ENTER, "enter"]
        return [*enter, str(self.root), str(folder), *command]

    def inside(self, folder: Path) -> str:
        """Return the path of the node's folder as the node sees it."""
        return str(folder) if self.root is None else "/mnt"


@dataclass(frozen=True)
class Unprivileged(Installation):
    """A server's programs, which run as a user that isn't root."""

    ends_by: str = "KILL"  # the signal at which the server ends at once, with all that it forked

    def argv(self, folder: Path, *command: str) -> list[str]:
        """Return the arguments that run `command` as a user that isn't root, with the node's folder mounted at `inside`.

        If this process dies, the command gets the signal `ends_by`.
        """
        user = ["--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"] if os.geteuid() == 0 else []
        if user or shutil.which("setpriv"):  # root without setpriv sees why this can't be
            command = ("setpriv", *user, "--pdeathsig", self.ends_by, *command)
        return super().argv(folder, *command)

    def environ(self, folder: Path) -> dict[str, str]:
        """Return all that the programs find in their environment."""
        path = os.environ["PATH"] if self.root is None else "/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": self.inside(folder), "LC_ALL": "C", "TZ": "UTC"}


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The server that the tests use."""

    what: str
    """What is used, as `make test` prints it before the first test."""
    find: Callable[[], T]
    """Start or unpack it, if that is needed. Raises Unavailable if that fails."""


_given: set[int] = set()
"""Ports that `free_ports` has returned: some node may bind one later, or only now and then."""


def free_ports(count: int) -> list[int]:
    """Return free ports of 127.0.0.1, below the range that the kernel gives to outgoing connections. None is returned twice soon.

    The processes of `pytest -n` look in separate parts of it: two that look at once would find the same.
    """
    found: list[int] = []
    part, parts = (
        int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]),
        int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")),
    )
    ports = range(26000 + part, 31990, parts)
    if len(_given) > len(ports) // 2:
        _given.clear()
    for port in random.sample(ports, len(ports)):
        if port in _given:
            continue
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
            if len(found) == count:
                _given.update(found)
                return found
    msg = "127.0.0.1 has no free port between 26000 and 31990"
    raise RuntimeError(msg)


def private_folder(prefix: str) -> Path:
    """Return a new folder, which belongs to the user that `Unprivileged` programs run as."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def write(file: Path, text: str) -> None:
    """Write a file that the server can read, whatever the umask."""
    file.write_text(text)
    file.chmod(0o644)


def url_at(url: str, port: int) -> str:
    """Return the URL with this port of 127.0.0.1 in the place of its host and port."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{login}{at}127.0.0.1:{port}").geturl()


def spawn(argv: Sequence[str], *, env: Mapping[str, str], output: Path) -> subprocess.Popen[bytes]:
    """Start a child of this thread that dies with it, even if the tests are killed (on Linux with `setpriv`)."""
    if shutil.which("setpriv"):
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]
    with output.open("ab") as file:
        # a new session: a ^C at the terminal goes to the tests only, which then end the node
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what `spawn` started at once: none of its code runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # the group holds only processes that this process started
        process.wait(10)


async def why_not_up(process: subprocess.Popen[bytes], up: Callable[[], Awaitable[bool]], limit_s: float) -> str:
    """Wait until the process is up, and return an empty string; or why it isn't, to stand behind its name."""
    end = time.monotonic() + limit_s
    while not await up():
        if process.poll() is not None:
            return f"exited with {process.returncode}"
        if time.monotonic() > end:
            return f"didn't answer in {limit_s:.0f} s"
        await asyncio.sleep(0.05)  # a process's start has no event to wait on
    return ""


def tail(*files: Path) -> str:
    """Return the last lines of each file that is there."""
    return "\n".join("\n".join(file.read_text(errors="replace").splitlines()[-15:]) for file in files if file.exists())


def has_docker() -> bool:
    """Return whether a Docker engine answers, or is said to be elsewhere."""
    if "DOCKER_HOST" in os.environ:
        return True
    with socket.socket(socket.AF_UNIX) as engine:
        return engine.connect_ex("/var/run/docker.sock") == 0


def unpacks() -> bool:
    """Return whether this machine can unpack a package of Debian."""
    return os.geteuid() == 0 and Path("/etc/debian_version").exists() and shutil.which("apt-get") is not None


def unpack(what: str, root: Path, suite: str, *packages: str) -> Path:
    """Return `root` once it holds packages of that Debian suite, downloaded at first use, in which programs run by chroot.

    Raises:
        Unavailable: They can't be had or run here; the message says why there is no `what`.
    """
    made = subprocess.run(
        [_HERE / "get-debian.sh", root, suite, *packages], capture_output=True, text=True, timeout=600, check=False
    )
    if made.returncode:
        msg = f"no {what}: unpacking Debian's {packages[0]} of {suite} failed: {made.stderr.strip().splitlines()[-1:]}"
        raise Unavailable(msg)
    tried = subprocess.run(
        Installation("", root).argv(Path(tempfile.gettempdir()), "/bin/true"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if tried.returncode:
        msg = f"no {what}: this container may not mount ({tried.stderr.strip()[-200:]}); install {packages[0]} instead"
        raise Unavailable(msg)
    return root
