"""What the connections of all libraries have in common."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

from leveret.errors import InvalidJob
from leveret.settings import redact
from leveret.texts import said_by

from .script import Write

OUTSIDE: Final = "has no open transaction: open one with {}, or publish without connection="
FAILED: Final = "has a transaction that failed: roll it back, and publish in the next one"
CLOSED: Final = "is closed: publish on an open one"
BUSY: Final = "is in the middle of another statement: wait for the end of that"


class Connection(ABC):
    """A connection of one library."""

    library: ClassVar[str]
    name: ClassVar[str]
    """Its name for users."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @classmethod
    @abstractmethod
    def fits(cls, one: Any) -> bool:
        """Return whether `one`, an object of the library, is such a connection."""

    @abstractmethod
    def problem(self) -> str | None:
        """Return why nothing can be published on it; None if something can. Sends nothing."""

    def check(self) -> None:
        """Raise InvalidJob if nothing can be published on it."""
        try:
            problem = self.problem()
        except Exception as error:  # noqa: BLE001 - what the library says of a connection that is gone
            problem = f"can't be used: {redact(said_by(error))}"
        check(problem)


class AsyncConnection(Connection):
    """One of an asynchronous library."""

    @abstractmethod
    async def run(self, write: Write, deadline: float) -> Any:
        """Execute the statements, and return what their script returns."""


class BlockingConnection(Connection):
    """One of a blocking library."""

    @abstractmethod
    def run(self, write: Write) -> Any:
        """Execute the statements, and return what their script returns."""


def has(one: object, member: str) -> bool:
    """Whether the object's class has the member."""
    return getattr(type(one), member, None) is not None


def awaits(one: object, member: str) -> bool:
    """Whether that member is a coroutine function."""
    return inspect.iscoroutinefunction(getattr(type(one), member, None))


def libraries_of(one: object) -> set[str]:
    """Return the names of the packages that the object's classes come from."""
    return {kind.__module__.partition(".")[0] for kind in type(one).__mro__}


def check(problem: str | None) -> None:
    """Raise InvalidJob if there is a problem."""
    if problem is not None:
        msg = f"connection= {problem}"
        raise InvalidJob(msg)
