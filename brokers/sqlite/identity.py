"""The identity of a process: its boot, its process namespace, its number and its start time.

A worker's row holds it, so that other workers know of its death: boot and process namespace are the same, and no process, or a
different one, has its number.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path


@functools.cache
def _identity(pid: int) -> str:
    try:
        own = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return ""
    number, _, rest = own.partition(" ")
    if number != str(pid):
        return ""  # this /proc shows another namespace
    return f"{boot} {namespace} {pid} {rest.rpartition(')')[2].split()[19]}"


def my_identity() -> str:
    """Return this process's identity, by which others notice its death: boot, namespace, number, start; "" outside Linux."""
    return _identity(os.getpid())


def known_dead(identity: str) -> bool:
    """Return whether the process of `identity` is certainly dead; False if this process can't know."""
    mine = my_identity().split()
    other = identity.split()
    if len(mine) != 4 or len(other) != 4 or mine[:2] != other[:2]:
        return False
    pid = int(other[2])
    try:
        os.kill(pid, 0)  # signal 0 only checks
    except ProcessLookupError:
        return True
    except OSError:
        pass  # another user's process
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False  # hidden from this user
    # another process has the number now, or the process is dead and its parent hasn't collected it yet
    return fields[19] != other[3] or fields[0] in "ZX"
