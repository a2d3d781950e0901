"""What commands take and print."""

import click
import pytest

from leveret.cli.output import duration

_CONTEXT = click.Context(click.Command("work"))
_GRACE = click.Option(["--grace"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("0.5", 0.5),
        ("90s", 90),
        ("15m", 900),
        ("1h30m", 5400),
        ("1h30m15s", 5415),
        ("1.5h", 5400),
        ("2d", 172_800),
        ("1d12h", 129_600),
        ("0", 0),
    ],
)
def test_a_duration_is_written_as_people_write_it(text: str, seconds: float) -> None:
    """An operator at night would count the seconds of a day and a half in the head."""
    assert duration(zero=True)(_CONTEXT, _GRACE, text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "nan", "inf", "1e3", "1h30", "30m1h", "1h1h", "15 m", "15M", "1w", "٣", "9" * 400]
)
def test_any_other_text_is_one_clear_error(text: str) -> None:
    """A `1h30` that were taken for an hour and 30 seconds would end a long job half an hour early."""
    with pytest.raises(
        click.BadParameter, match="expected a duration above 0, such as 90, 90s, 15m, 1h30m or 2d, not "
    ) as raised:
        duration(zero=False)(_CONTEXT, _GRACE, text)

    assert repr(text) in raised.value.message


def test_zero_is_a_duration_only_where_it_means_something() -> None:
    """`--expires 0` would publish a job that never runs; `--grace 0` cuts off at once, as asked."""
    assert duration(zero=True)(_CONTEXT, _GRACE, "0s") == 0
    with pytest.raises(click.BadParameter, match="above 0"):
        duration(zero=False)(_CONTEXT, _GRACE, "0s")
