"""Which part of an id a terminal shows, and which letter a typed part stands for."""

import pytest

from leveret import ConfigurationError
from leveret.cli.short_ids import is_too_short, short_forms, whole_id

A, B = "0198e2a4-5b6c-7d8e-9f01-23456789abcd", "0198e2a4-5b70-7d8e-9f01-23456789abcd"
C = "fa98e2a4-5b6c-4d8e-9f01-23456789abcd"


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        ({C}, {C: "fa98e2a4"}),
        ({A, B}, {A: "0198e2a4-5b6", B: "0198e2a4-5b7"}),
        ({A, B, C}, {A: "0198e2a4-5b6", B: "0198e2a4-5b7", C: "fa98e2a4-5b6"}),
        ({"order-1", "order-12", C}, {"order-1": "order-1", "order-12": "order-12", C: "fa98e2a4"}),
        ({A, f"{A[:-1]}e"}, {A: A, f"{A[:-1]}e": f"{A[:-1]}e"}),
        (set(), {}),
    ],
)
def test_an_id_is_shown_as_short_as_it_is_unique(ids: set[str], shown: dict[str, str]) -> None:
    """A person copies what is shown: it must stand for this letter alone, and for any letter that it stood for, find it."""
    assert short_forms(ids) == shown
    assert {one: whole_id(short, ids) for one, short in shown.items()} == {one: one for one in ids}


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (A[:12], A),
        (A, A),
        ("0198e2a4-5b7", B),
        ("0198e2a", "0198e2a"),
        ("", ""),
        ("order-1", "order-1"),
        ("beef", "beef"),
        ("deadbeef", "deadbeef"),
        ("deadbeef-0", "deadbeef-0"),
        ("ffffffff", "ffffffff"),
    ],
)
def test_the_beginning_of_a_uuid_stands_for_it_and_no_other_text_does(text: str, meant: str) -> None:
    """`--id order-1` must not drop order-12, an empty variable not everything, and a whole id never another letter."""
    assert whole_id(text, {A, B, C, "order-12", "beefed", "deadbeef", "deadbeef-07"}) == meant


@pytest.mark.parametrize(
    ("text", "short"), [("0", True), ("0198e2a", True), ("0198e2a4", False), ("order-1", False), ("", False)]
)
def test_a_beginning_that_is_too_short_is_told_from_another_id(text: str, short: bool) -> None:
    """Who types 7 characters of a shown id reads that there is no such letter, and looks for it elsewhere."""
    assert is_too_short(text) is short


def test_a_beginning_of_several_is_refused_with_their_ids() -> None:
    """Whichever letter were taken, it would be the wrong one half of the time."""
    with pytest.raises(
        ConfigurationError, match=f"^2 dead letters have an id that begins with 0198e2a4-5b: {A}, {B}; give"
    ):
        whole_id("0198e2a4-5b", {A, B, C})
    many = {f"{A[:-2]}{n:02}" for n in range(40)}
    with pytest.raises(
        ConfigurationError, match=r"ab00, [^ ]+, [^ ]+, [^ ]+, [^ ]+04 and 35 more; give more of the id$"
    ):
        whole_id(A[:8], many)
