"""A job's contract: its class, its queue, its defaults. Shared by publishers and consumers; needs no app."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, final

import msgspec
from typing_extensions import dataclass_transform


@final
class Priority(enum.Enum):
    """Four levels; a job is NORMAL unless its class or its publisher says otherwise."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
    URGENT = "urgent"

    __hash__ = (
        object.__hash__
    )  # in C: Enum's own is a Python function, and each publish looks up its route by the level


LEVELS = (Priority.URGENT, Priority.HIGH, Priority.NORMAL, Priority.LOW)
"""Most urgent first."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")
_RESERVED = re.compile(r"(\.(low|normal|high|urgent|dead|suspects))\Z|\Alv\.")
MAX_NAME_BYTES = 150


def _check_name(kind: str, name: object) -> str:
    if not isinstance(name, str):
        msg = f"a {kind}'s name is a text, not {name!r}"
        raise TypeError(msg)
    if not _NAME.match(name) or len(name) > MAX_NAME_BYTES:
        msg = f"a {kind}'s name has 1 to {MAX_NAME_BYTES} of [A-Za-z0-9_.-], not {name!r}"
        raise ValueError(msg)
    return name


@final
class Queue:
    """A logical queue; name: up to 150 bytes of [A-Za-z0-9_.-], else ValueError. `priorities=False` refuses any level but NORMAL.

    `type="quorum"` (the default) is replicated where the broker is a cluster, and has a window of its own for each
    level; `"classic"` is the broker's one queue in strict order of priority, which may starve the lowest. Names that
    end in `.low`, `.normal`, `.high`, `.urgent`, `.dead` or `.suspects`, or begin with `lv.`, are leveret's own.
    """

    __slots__ = ("_name", "_priorities", "_type")

    def __init__(self, name: str, *, type: Literal["quorum", "classic"] = "quorum", priorities: bool = True) -> None:
        _check_name("queue", name)
        if _RESERVED.search(name):
            msg = f"the queue name {name!r} is reserved: no .low, .normal, .high, .urgent, .dead, .suspects at the end, no lv. at the start"
            raise ValueError(msg)
        if type not in ("quorum", "classic"):
            msg = f"queue {name!r}: type is quorum or classic, not {type!r}"
            raise ValueError(msg)
        self._name = name
        self._type: Literal["quorum", "classic"] = type
        self._priorities = bool(priorities)

    @property
    def name(self) -> str:
        """Its name in the program, in commands and in logs."""
        return self._name

    @property
    def type(self) -> Literal["quorum", "classic"]:
        """How RabbitMQ keeps it; other brokers don't look."""
        return self._type

    @property
    def priorities(self) -> bool:
        """Whether it takes other levels than NORMAL."""
        return self._priorities

    @property
    def levels(self) -> tuple[Priority, ...]:
        """The levels that it takes, most urgent first."""
        return LEVELS if self._priorities else (Priority.NORMAL,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Queue) and (self._name, self._type, self._priorities) == (
            other._name,
            other._type,
            other._priorities,
        )

    def __hash__(self) -> int:
        return hash(self._name)

    def __repr__(self) -> str:
        kind = "" if self._type == "quorum" else ", type='classic'"
        return f"Queue({self._name!r}{kind}{'' if self._priorities else ', priorities=False'})"


class Spec(msgspec.Struct, frozen=True):
    """What a concrete job class says about itself."""

    name: str
    queue: Queue
    priority: Priority
    expires_s: float | None
    version: int = 1


_M = TypeVar("_M", bound="JobMeta")
_specs: dict[type, Spec] = {}


@dataclass_transform(field_specifiers=(msgspec.field,))
class JobMeta(msgspec.StructMeta):
    """The metaclass of `Job`: takes its four keywords, hands msgspec its own."""

    def __new__(  # noqa: D102 - the class says it
        mcls: type[_M],
        class_name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        *,
        name: str | None = None,
        queue: Queue | None = None,
        priority: Priority = Priority.NORMAL,
        expires_s: float | None = None,
        tag: bool | str | int | Callable[[str], str | int] | None = None,
        tag_field: str | None = None,
        rename: Literal["lower", "upper", "camel", "pascal", "kebab"]
        | Callable[[str], str | None]
        | Mapping[str, str]
        | None = None,
        omit_defaults: bool = False,
        forbid_unknown_fields: bool = False,
        frozen: bool = False,
        eq: bool = True,
        order: bool = False,
        kw_only: bool = False,
        repr_omit_defaults: bool = False,
        array_like: bool = False,
        gc: bool = True,
        weakref: bool = False,
        dict: bool = False,
        cache_hash: bool = False,
    ) -> _M:
        given = {
            "tag": (tag, None),
            "tag_field": (tag_field, None),
            "rename": (rename, None),
            "omit_defaults": (omit_defaults, False),
            "forbid_unknown_fields": (forbid_unknown_fields, False),
            "frozen": (frozen, False),
            "eq": (eq, True),
            "order": (order, False),
            "kw_only": (kw_only, False),
            "repr_omit_defaults": (repr_omit_defaults, False),
            "array_like": (array_like, False),
            "gc": (gc, True),
            "weakref": (weakref, False),
            "dict": (dict, False),
            "cache_hash": (cache_hash, False),
        }
        # only what differs from the default: an explicit False would switch off what the parent class set
        options: Any = {key: value for key, (value, default) in given.items() if value is not default}
        cls = super().__new__(mcls, class_name, bases, namespace, **options)
        if name is None and queue is None:
            if priority is not Priority.NORMAL or expires_s is not None:
                msg = f"job class {class_name}: priority and expires_s need a name and a queue beside them"
                raise TypeError(msg)
            return cls
        _specs[cls] = _spec(class_name, name, queue, priority, expires_s)
        return cls


def _spec(class_name: str, name: object, queue: object, priority: object, expires_s: object) -> Spec:
    try:
        checked = _check_name("job", name)
    except (TypeError, ValueError) as error:
        msg = f"job class {class_name}: {error}"
        raise type(error)(msg) from None
    if not isinstance(queue, Queue):
        named = queue if isinstance(queue, str) else "…"
        msg = f'job class {class_name}: queue is a Queue, not {queue!r}; give queue=Queue("{named}")'
        raise TypeError(msg)
    if not isinstance(priority, Priority):
        msg = f"job class {class_name}: priority is a Priority, not {priority!r}"
        raise TypeError(msg)
    if priority not in queue.levels:
        msg = f"job class {class_name}: {queue!r} takes no priority but NORMAL"
        raise ValueError(msg)
    if expires_s is not None and (isinstance(expires_s, bool) or not isinstance(expires_s, (int, float))):
        msg = f"job class {class_name}: expires_s is a number of seconds, not {expires_s!r}"
        raise TypeError(msg)
    if expires_s is not None and not 0 < expires_s < float("inf"):
        msg = f"job class {class_name}: expires_s must be above 0 and finite, not {expires_s}"
        raise ValueError(msg)
    return Spec(checked, queue, priority, expires_s)


class Job(msgspec.Struct, metaclass=JobMeta):
    """A contract: fields, and as class keywords name, queue, priority (NORMAL), expires_s (seconds from the publish; None: never).

    A subclass that names none is abstract: what it says isn't inherited as a specification, and publishing it is an error.
    """


def spec_of(job_class: type) -> Spec | None:
    """Return what `job_class` itself says; None for an abstract one, since a specification isn't inherited."""
    return _specs.get(job_class)
