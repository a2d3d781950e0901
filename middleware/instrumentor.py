"""`opentelemetry-instrument leveret work shop:app`: `Tracing` outermost in every app that doesn't list it.

Found by its entry point, and by nothing else: a worker that isn't instrumented never imports it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]  # its module is untyped

from leveret.layer import AnyLayer, instrumentation


class LeveretInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Puts `Tracing` outermost in apps that don't list it, those made before included.

    `instrument(tracer_provider=…)` takes the provider to make spans with; None: the global one.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return nothing: what it instruments is the package that it is in."""
        return ()

    def _instrument(self, **kwargs: Any) -> None:
        from .tracing import Tracing

        tracing = Tracing(tracer_provider=kwargs.get("tracer_provider"))

        def outermost(layers: tuple[AnyLayer, ...]) -> tuple[AnyLayer, ...]:
            return layers if any(isinstance(layer, Tracing) for layer in layers) else (tracing, *layers)

        self._outermost = outermost
        instrumentation.append(outermost)

    def _uninstrument(self, **_: Any) -> None:
        instrumentation.remove(self._outermost)
