"""What a store implements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Driver(Protocol):
    """Takes the turns of a store, one after another, and does them by its own statements: a thread, or a task of the loop."""

    def start(self) -> None:
        """Begin to take turns. Called on the loop at the first work, and again if the driver ended before `Turns.close`."""
        ...

    def wake(self) -> None:
        """End the wait for work. Called on the loop, at most once per turn of it, by a thread that holds `Turns.lock`."""
        ...

    def tell(self, function: Callable[..., object], /, *args: object) -> None:
        """Call `function` on the loop, after what was told before."""
        ...
