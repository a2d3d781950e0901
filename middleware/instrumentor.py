"""Instrumentation for `opentelemetry-instrument leveret work shop:app`: adds `Tracing` to every app that doesn't list it.

OpenTelemetry finds this module by its entry point. A worker that isn't instrumented never imports it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]  # its module is untyped

from leveret.layer import AnyLayer, instrumentation


class LeveretInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Adds `Tracing` as the outermost middleware to apps that don't list it, including apps made earlier.

    `instrument(tracer_provider=…)` takes the provider of the spans. Default: None, the global provider.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return an empty collection: the instrumented package is leveret, which is installed."""
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
