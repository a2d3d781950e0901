"""Whether a worker lives, by its beats alone."""

from __future__ import annotations

from leveret.brokers.leases import BEAT_S, LEASE_S, Beats

MINE, OTHER = 1, 2
MISSED = int(LEASE_S / BEAT_S)
"""The beats of an observer that another worker's lease outlasts."""


def silent_after(beats: Beats, *read: int) -> list[bool]:
    """Return whether `OTHER` counts as dead after each read of its beat."""
    found = []
    for beat in read:
        count = beats.counted([(MINE, 7), (OTHER, beat)], [MINE])
        beats.keep(count, 0.0)
        found.append(count.silent == [OTHER])
    return found


def test_a_worker_is_dead_after_three_beats_without_one_of_its_own() -> None:
    """Its jobs wait until then, and run twice if it comes too early."""
    assert silent_after(Beats(), 5, 5, 5, 5) == [False] * MISSED + [True]


def test_one_beat_in_time_begins_the_count_again() -> None:
    """A worker on a slow disk beats late now and then, and lives."""
    assert not any(silent_after(Beats(), 5, 5, 5, 6, 6, 6, 7))


def test_a_beat_counts_as_life_in_whichever_direction_it_moves() -> None:
    """A file that was restored from a copy has older beats; only standing still is silence."""
    assert not any(silent_after(Beats(), 900, 900, 900, 5, 5, 5))


def test_an_observer_counts_neither_itself_nor_what_was_rolled_back() -> None:
    """A file that is locked for a minute fails every transaction of every worker: nobody could beat, and nobody is dead."""
    beats = Beats()
    for _ in range(10):
        assert beats.counted([(MINE, 7), (OTHER, 5)], [MINE]).silent == []

    assert silent_after(beats, 5, 5) == [False, False]


def test_a_new_observer_gives_each_worker_a_whole_lease() -> None:
    """It hasn't seen how long the others were silent: a worker that starts must take nobody's jobs at once."""
    assert silent_after(Beats(), 5) == [False]


def test_the_next_beat_is_due_after_the_commit_of_the_last() -> None:
    """Counted from its begin, a slow transaction would let beats come in quick succession."""
    beats = Beats()
    beats.keep(beats.counted([], []), 100.0)

    assert beats.next == 100.0 + BEAT_S
