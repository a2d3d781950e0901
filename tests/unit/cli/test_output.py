"""What commands take and print."""

import click
import pytest

from leveret.cli.main import cli
from leveret.cli.output import duration, table

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


COLUMNS = ["id", "job", ">runs", "buried at", "reason"]
ROWS = [
    [
        "0198e2a4-5b6c",
        "invoice.send",
        12,
        "2026-11-30 01:11:36Z",
        "ValueError: no answer from postgresql://shop:***@db/shop",
    ],
    ["order-9", "note", 1, None, ""],
]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_a_table_fits_and_breaks_no_word(width: int) -> None:
    """An id or a URL that is broken can't be copied, and a line that doesn't fit is broken by the terminal."""
    drawn = table(COLUMNS, ROWS, width)

    assert max(map(len, "\n".join(drawn).split("\n"))) <= width
    assert [text.split() for text in drawn] == [
        " ".join(COLUMNS).replace(">", "").split(),
        " ".join(map(str, ROWS[0])).split(),
        ["order-9", "note", "1", "-"],
    ]
    assert not any(line.endswith(" ") for text in drawn for line in text.split("\n"))


def test_columns_that_do_not_fit_continue_below_their_row() -> None:
    """At 80 columns a reason in a column 15 wide would be read like a telegram."""
    assert table(COLUMNS, ROWS, 70) == [
        "id             job           runs  buried at\n  reason",
        "0198e2a4-5b6c  invoice.send    12  2026-11-30 01:11:36Z\n  ValueError: no answer from postgresql://shop:***@db/shop",
        "order-9        note             1  -",
    ]
    assert table(COLUMNS, ROWS, 50)[1] == (
        "0198e2a4-5b6c  invoice.send    12\n"
        "  2026-11-30 01:11:36Z\n"
        "  ValueError: no answer from\n"
        "  postgresql://shop:***@db/shop"
    )


def test_a_long_text_is_shortened_on_a_terminal_alone() -> None:
    """One error of a page must not push all others from the screen; a pipe loses nothing."""
    text = " ".join(["word"] * 100)

    [_, row] = table(["id", "reason"], [["x", text]], 60)
    assert len(row.split("\n")) == 3
    assert row.endswith(" …")
    assert table(["id", "reason"], [["x", "y" * 90]], 60)[1] == f"x   {'y' * 55}…"
    assert table(["id", "reason"], [["x", text]], 10_000)[1] == f"x   {text}"


def test_a_cell_cannot_command_the_terminal() -> None:
    """A foreign producer chooses a job's id: an escape sequence in it would recolour, retitle or clear the operator's screen."""
    assert (
        table(["id", "reason"], [["a\x1b[2Jb", "c\x07"]], 80)[1]
        == "a\N{REPLACEMENT CHARACTER}[2Jb  c\N{REPLACEMENT CHARACTER}"
    )


def _commands(group: click.Group) -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {below}", inner) for below, inner in _commands(command)]
    return found


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize(("name", "command"), [("", cli), *_commands(cli)], ids=str)
def test_help_fits(name: str, command: click.Command, width: int) -> None:
    """An example that the terminal breaks can't be copied, and a broken table can't be read."""
    context = click.Context(command, info_name=f"leveret {name}".strip(), terminal_width=width)

    assert [line for line in command.get_help(context).splitlines() if len(line) > width] == []


def test_help_explains_each_column() -> None:
    """`unsettled` or `runs` means something only to those who wrote it."""
    commands = dict(_commands(cli))
    for name, columns in (
        ("queues", ("ready", "unsettled", "delayed", "dead", "consumers", "levels")),
        ("queues show", ("ready", "unsettled", "delayed", "dead", "consumers", "levels")),
        ("dead list", ("id", "job", "level", "runs", "buried at", "reason")),
    ):
        text = commands[name].get_help(click.Context(commands[name], info_name=name, terminal_width=80))
        for column in columns:
            assert f"\n    {column}  " in text, (name, column)
