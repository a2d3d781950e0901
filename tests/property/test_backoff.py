"""Waits between tries stay within their bounds, for any figures."""

import random
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from leveret import Bury, Retry
from leveret.backoff import ceiling_s, full_jitter
from leveret.brokers.rabbitmq.topology import UNIT_MS, delay_units
from leveret.middleware import Retries
from leveret.outcome import MAX_DELAY_S
from leveret.runtime import Runtime
from tests.unit.runs import attempt, chain

seconds = st.floats(1e-6, 1e9)
attempts = st.integers(1, 1 << 40)


@given(attempts, seconds, seconds, st.integers(0, 1 << 32))
def test_a_wait_lies_between_zero_and_its_ceiling(number: int, one: float, other: float, seed: int) -> None:
    """A negative wait is an error in the broker; one above its cap is a job that is forgotten."""
    base_s, cap_s = sorted((one, other))
    ceiling = ceiling_s(number, base_s=base_s, cap_s=cap_s)
    assert base_s <= ceiling <= cap_s
    assert 0 <= full_jitter(number, base_s=base_s, cap_s=cap_s, rng=random.Random(seed)) <= ceiling


@given(attempts, seconds, seconds)
def test_ceilings_only_ever_lengthen(number: int, one: float, other: float) -> None:
    """What goes on failing must be asked less and less often."""
    base_s, cap_s = sorted((one, other))
    assert ceiling_s(number, base_s=base_s, cap_s=cap_s) <= ceiling_s(number + 1, base_s=base_s, cap_s=cap_s)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(1e-3, 1e4), st.floats(1.0, 100.0), st.integers(0, 1 << 32))
async def test_retries_ends_every_job_and_waits_within_its_figures(
    number: int, most: int, base_s: float, times: float, seed: int
) -> None:
    """Every failing job has an end, whatever it was set to."""

    async def fails(_: object) -> None:
        raise ValueError

    runtime = Runtime(app="test", rng=random.Random(seed))
    layer = Retries(max_attempts=most, base_s=base_s, cap_s=base_s * times)
    outcome = await chain(layer, handler=fails, bound=runtime)(attempt(number))
    if number >= most:
        assert isinstance(outcome, Bury)
    else:
        assert isinstance(outcome, Retry)
        assert 0 <= cast("float", outcome.delay_s) <= layer.waits_s[number - 1]


@given(st.floats(0, MAX_DELAY_S, exclude_min=True))
def test_a_delay_is_never_shortened_and_at_most_a_sixty_fourth_longer(delay_s: float) -> None:
    """A job that comes early finds nothing there yet; one that comes late by more isn't on time for anybody."""
    units = delay_units(delay_s)
    unit_s = UNIT_MS / 1000
    assert delay_s <= units * unit_s
    assert units * unit_s <= (delay_s + unit_s) * (1 + 1 / 64)


@given(st.floats(0.01, MAX_DELAY_S), st.floats(0.01, MAX_DELAY_S))
def test_rounding_keeps_the_order_of_delays(one: float, other: float) -> None:
    """The earlier of two jobs must not come after the later one."""
    assert delay_units(min(one, other)) <= delay_units(max(one, other))
