"""Turns: what one event loop asks of a store, gathered into one transaction after another.

A store keeps jobs as rows, and a taker claims rows under a lease. While one transaction is under way, `Turns` collects the
publishes, settlements and claims of its loop; all of them share the next one. This package names no database and does no input
or output. A store has a `Driver`, which does each `Turn` by its own statements: on a thread, or on the loop.
"""

from .access import Access
from .claimed import Claimed
from .consumption import Consumption
from .driver import Driver
from .on_loop import OnLoop
from .takers import Taker, Takers, Window
from .turn import Turn
from .turns import UNDER_WAY, WINDOW, Turns
from .writes import Look, Run, Write

__all__ = [
    "UNDER_WAY", "WINDOW", "Access", "Claimed", "Consumption", "Driver", "Look", "OnLoop", "Run", "Taker", "Takers", "Turn", "Turns", "Window", "Write",
]  # fmt: skip
