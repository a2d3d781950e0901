"""Where a look for jobs begins: behind what was seen a moment ago, and from the start once in a while."""

from __future__ import annotations

import pytest

from leveret.brokers.postgresql.cursors import LAG_S, START_S, Cursors

PLACE = ("jobs", 3)
OTHER = ("mails", 3)


@pytest.fixture
def cursors() -> Cursors:
    """Cursors that have looked from the start, at 0.0, and have found the jobs up to number 100, and more behind them."""
    cursors = Cursors()
    assert cursors.look(0.0)
    cursors.saw(PLACE, 100, all=False)
    return cursors


def later(cursors: Cursors, now: float, times: int = 2) -> float:
    """Let `LAG_S` pass some times, with a look each time; return the time then."""
    for _ in range(times):
        now += LAG_S
        assert not cursors.look(now)
    return now


def test_a_look_begins_at_the_start(cursors: Cursors) -> None:
    """A worker that begins behind what others have seen leaves the jobs of the dead."""
    assert Cursors().look(0.0)
    assert cursors.behind(PLACE) == 0


def test_a_level_with_more_goes_on_behind_what_was_found(cursors: Cursors) -> None:
    """Begun at the start, each claim reads all the rows that the claims before it have left behind: 5 claims a second, not 5000."""
    assert not cursors.look(0.01)
    assert cursors.behind(PLACE) == 100
    assert cursors.behind(OTHER) == 0


def test_what_was_just_seen_is_looked_at_again(cursors: Cursors) -> None:
    """Two publishers commit in another order than they got their numbers: the lower one would wait for the next look from the start."""
    cursors.look(0.01)
    cursors.saw(PLACE, 200, all=True)

    assert not cursors.look(0.02)
    assert cursors.behind(PLACE) == 100
    later(cursors, 0.02)
    assert cursors.behind(PLACE) == 200


def test_an_empty_level_follows_the_others(cursors: Cursors) -> None:
    """A level that never has a job would be read from the start by each look, with all that was finished in it an hour ago."""
    cursors.look(0.01)
    cursors.saw(PLACE, 200, all=False)
    cursors.saw(OTHER, None, all=True)

    later(cursors, 0.01)

    assert cursors.behind(OTHER) == 200


def test_the_start_comes_once_in_a_while_and_is_forgotten_where_nothing_was_left(cursors: Cursors) -> None:
    """A transaction that commits after a minute has a low number, and its job waits for this look."""
    now = later(cursors, 0.0)

    assert cursors.look(START_S + 0.01)
    assert cursors.behind(PLACE) == 0
    cursors.saw(PLACE, None, all=True)
    assert not cursors.look(now + START_S)
    assert cursors.behind(PLACE) == 100


def test_more_at_the_start_than_can_be_taken_is_not_passed(cursors: Cursors) -> None:
    """A thousand jobs of a dead worker, taken ten at a time: the second ten would wait a second."""
    later(cursors, 0.0)
    assert cursors.look(START_S + 0.01)
    cursors.saw(PLACE, 10, all=False)

    assert not cursors.look(START_S + 0.02)

    assert cursors.behind(PLACE) == 10


def test_freed_jobs_are_looked_for_at_once(cursors: Cursors) -> None:
    """What another worker gives back is before the place up to which this one has looked."""
    cursors.start_over()

    assert cursors.look(0.01)
    assert not cursors.look(0.02)


def test_a_slow_start_is_taken_less_often(cursors: Cursors) -> None:
    """With a snapshot held for an hour each look from the start reads a million rows; all the time would go there."""
    cursors.took(0.5, 0.5)

    assert not cursors.look(START_S + 0.1)
    assert cursors.look(5.6)
