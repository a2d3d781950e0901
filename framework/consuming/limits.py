"""How many handlers may run at once in a process, and which place says so: code, the environment or the command line."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from ..errors import ConfigurationError

logger = logging.getLogger("leveret.worker")

CONCURRENCY = 100
THREADS = 8
MOST = 100_000
"""The largest limit that a place may set: a process has no memory for more jobs, and a larger number is a slip."""

CODE = "code"
VARIABLE = "LEVERET_CONCURRENCY"
COMMAND_LINE = "command line"
DEFAULT = "default"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The number of handlers that may run at once in a process."""

    concurrency: int = CONCURRENCY
    """The limit for all handlers together."""
    threads: int = THREADS
    """The limit for `def` handlers."""
    queues: Mapping[str, int] = {}
    """The limit per queue, by name; a queue that isn't named has only the limits above."""
    origin: str = DEFAULT
    """The place that sets the first two."""
    origins: Mapping[str, str] = {}
    """The place that sets the limit of a queue, by name."""

    def of(self, queue: str, *, in_threads: bool) -> int:
        """Return how many handlers of `queue` may run at once; `in_threads` where all of them are a `def`."""
        return self._binding(queue, in_threads=in_threads)[0]

    def origin_of(self, queue: str, *, in_threads: bool) -> str:
        """Return the place that sets the limit which `of` returns."""
        return self._binding(queue, in_threads=in_threads)[1]

    def warn_of_capped(self, queue: str, *, in_threads: bool) -> None:
        """Log a warning if the limit that a place sets for `queue` is above the one of the process, which holds."""
        holds, wanted = self.of(queue, in_threads=in_threads), self.queues.get(queue, 0)
        if wanted > holds:
            logger.warning(
                "queue %s runs %d jobs at once, not %d (%s): %d is the limit of the process%s (%s); raise it with --concurrency %d",
                queue,
                holds,
                wanted,
                self.origins.get(queue, DEFAULT),
                holds,
                " for `def` handlers" if in_threads else "",
                self.origin,
                wanted,
            )

    def _binding(self, queue: str, *, in_threads: bool) -> tuple[int, str]:
        process = min(self.concurrency, self.threads) if in_threads else self.concurrency
        if self.queues.get(queue, process + 1) <= process:
            return self.queues[queue], self.origins.get(queue, DEFAULT)
        return process, self.origin


class Concurrency(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that one place sets."""

    origin: str = CODE
    process: int | None = None
    """The limit of a process, for async handlers and for `def` handlers each; None if this place doesn't set it."""
    queues: Mapping[str, int] = {}
    """The limit per queue, by name."""


def in_code(given: int | Mapping[str, int] | None, where: str) -> Concurrency:
    """Return the limits of a `concurrency=`. Raises ConfigurationError for a wrong value; the text begins with `where`."""
    if given is None:
        return Concurrency()
    if isinstance(given, Mapping):
        for name, limit in given.items():
            if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"{where}: concurrency must be a number, or a dict of queue names and numbers, not {dict(given)!r:.80}"
                raise ConfigurationError(msg)
            _check(limit, f"{where}: concurrency of queue {name!r}")
        return Concurrency(queues=dict(given))
    _check(given, f"{where}: concurrency")
    return Concurrency(process=given)


def _check(limit: Any, what: str) -> None:
    if type(limit) is not int or not 1 <= limit <= MOST:  # a bool is an int
        # Python prints no 5 000 digits
        shown = "a larger one" if type(limit) is int and limit > MOST else f"{limit!r:.80}"
        msg = f"{what} must be a whole number of at least 1 and at most {MOST}, not {shown}"
        raise ConfigurationError(msg)


def limit_in(text: str) -> int | None:
    """Return the limit that `text` spells; None for anything else than a whole number from 1 to `MOST`."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MOST))):
        return None
    limit = int(text)
    return limit if 1 <= limit <= MOST else None


def in_environment(text: str | None) -> Concurrency:
    """Return the limits that LEVERET_CONCURRENCY sets, such as `100,emails=50`; ConfigurationError for a wrong value."""
    limits: dict[str, int] = {}
    for part in text.split(",") if text else []:
        name, equals, number = (word.strip() for word in part.rpartition("="))
        limit = limit_in(number)
        if (equals and not name) or limit is None:
            msg = (
                f"{VARIABLE} {text!r:.200}: expected N or QUEUE=N, with commas between and N a whole number from 1 to {MOST}, "
                "such as 100,emails=50"
            )
            raise ConfigurationError(msg)
        if name in limits:
            what = f"queue {name!r}" if name else "the process"
            msg = f"{VARIABLE} {text!r:.200}: the limit of {what} is given twice"
            raise ConfigurationError(msg)
        limits[name] = limit
    return Concurrency(origin=VARIABLE, process=limits.pop("", None), queues=limits)


def limits_of(places: Sequence[Concurrency], *, served: Collection[str], known: Collection[str], app: str) -> Limits:
    """Return the limits of a process that takes jobs from the queues `served`. Each limit is the one of the last place that sets it.

    A queue that isn't `known` to the app is a ConfigurationError in code, and a warning in the environment, which several apps
    may share.
    """
    origin, process = DEFAULT, None
    queues: dict[str, int] = {}
    origins: dict[str, str] = {}
    for place in places:
        for name in place.queues:
            if name not in known:
                _unknown(place, name, known, app)
        if place.process is not None:
            origin, process = place.origin, place.process
        own = {name: limit for name, limit in place.queues.items() if name in served}
        queues |= own
        origins |= dict.fromkeys(own, place.origin)
    return Limits(
        concurrency=max([CONCURRENCY, *queues.values()]) if process is None else process,
        threads=process or THREADS,
        queues=queues,
        origin=origin,
        origins=origins,
    )


def _unknown(place: Concurrency, name: str, known: Collection[str], app: str) -> None:
    queues = f"app {app!r} has no handler for queue {name!r} (queues with handlers: {', '.join(known) or 'none'})"
    if place.origin != VARIABLE:
        msg = f"concurrency: {queues}; correct the name, or list the handler's module in App(modules=[…])"
        raise ConfigurationError(msg)
    logger.warning("%s: %s; this limit has no effect", VARIABLE, queues)
