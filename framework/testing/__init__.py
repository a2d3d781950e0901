"""Run an app in a test: memory broker, manual clock, no sleeping; see `leveret.testing.lab`."""

from .lab import Lab, Published, Run, attempt, running

__all__ = ["Lab", "Published", "Run", "attempt", "running"]
