"""The memory that all processes of one `leveret work` share: the supervisor makes it, and each worker gets its file descriptor."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os

logger = logging.getLogger("leveret.supervisor")

_REGION_BYTES = 64
_REGIONS = 1024
_BYTES = _REGION_BYTES * _REGIONS


def make_shared() -> int | None:
    """Return a file descriptor of new shared memory, all zeros; None and a warning if this machine gives none."""
    try:
        fd = _open()
        os.ftruncate(fd, _BYTES)
    except OSError as error:
        logger.warning("no memory can be shared, so each worker takes an equal share of every rate limit: %s", error)
        return None
    return fd


def _open() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("leveret")
    import tempfile

    with tempfile.TemporaryFile() as file:  # already unlinked
        return os.dup(file.fileno())


class SharedRegion:
    """One region: eight numbers, and a lock that the kernel takes back when its holder dies."""

    def __init__(self, fd: int, memory: memoryview, place: int) -> None:
        self._fd = fd
        self._start = place * _REGION_BYTES
        self.numbers = memory[self._start : self._start + _REGION_BYTES].cast("d")

    def lock(self) -> bool:
        """Take the lock; False if another process has it."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _REGION_BYTES, self._start)
        except OSError:
            return False
        return True

    def unlock(self) -> None:
        """Give the lock back."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, _REGION_BYTES, self._start)


class SharedMemory:
    """The shared memory, in one worker. A process opens it once and never closes it: closing any descriptor of a file drops its locks."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd
        self._memory = memoryview(mmap.mmap(fd, _BYTES))
        self._given = 0

    def region(self) -> SharedRegion | None:
        """Return the next region; None if all are taken."""
        if self._given == _REGIONS:
            return None
        self._given += 1
        return SharedRegion(self._fd, self._memory, self._given - 1)
