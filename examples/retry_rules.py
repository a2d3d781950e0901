"""Retry rules: what is tried again, how often, how soon, and what is buried at once.

The test at the end walks through waits of minutes without sleeping: `running` has a clock of its own.
"""

import asyncio

from tenacity import stop_after_attempt, wait_exponential_jitter

from leveret import App, Attempt, Bury, Job, Queue, Retry, Snooze
from leveret.middleware import Retries, Rule
from leveret.testing import running


class CardDeclinedError(Exception): ...


class HttpError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class ClosedError(Exception):
    opens_in_s = 3600


def is_busy(error: Exception) -> bool:
    return isinstance(error, HttpError) and error.status in (429, 503)


rules = Retries(
    Rule(CardDeclinedError, bury=True),                        # a person must look at it: no retry would help
    Rule(is_busy, max_attempts=8, base_s=5, cap_s=300),        # a predicate; patient
    Rule((ConnectionError, TimeoutError), immediate=2),        # over in a moment: twice more in place, then as below
    Rule(ClosedError, wait=lambda attempt, error: error.opens_in_s),    # the error says when
    Rule(OSError, wait=wait_exponential_jitter(max=60), stop=stop_after_attempt(4)),    # strategies of tenacity
    max_attempts=3, base_s=1,                                  # anything else
)  # fmt: skip
app = App("shop", middleware=[rules])


class Charge(Job, name="card.charge", queue=Queue("payments")):
    what: str


calls: list[str] = []


@app.handler
async def charge(job: Charge, attempt: Attempt) -> Bury | Retry | Snooze | None:
    calls.append(job.what)
    match job.what:
        case "declined":
            raise CardDeclinedError("insufficient funds")
        case "busy" if attempt.number < 6:
            raise HttpError(503)
        case "reset" if len(calls) < 3:
            raise ConnectionResetError("by peer")
        case "closed" if attempt.number == 1:
            raise ClosedError
        case "disk":
            raise OSError("no space left on device")
        case "bug":
            raise KeyError("price")
        case "not yet" if attempt.envelope.passes == 0:
            return Snooze(3600)  # costs no attempt
        case "asked" if attempt.number == 1:
            return Retry(30)  # counts as one
        case "refused":
            return Bury("the account is closed")  # returned or raised, from any depth
    return None


async def runs(what: str) -> tuple[int, int, str]:
    """Return how often the handler was called, in how many attempts, and the reason of a burial."""
    calls.clear()
    async with running(app) as lab:
        receipt = await lab.publish(Charge(what))
        await lab.drain()
        reasons = [run.outcome.reason for run in lab.buried if isinstance(run.outcome, Bury)]
        return len(calls), max(run.number for run in lab.attempts(receipt.job_id)), "".join(reasons)


async def try_out() -> None:
    assert await runs("declined") == (1, 1, "CardDeclinedError: insufficient funds (a rule buries it at once)")
    assert await runs("busy") == (6, 6, "")
    assert await runs("reset") == (3, 1, "")
    assert await runs("closed") == (2, 2, "")
    assert await runs("disk") == (4, 4, "OSError: no space left on device (attempt 4, stop_after_attempt(4))")
    assert await runs("bug") == (3, 3, "KeyError: 'price' (attempt 3 of 3)")
    assert await runs("not yet") == (2, 1, "")
    assert await runs("asked") == (2, 2, "")
    assert await runs("refused") == (1, 1, "the account is closed")


if __name__ == "__main__":
    asyncio.run(try_out())
