"""The attempt that runs in the current task or thread."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from .attempt import Attempt

current_attempt: ContextVar[Attempt[Any] | None] = ContextVar("leveret_attempt", default=None)
"""The attempt whose handler runs in this task or thread; a publish inherits the correlation id from this attempt."""
