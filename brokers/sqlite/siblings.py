"""The stores of one process: each notices what another wrote to the same file, and all of them survive a fork."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from typing import Protocol


class Sibling(Protocol):
    """A store, as the other stores of its process see it."""

    @property
    def path(self) -> str:
        """The path of the file."""
        ...

    @property
    def takes(self) -> bool:
        """Whether a consumption takes jobs through the store."""
        ...

    @property
    def in_sqlite(self) -> threading.Lock:
        """Held while the store's thread is inside SQLite."""
        ...

    def notice(self) -> None:
        """Look at the file now."""
        ...

    def forked(self) -> None:
        """In a forked child: start over with an empty store."""
        ...


_registry: weakref.WeakSet[Sibling] = weakref.WeakSet()
_registry_lock = threading.Lock()
_leaked: list[sqlite3.Connection | None] = []
_paused: list[Sibling] = []


def register(store: Sibling) -> None:
    """Add `store`, until it is garbage-collected."""
    with _registry_lock:
        _registry.add(store)


def notice(writer: Sibling) -> None:
    """Let the other stores of the same file look at what `writer` wrote."""
    for other in _stores():
        if other is not writer and other.path == writer.path and other.takes:
            other.notice()


def leak(connection: sqlite3.Connection | None) -> None:
    """Keep the parent's connection alive and unused, since closing it could end the parent's locks."""
    _leaked.append(connection)


def _stores() -> list[Sibling]:
    with _registry_lock:
        return list(_registry)


def _before_fork() -> None:
    # a fork in the middle of a call would leave SQLite's internal locks taken for ever in the child
    global _paused  # noqa: PLW0603
    _paused = [store for store in _stores() if store.in_sqlite.acquire(timeout=1.0)]


def _after_fork_in_parent() -> None:
    for store in _paused:
        store.in_sqlite.release()


def _after_fork_in_child() -> None:
    global _registry_lock  # noqa: PLW0603
    _registry_lock = threading.Lock()
    for store in _stores():
        store.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
