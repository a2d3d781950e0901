"""Layers fold in the order of the list, for any list."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from leveret import Attempt, Done, Envelope, Outcome, Receipt
from leveret.chain import fold_consume, fold_publish, layers_of
from leveret.layer import check_layers
from tests.unit.runs import attempt

Notes = list[tuple[str, int]]


class Plain:
    """A layer that notes when it is entered and left."""

    def __init__(self, number: int, notes: Notes) -> None:
        self.number = number
        self._notes = notes

    async def consume(self, attempt: Attempt[Any], proceed: Any) -> Outcome:
        self._notes.append(("in", self.number))
        try:
            outcome: Outcome = await proceed(attempt)
            return outcome
        finally:
            self._notes.append(("out", self.number))

    async def publish(self, envelope: Envelope, proceed: Any) -> Receipt:
        self._notes.append(("in", self.number))
        try:
            receipt: Receipt = await proceed(envelope)
            return receipt
        finally:
            self._notes.append(("out", self.number))


class First(Plain):
    """One of it a handler."""

    once = True


class Second(Plain):
    """One of it a handler, another class."""

    once = True


def listed(numbers: range, once: list[int]) -> list[tuple[type[Plain], int]]:
    """Kinds of layers with their numbers, no class that stands once twice."""
    kinds: list[tuple[type[Plain], int]] = []
    for number, kind in zip(numbers, once, strict=True):
        chosen = (Plain, First, Second)[kind]
        kinds.append((Plain if chosen is not Plain and any(other is chosen for other, _ in kinds) else chosen, number))
    return kinds


lists = st.lists(st.integers(0, 2), max_size=6)


@given(lists, st.booleans())
async def test_first_in_is_last_out(kinds: list[int], fails: bool) -> None:
    """Every promise of a layer rests on where it stands, on the way in and on the way out, whatever the handler does."""
    notes: Notes = []
    layers = check_layers([kind(number, notes) for kind, number in listed(range(len(kinds)), kinds)], "test")

    async def handler(_: Attempt[Any]) -> Outcome:
        notes.append(("run", -1))
        if fails:
            raise ValueError
        return Done()

    try:
        assert await fold_consume(layers, handler)(attempt()) == Done()
    except ValueError:
        assert fails
    count = len(layers)
    assert notes == [*(("in", n) for n in range(count)), ("run", -1), *(("out", n) for n in reversed(range(count)))]


@given(lists)
async def test_publishing_folds_in_the_same_order(kinds: list[int]) -> None:
    """A header that an outer layer adds must be there for the inner ones."""
    notes: Notes = []
    layers = [kind(number, notes) for kind, number in listed(range(len(kinds)), kinds)]

    async def broker(envelope: Envelope) -> Receipt:
        return Receipt(envelope.job_id)

    await fold_publish(layers, broker)(attempt().envelope)
    count = len(layers)
    assert notes == [*(("in", n) for n in range(count)), *(("out", n) for n in reversed(range(count)))]


@given(lists, lists)
def test_a_handlers_layers_come_inside_or_in_the_place_of_the_apps(app: list[int], own: list[int]) -> None:
    """An app's layer would be lost, or stand twice round one handler."""
    app_layers = [kind(number, []) for kind, number in listed(range(len(app)), app)]
    own_layers = [kind(number, []) for kind, number in listed(range(100, 100 + len(own)), own)]
    merged = layers_of(app_layers, own_layers)
    once = {type(layer) for layer in app_layers if isinstance(layer, (First, Second))}
    replacing = {type(layer): layer for layer in own_layers if type(layer) in once}
    expected = [replacing.get(type(layer), layer) for layer in app_layers] + [
        layer for layer in own_layers if type(layer) not in replacing
    ]
    assert list(merged) == expected
