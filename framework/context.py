"""Which attempt runs here."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from .attempt import Attempt

current_attempt: ContextVar[Attempt[Any] | None] = ContextVar("leveret_attempt", default=None)
"""The attempt whose handler runs here, in its task or thread: a publish inherits correlation from it."""
