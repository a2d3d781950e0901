"""A machine whose clock is wrong."""

import time
from collections.abc import Callable

from leveret.clock import SystemClock


class OffClock(SystemClock):
    """The machine's clock, as it would be `off_s` later."""

    def __init__(self, off_s: float) -> None:
        self.now: Callable[[], float] = lambda: time.time() + off_s
