"""Short ids: a terminal shows as much of an id as tells it from the others, and a person copies that.

Only UUIDs are shortened. The ids that a program chose may begin with one another, as order-1 and order-12 do, and `--id order-1`
must never replay or drop order-12.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

from ..errors import ConfigurationError

_SHORTEST, _WHOLE = 8, 36
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_BEGINNING = re.compile(rf"[0-9a-f-]{{{_SHORTEST},{_WHOLE - 1}}}")
_TOO_SHORT = re.compile(rf"[0-9a-f]{{1,{_SHORTEST - 1}}}")
_SHOWN = 5


def short_forms(ids: AbstractSet[str]) -> dict[str, str]:
    """Return for each id what a terminal shows: its beginning, long enough to be unique among `ids`, if the id is a UUID."""
    uuids = {one for one in ids if _UUID.fullmatch(one)}
    length = next(n for n in range(_SHORTEST, _WHOLE + 1) if len({one[:n] for one in uuids}) == len(uuids))
    return {one: one[:length] if one in uuids else one for one in ids}


def may_be_short(text: str) -> bool:
    """Whether `text` can be the beginning of a UUID."""
    return _BEGINNING.fullmatch(text) is not None


def is_too_short(text: str) -> bool:
    """Whether `text` looks like the beginning of a UUID, but has too few characters to stand for one."""
    return _TOO_SHORT.fullmatch(text) is not None


def whole_id(text: str, ids: AbstractSet[str], what: str = "dead letters") -> str:
    """Return the id that `text` stands for: itself, or the UUID of `ids` that begins with it. ConfigurationError if several do.

    `what` names those whose ids they are.
    """
    if text in ids or not may_be_short(text):
        return text
    found = sorted(one for one in ids if _UUID.fullmatch(one) and one.startswith(text))
    if len(found) > 1:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        msg = f"{len(found)} {what} have an id that begins with {text}: {', '.join(found[:_SHOWN])}{more}; give more of the id"
        raise ConfigurationError(msg)
    return found[0] if found else text
