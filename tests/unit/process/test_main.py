"""What a worker process says of itself."""

import pytest

from leveret.outcome import Kind
from leveret.process.main import _told  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({}, "nothing"),
        ({Kind.LOST: 0}, "nothing"),
        ({Kind.DONE: 50, Kind.LOST: 0, Kind.CUT_OFF: 5, Kind.RETRY: 1}, "5 cut off, 50 done, 1 retried"),
    ],
)
def test_a_worker_tells_only_the_endings_that_came(counts: dict[Kind, int], says: str) -> None:
    """An operator who reads "0 that the broker delivers again" looks for a loss that there was not."""
    assert _told(counts) == says
