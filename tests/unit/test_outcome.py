"""What a handler may say of a run, and what is refused where it says it."""

import pytest

from leveret import Retry, Snooze


@pytest.mark.parametrize("outcome", [Retry, Snooze])
@pytest.mark.parametrize("delay_s", [-1, 49 * 86_400, 10**400, float("inf"), float("nan")])
def test_a_wait_that_no_broker_can_hold_is_refused_where_it_is_asked_for(
    outcome: type[Retry | Snooze], delay_s: float
) -> None:
    """Found only when it is published, it could end in nothing but a burial."""
    with pytest.raises(ValueError, match="at most 48 days"):
        outcome(delay_s)


def test_a_snooze_is_a_wait_and_a_retry_may_be_at_once() -> None:
    """A snooze of nothing would run again and again, as fast as it can, and never cost an attempt."""
    assert Retry(0).delay_s == 0
    assert Retry(48 * 86_400).delay_s == 48 * 86_400
    with pytest.raises(ValueError, match="above 0"):
        Snooze(0)
