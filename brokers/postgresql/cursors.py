"""Where to begin to look for jobs in each level: behind those that were seen a moment ago.

The rows of finished jobs stay in the index until a vacuum, which nobody's old snapshot may hold back. A look from the start passes
all of them. A cursor is only where to begin, never what is done: a number is given to a job before its transaction commits, so a
lower number may come later. Hence a look begins some way back, and from the start once in a while.
"""

from __future__ import annotations

from typing import TypeAlias, final

START_S = 1.0
"""How often a look begins at the start of each level, seconds; less often if such a look takes more than a tenth of that."""
LAG_S = 0.05
"""A look begins behind what was seen this long ago, or twice as long, seconds: most transactions are shorter."""

Place: TypeAlias = tuple[str, int]
"""A queue and the number of a level."""


@final
class Cursors:
    """The cursors of one store."""

    def __init__(self) -> None:
        self._behind: dict[Place, int] = {}
        self._aging: dict[Place, int] = {}
        self._seen: dict[Place, int] = {}
        self._top = 0
        self._next_start = 0.0
        self._next_step = 0.0
        self._first = True

    def start_over(self) -> None:
        """Let the next look begin at the start: jobs are free again that were passed."""
        self._next_start = 0.0

    def look(self, now: float) -> bool:
        """Begin a look at `now`, `time.monotonic()` seconds; return whether it begins at the start."""
        if now >= self._next_step:
            self._next_step = now + LAG_S
            self._behind, self._aging = self._aging, self._seen.copy()
        self._first = now >= self._next_start
        if self._first:
            self._next_start = now + START_S
        return self._first

    def behind(self, place: Place) -> int:
        """Return the number behind which the look begins."""
        return 0 if self._first else self._behind.get(place, 0)

    def saw(self, place: Place, last: int | None, *, all: bool) -> None:
        """Note the last number that was found; `all` says that nothing is left behind it."""
        self._top = max(self._top, last or 0)
        if all:
            self._seen[place] = self._top
        elif last is not None:
            self._seen[place] = last
            if self._first:  # there are more between the start and where this level was
                self._behind[place] = self._aging[place] = last

    def took(self, seconds: float, now: float) -> None:
        """Note how long a look from the start took."""
        self._next_start = max(self._next_start, now + 10 * seconds)
