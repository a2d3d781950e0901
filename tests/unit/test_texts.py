"""Which files are leveret's own, and how a text fits a terminal."""

from pathlib import Path

import pytest

import leveret
from leveret import middleware
from leveret.texts import folded, is_ours, named, one_line, why_failed

_PACKAGE = Path(leveret.__file__).parent


@pytest.mark.parametrize(
    ("file", "ours"),
    [
        (leveret.__file__, True),
        (str(_PACKAGE / "middleware" / "timeout.py"), True),
        (f"{_PACKAGE}_shop/handlers.py", False),
        (__file__, False),
    ],
    ids=["ours", "a layer", "a package whose name begins as ours", "a user's"],
)
def test_a_file_is_ours_if_it_lies_in_the_package(file: str, ours: bool) -> None:
    """A user's line that is taken for ours is missing from the traceback by which they would find their mistake."""
    assert is_ours(file) is ours


def test_a_layers_file_lies_in_the_package() -> None:
    """The layers are a folder of their own in the repository."""
    assert is_ours(middleware.Timeout.consume.__code__.co_filename)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("short  line \n", "short  line \n"),
        (
            "    chain    Retries(max_attempts=4) → Timeout(30)",
            "    chain    Retries(max_attempts=4) →\n             Timeout(30)",
        ),
        ("leveret: no queue 'emails' on sqlite:///shop.db", "leveret: no queue 'emails' on\n    sqlite:///shop.db"),
        ("  retries  none", "  retries  none"),
        (f"id {'x' * 50} end", f"id\n    {'x' * 50}\n    end"),
    ],
    ids=["what fits", "a label", "a sentence", "a short label", "a long word"],
)
def test_a_text_is_folded_at_words_and_keeps_its_indent(text: str, fits: str) -> None:
    """A terminal breaks a line anywhere: in the middle of a queue's name, and without the indent that makes a list a list."""
    assert folded(text, 40) == fits


def test_a_line_ends_after_two_thousand_characters() -> None:
    """A validation error quotes the document of 10 MB that it refuses: one such job fills the log of a day."""
    line = one_line("x" * 10_000_000)

    assert len(line) == 2000
    assert line.endswith("x…")


def test_the_name_of_an_error_is_on_one_line() -> None:
    """A class that is made at run time may have any name, and a second line of a log can be a forged record."""
    error = type("A\nB", (Exception,), {})("why")

    assert named(error) == "A B: why"


@pytest.mark.parametrize(
    ("error", "reason", "why"),
    [
        ("OSError: full", "OSError: full (attempt 3 of 3)", "OSError: full (attempt 3 of 3)"),
        ("OSError: full", "OSError: full", "OSError: full"),
        ("OSError: full", "out of attempts", "OSError: full; out of attempts"),
        ("OSError: full", "", "OSError: full"),
        ("WrongResult: not int", "not int", "WrongResult: not int"),
        ("", "buried by its handler", "buried by its handler"),
        ("", "", ""),
    ],
)
def test_an_error_and_a_reason_that_quote_each_other_are_said_once(error: str, reason: str, why: str) -> None:
    """`JobFailed` and `leveret jobs list` say the same error twice."""
    assert why_failed(error, reason) == why
