"""Which files are leveret's own."""

from pathlib import Path

import pytest

import leveret
from leveret import middleware
from leveret.texts import is_ours

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
