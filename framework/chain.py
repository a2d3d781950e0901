"""The onion: the middleware of a handler, in order, folded around the handler once at start-up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from .layer import AnyLayer, Consume, Publish, is_bound, is_consume_layer, is_publish_layer
from .runtime import Runtime


def layers_of(app_layers: Sequence[AnyLayer], own: Sequence[AnyLayer]) -> tuple[AnyLayer, ...]:
    """Return the middleware of a handler: the app's, then its own; its own of a `once` class takes the place of the app's."""
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
    """Call `bind(runtime)` on all middleware that has it, once per instance."""
    bound: set[int] = set()
    for layer in layers:
        if id(layer) in bound:
            continue
        bound.add(id(layer))
        if is_bound(layer):
            layer.bind(runtime)


def fold_consume(layers: Sequence[AnyLayer], inner: Consume) -> Consume:
    """Return `inner` with the consuming side of `layers` folded around it."""
    step = inner
    for layer in reversed(layers):
        if is_consume_layer(layer):
            step = _around(layer.consume, step)
        elif not is_publish_layer(layer):
            step = _around(layer, step)
    return step


def fold_publish(layers: Sequence[AnyLayer], inner: Publish) -> Publish:
    """Return `inner` with the publishing side of `layers` folded around it."""
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
