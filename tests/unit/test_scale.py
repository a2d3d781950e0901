"""tests/scale: its verdicts. Nothing is measured here."""

import pytest

from tests.scale.figures import Figure, Report, percentile


@pytest.mark.parametrize(
    ("figure", "held"),
    [
        (Figure("a", 5.0, "s", at_most=5.0), True),
        (Figure("a", 5.1, "s", at_most=5.0), False),
        (Figure("a", 0.9, "", at_least=0.9), True),
        (Figure("a", 0.8, "", at_least=0.9), False),
        (Figure("a", 1e9, "s"), True),
    ],
)
def test_a_figure_holds_within_its_bound(figure: Figure, held: bool) -> None:
    """A run that says "all held" of anything proves nothing."""
    assert figure.held is held
    assert ("MISSED" in str(figure)) is not held


def test_a_part_of_the_run_fails_only_by_what_does_not_depend_on_the_machine() -> None:
    """Otherwise CI is red on a slow machine, or green with tables that grow for ever."""
    report = Report()
    report.figures += [Figure("slow", 9.0, "s", at_most=5.0), Figure("large", 9.0, "MiB", at_most=5.0, timed=False)]

    assert report.missed(timed=False) == ["large"]
    assert report.missed(timed=True) == ["slow", "large"]


def test_a_percentile_is_one_of_the_values() -> None:
    """The slowest one in a hundred is what users wait for."""
    assert percentile([float(n) for n in range(200, 0, -1)], 0.99) == 199.0
    assert percentile([7.0], 0.5) == 7.0
