"""A time limit for runs."""

from __future__ import annotations

import asyncio
from typing import ClassVar, Literal, final

from leveret.attempt import Attempt
from leveret.clock import Clock, SystemClock
from leveret.deadlines import deadlines
from leveret.layer import Consume, LayerFacts
from leveret.outcome import Outcome
from leveret.runtime import Runtime


@final
class Timeout:
    """Ends a run after `limit_s`; the run then fails with TimeoutError.

    An `async def` handler is cancelled, and has failed even if it returns afterwards. While it ignores the cancellation, the
    worker logs its line every 30 s. A `def` handler keeps running, because a thread can't be stopped. The worker logs a
    warning, and the handler keeps its slot. The run fails when the handler returns, so that no retry runs beside it. A worker
    refuses a limit above three quarters of the setting `consumer_timeout_s`.

    Args:
        limit_s: Seconds for the handler and the middleware inside this one, above 0 and finite.

    Raises:
        TypeError, ValueError: `limit_s` isn't a number, or isn't above 0 and finite.
    """

    once: ClassVar[Literal[True]] = True

    def __init__(self, limit_s: float) -> None:
        if isinstance(limit_s, bool) or not isinstance(limit_s, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"Timeout: limit_s must be a number of seconds, not {limit_s!r}"
            raise TypeError(msg)
        if not 0 < limit_s < float("inf"):
            msg = f"Timeout: limit_s must be above 0 and finite, not {limit_s}"
            raise ValueError(msg)
        self.limit_s = limit_s
        self._clock: Clock = SystemClock()

    def __repr__(self) -> str:
        return f"Timeout({self.limit_s:g})"

    def bind(self, runtime: Runtime) -> None:
        """Take the clock."""
        self._clock = runtime.clock

    def facts(self) -> LayerFacts:
        """Return the limit."""
        return LayerFacts(limit_s=self.limit_s)

    async def consume(self, attempt: Attempt, proceed: Consume) -> Outcome:
        """Run the job. Raises TimeoutError up to 50 ms after the limit; the handler's own TimeoutError passes unchanged."""
        clock = self._clock
        deadline = clock.monotonic() + self.limit_s
        outer = attempt.end_by(deadline)
        if outer < deadline:
            attempt.end_by(outer)
        wheel = deadlines(clock)
        entry = wheel.set(deadline, attempt)
        try:
            outcome = await proceed(attempt)
            if not entry.expired:
                return outcome
            msg = f"{attempt.envelope.job} was ended by its Timeout of {self.limit_s:g} s, but ignored the cancellation and returned"
            raise TimeoutError(msg).with_traceback(entry.where)
        except asyncio.CancelledError as error:
            if not wheel.was_it(entry):
                raise
            msg = f"{attempt.envelope.job} was ended by its Timeout of {self.limit_s:g} s"
            # with the frames in which the handler was; a CancelledError above it in the log would say nothing more
            raise TimeoutError(msg).with_traceback(error.__traceback__) from None
        finally:
            wheel.clear(entry)
            attempt.end_by(outer)
