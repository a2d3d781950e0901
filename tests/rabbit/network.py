"""Hosts as network namespaces on a bridge of their own, whose links can be cut without a word: needs root, iproute2 and util-linux.

with Network(["n1", "n2", "n3"]) as network:   # this process reaches all of them
    network.enter("n1")                         # the command that runs another on that host
    network.cut("n1", "n2")                     # silent loss, both ways; HOME is this machine
    network.heal()

Each namespace lives as long as a process of ours, which dies with this thread: nothing is left, even if the tests are killed.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

HOME = "home"
"""This machine's own end of the bridge."""

_SWITCH = "switch"
_NOWHERE = "02:00:00:00:de:ad"  # a hardware address that nobody has: what is sent there is lost


class NoNetwork(Exception):
    """Network namespaces can't be made here; the message says why."""


class Network:
    """A bridge, hosts on it, and this machine as one of them. The addresses are of 198.18.0.0/15, which is kept for tests (RFC 2544)."""

    def __init__(self, hosts: Sequence[str]) -> None:
        subnet = f"198.{random.randrange(18, 20)}.{random.randrange(256)}"
        self.address = {host: f"{subnet}.{number}" for number, host in enumerate([HOME, *hosts], 1)}
        self._link = f"lv{os.getpid()}x{random.randrange(1000)}"
        self._holders: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Make the hosts and their links; NoNetwork if this machine can't."""
        if os.geteuid() != 0:
            raise NoNetwork("network namespaces need root")
        if missing := [tool for tool in ("ip", "nsenter", "unshare", "setpriv") if shutil.which(tool) is None]:
            raise NoNetwork(f"network namespaces need {', '.join(missing)}")
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        for host in (_SWITCH, *self.address):
            if host != HOME:
                self._holders[host] = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        self._until_apart()
        self._ip(_SWITCH, "link add bridge type bridge", "link set bridge up")
        for host, address in self.address.items():
            end = self._link if host == HOME else "eth0"
            there = os.getpid() if host == HOME else self._holders[host].pid
            self._ip(
                _SWITCH,
                f"link add to-{host} type veth peer name {end} netns {there}",
                f"link set to-{host} master bridge up",
            )
            self._ip(
                host,
                f"address add {address}/24 dev {end}",
                f"link set {end} up",
                *(["link set lo up"] * (host != HOME)),
            )

    def _until_apart(self) -> None:
        """Wait until each holder is in its namespace."""
        own, ends = Path("/proc/self/ns/net").readlink(), time.monotonic() + 10
        for holder in self._holders.values():
            while holder.poll() is None and Path(f"/proc/{holder.pid}/ns/net").readlink() == own:
                if time.monotonic() > ends:
                    raise NoNetwork("this machine makes no network namespace in 10 s")
                time.sleep(0.005)  # a namespace has no event
            if holder.returncode is not None:
                assert holder.stderr is not None
                raise NoNetwork(f"this machine makes no network namespace: {holder.stderr.read().decode().strip()}")

    def enter(self, host: str) -> tuple[str, ...]:
        """Return the words that run a command on the host; none for `HOME`."""
        return () if host == HOME else ("nsenter", f"--net=/proc/{self._holders[host].pid}/ns/net", "--")

    def cut(self, one: str, *others: str) -> None:
        """Lose all that goes between `one` and each of `others`, both ways; nobody hears of it."""
        for other in others:
            for here, there in ((one, other), (other, one)):
                self._ip(
                    here, f"neigh replace {self.address[there]} lladdr {_NOWHERE} dev {self._end(here)} nud permanent"
                )

    def heal(self) -> None:
        """End all cuts."""
        for host in self.address:
            self._ip(host, f"neigh flush dev {self._end(host)} nud permanent")

    def close(self) -> None:
        """Remove the hosts and their links."""
        for holder in self._holders.values():
            holder.kill()
            holder.communicate()
        self._holders.clear()

    def _end(self, host: str) -> str:
        return self._link if host == HOME else "eth0"

    def _ip(self, host: str, *commands: str) -> None:
        done = subprocess.run(
            [*self.enter(host), "ip", "-batch", "-"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        if done.returncode:
            raise NoNetwork(f"{host}: {'; '.join(commands)}: {done.stderr.strip()}")
