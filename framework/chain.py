"""The onion: a handler's layers in their order, folded around it once, at start-up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from .layer import AnyLayer, Consume, Publish, is_bound, is_consume_layer, is_publish_layer
from .runtime import Runtime


def layers_of(app_layers: Sequence[AnyLayer], own: Sequence[AnyLayer]) -> tuple[AnyLayer, ...]:
    """Return the layers of one handler: the app's, then its own innermost; one of a `once` class stands where the app's stood."""
    merged = list(app_layers)
    for layer in own:
        if any(layer is other for other in merged):
            continue
        place = next(
            (i for i, other in enumerate(merged) if getattr(layer, "once", False) and type(other) is type(layer)), None
        )
        if place is None:
            merged.append(layer)
        else:
            merged[place] = layer
    return tuple(merged)


def bind(layers: Iterable[AnyLayer], runtime: Runtime) -> None:
    """Hand `runtime` to every layer that wants it."""
    bound: set[int] = set()
    for layer in layers:
        if id(layer) in bound:
            continue
        bound.add(id(layer))
        if is_bound(layer):
            layer.bind(runtime)


def fold_consume(layers: Sequence[AnyLayer], inner: Consume) -> Consume:
    """Fold the consuming side of `layers` around `inner`, once, at start-up."""
    step = inner
    for layer in reversed(layers):
        if is_consume_layer(layer):
            step = _around(layer.consume, step)
        elif not is_publish_layer(layer):
            step = _around(layer, step)
    return step


def fold_publish(layers: Sequence[AnyLayer], inner: Publish) -> Publish:
    """Fold the publishing side of `layers` around `inner`, once, at start-up."""
    step = inner
    for layer in reversed(layers):
        if is_publish_layer(layer):
            step = _around(layer.publish, step)
    return step


def _around(
    around: Callable[[Any, Any], Awaitable[Any]], proceed: Callable[[Any], Awaitable[Any]]
) -> Callable[[Any], Awaitable[Any]]:
    # a closure, not a partial: `proceed` is positional-only in the protocol
    return lambda subject: around(subject, proceed)
