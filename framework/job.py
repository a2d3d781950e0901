"""A job's contract: its class, queue and defaults, shared by publishers and consumers without an app."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeAlias, TypeGuard, TypeVar, final, get_args, get_origin

import msgspec
from typing_extensions import TypeVar as DefaultTypeVar
from typing_extensions import dataclass_transform


@final
class Priority(enum.Enum):
    """Four levels; the default is NORMAL, unless the job class or the publish sets another level."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
    URGENT = "urgent"

    # Enum's own hash is a Python function; every publish looks up its route by level, and this hash is in C
    __hash__ = object.__hash__


LEVELS = (Priority.URGENT, Priority.HIGH, Priority.NORMAL, Priority.LOW)
"""Most urgent first."""

_NAME = re.compile(r"[A-Za-z0-9_.-]+\Z")
_RESERVED = re.compile(r"(\.(low|normal|high|urgent|dead|suspects))\Z|\Alv\.")
MAX_NAME_BYTES = 150

WhenExpired: TypeAlias = Literal["drop", "dead"]
"""What becomes of an expired job: it is dropped, or it goes to the dead letters."""


def _check_expired(where: str, expired: object) -> None:
    if expired not in ("drop", "dead"):
        msg = f"{where}: expired must be drop or dead, not {expired!r}"
        raise ValueError(msg)


def _check_name(kind: str, name: object) -> str:
    if not isinstance(name, str):
        hint = '; give name="…"' if kind == "job" else ""
        msg = f"a {kind}'s name must be a str, not {name!r}{hint}"
        raise TypeError(msg)
    if not _NAME.match(name) or len(name) > MAX_NAME_BYTES:
        msg = f"a {kind}'s name must have 1 to {MAX_NAME_BYTES} characters of [A-Za-z0-9_.-], not {name!r}"
        raise ValueError(msg)
    return name


@final
class Queue:
    """A logical queue.

    Args:
        name: 1 to 150 characters of [A-Za-z0-9_.-]. Names that end in `.low`, `.normal`, `.high`, `.urgent`, `.dead` or
            `.suspects`, or begin with `lv.`, are reserved.
        type: "quorum" (default): replicated on a cluster of brokers, with a prefetch window per level. "classic": one broker
            queue with strict priorities, which can starve the lower levels.
        priorities: Whether the queue takes other levels than NORMAL.
        expired: "drop" (default): a worker drops a job that has expired. "dead": the job goes to the queue's dead letters. The
            class keyword `expired` of a job takes precedence.

    Raises:
        ValueError: The name is invalid or reserved, or `type` or `expired` is unknown.
        TypeError: The name isn't a str.
    """

    __slots__ = ("_expired", "_name", "_priorities", "_type")

    def __init__(
        self,
        name: str,
        *,
        type: Literal["quorum", "classic"] = "quorum",
        priorities: bool = True,
        expired: WhenExpired = "drop",
    ) -> None:
        _check_name("queue", name)
        if _RESERVED.search(name):
            msg = f"the queue name {name!r} is reserved: a name can't end in .low, .normal, .high, .urgent, .dead or .suspects, or begin with lv."
            raise ValueError(msg)
        if type not in ("quorum", "classic"):
            msg = f"queue {name!r}: type must be quorum or classic, not {type!r}"
            raise ValueError(msg)
        _check_expired(f"queue {name!r}", expired)
        self._name = name
        self._expired: WhenExpired = expired
        self._type: Literal["quorum", "classic"] = type
        self._priorities = bool(priorities)

    @property
    def name(self) -> str:
        """The queue's name in the program, in commands and in logs."""
        return self._name

    @property
    def type(self) -> Literal["quorum", "classic"]:
        """RabbitMQ's queue type; other brokers ignore it."""
        return self._type

    @property
    def priorities(self) -> bool:
        """Whether the queue takes other levels than NORMAL."""
        return self._priorities

    @property
    def expired(self) -> WhenExpired:
        """What becomes of an expired job; a matter of workers, not of the broker."""
        return self._expired

    @property
    def levels(self) -> tuple[Priority, ...]:
        """The queue's levels, most urgent first."""
        return LEVELS if self._priorities else (Priority.NORMAL,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Queue) and (self._name, self._type, self._priorities, self._expired) == (
            other._name,
            other._type,
            other._priorities,
            other._expired,
        )

    def __hash__(self) -> int:
        return hash(self._name)

    def __repr__(self) -> str:
        kind = "" if self._type == "quorum" else ", type='classic'"
        expired = "" if self._expired == "drop" else f", expired={self._expired!r}"
        return f"Queue({self._name!r}{kind}{'' if self._priorities else ', priorities=False'}{expired})"


EncHook: TypeAlias = Callable[[Any], Any]
"""Turns a value of a type that msgspec can't encode into one that it can."""
DecHook: TypeAlias = Callable[[type[Any], Any], Any]
"""Turns a decoded value into one of the given type, which msgspec can't decode."""
_NO_HOOKS = "give the job class enc_hook= and dec_hook="


def _no_enc_hook(value: object) -> Any:
    msg = f"values of type {type(value).__qualname__} can't be encoded; {_NO_HOOKS}"
    raise TypeError(msg)


def _no_dec_hook(kind: Any, value: object) -> object:
    if isinstance(kind, type) and not isinstance(value, kind):
        msg = f"values of type {kind.__qualname__} can't be decoded; {_NO_HOOKS}"
        raise TypeError(msg)
    return value


DAY_S = 86_400.0


@final
class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """What a job store keeps of each publish of a job class, and for how long.

    Raises ValueError for a time or a size that isn't above 0.
    """

    result_s: float = DAY_S
    """Seconds for which the record of a job that is done, expired or was aborted while it ran stays, with its result."""
    failed_s: float = 7 * DAY_S
    """Seconds for which the record of a job stays that failed or was aborted while it waited, or of which nothing more was heard.

    Give more than the job may wait or run: without its record, a job that waits isn't aborted any more, and one that runs is unknown.
    """
    required: bool = False
    """Whether a job that is done stays unacknowledged until the store has its result. If False, the job is acknowledged after 2 s."""
    max_bytes: int = 1 << 20
    """The size of the largest result that is kept, in bytes as encoded. A job with a larger one is done; the result is gone."""
    body: bool = False
    """Whether the record holds the job's body, too."""

    def __post_init__(self) -> None:
        for name in ("result_s", "failed_s"):
            value: object = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MOST_KEEP_S:
                msg = f"keep: {name} must be a number of seconds above 0, at most {_MOST_KEEP_S:.0f} (ten years), not {value!r}"
                raise ValueError(msg)
        if type(self.max_bytes) is not int or self.max_bytes < 1:
            msg = f"keep: max_bytes must be a whole number of bytes above 0, not {self.max_bytes!r}"
            raise ValueError(msg)
        for name in ("required", "body"):
            if not isinstance(getattr(self, name), bool):
                msg = f"keep: {name} must be True or False, not {getattr(self, name)!r}"
                raise ValueError(msg)


_MOST_KEEP_S = 3650 * DAY_S


class Spec(msgspec.Struct, frozen=True):
    """The specification of a concrete job class."""

    name: str
    queue: Queue
    priority: Priority
    expires_s: float | None
    version: int = 1
    expired: WhenExpired | None = None
    """What becomes of an expired job; None: as its queue says."""
    keep: Keep | None = None
    """What a store keeps of each publish; None: nothing."""
    result: Any = None
    """The type of the result: R of `Job[R]`; None for a job without a result."""

    @property
    def keeps_expired(self) -> bool:
        """Whether an expired job goes to the dead letters."""
        return (self.expired or self.queue.expired) == "dead"


_M = TypeVar("_M", bound="JobMeta")
_specs: dict[type, Spec] = {}
_enc_hooks: dict[type, EncHook] = {}
_dec_hooks: dict[type, DecHook] = {}


@dataclass_transform(field_specifiers=(msgspec.field,))
class JobMeta(msgspec.StructMeta):
    """The metaclass of `Job`: takes leveret's nine class keywords, and passes the others to msgspec."""

    def __new__(  # noqa: D102 - the class has the docstring
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
        expired: WhenExpired | None = None,
        version: int = 1,
        keep: Keep | None = None,
        enc_hook: EncHook | None = None,
        dec_hook: DecHook | None = None,
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
        # only the keywords that differ from the default: an explicit False would override the parent class
        options: Any = {key: value for key, (value, default) in given.items() if value is not default}
        cls = super().__new__(mcls, class_name, bases, namespace, **options)
        if enc_hook is not None:
            _enc_hooks[cls] = _check_hook(class_name, "enc_hook", enc_hook, "value")
        if dec_hook is not None:
            _dec_hooks[cls] = _check_hook(class_name, "dec_hook", dec_hook, "type, value")
        if name is None and queue is None:
            if (
                priority is not Priority.NORMAL
                or expires_s is not None
                or expired is not None
                or version != 1
                or keep is not None
            ):
                msg = f"job class {class_name}: priority, expires_s, expired, keep and version need a name and a queue; add name= and queue="
                raise TypeError(msg)
            return cls
        spec = _spec(class_name, name, queue, priority, expires_s, expired, version)
        _specs[cls] = _with_result(class_name, spec, keep, _result_of(cls))
        return cls


_H = TypeVar("_H", bound=Callable[..., Any])


def _check_hook(class_name: str, keyword: str, hook: _H, parameters: str) -> _H:
    if not callable(hook) or inspect.iscoroutinefunction(hook):
        msg = f"job class {class_name}: {keyword} must be a plain function of ({parameters}), not {hook!r:.80}"
        raise TypeError(msg)
    return hook


def _spec(
    class_name: str,
    name: object,
    queue: object,
    priority: object,
    expires_s: object,
    expired: WhenExpired | None,
    version: object,
) -> Spec:
    try:
        checked = _check_name("job", name)
    except (TypeError, ValueError) as error:
        msg = f"job class {class_name}: {error}"
        raise type(error)(msg) from None
    if not isinstance(queue, Queue):
        named = queue if isinstance(queue, str) else "…"
        msg = f'job class {class_name}: queue must be a Queue, not {queue!r}; give queue=Queue("{named}")'
        raise TypeError(msg)
    if not isinstance(priority, Priority):
        msg = f"job class {class_name}: priority must be a Priority, not {priority!r}"
        raise TypeError(msg)
    if priority not in queue.levels:
        msg = f"job class {class_name}: {queue!r} takes only priority NORMAL"
        raise ValueError(msg)
    if expires_s is not None and (isinstance(expires_s, bool) or not isinstance(expires_s, (int, float))):
        msg = f"job class {class_name}: expires_s must be a number of seconds, not {expires_s!r}"
        raise TypeError(msg)
    if expires_s is not None and not 0 < expires_s < float("inf"):
        msg = f"job class {class_name}: expires_s must be above 0 and finite, not {expires_s}"
        raise ValueError(msg)
    if expired is not None:
        _check_expired(f"job class {class_name}", expired)
    if isinstance(version, bool) or not isinstance(version, int):
        msg = f"job class {class_name}: version must be an int, not {version!r}"
        raise TypeError(msg)
    if not 1 <= version < 1 << 63:
        msg = f"job class {class_name}: version must be at least 1 and fit into 64 bits, not {version}"
        raise ValueError(msg)
    return Spec(checked, queue, priority, expires_s, version, expired)


def _result_of(cls: type) -> Any:
    """Return R of the nearest `Job[R]` among the bases of `cls`; None for a bare `Job`."""
    for each in cls.__mro__:
        for base in each.__dict__.get("__orig_bases__", ()):
            origin = get_origin(base)
            if isinstance(origin, type) and issubclass(origin, Job) and origin is not each:
                given = get_args(base)
                if len(given) != 1:
                    msg = f"job class {cls.__name__}: {base} doesn't say which is the result; derive from a class with one parameter, such as Job[Thumbnail]"
                    raise TypeError(msg)
                return given[0]
    return None


def _with_result(class_name: str, spec: Spec, keep: object, result: Any) -> Spec:
    if keep is not None and not isinstance(keep, Keep):
        msg = f"job class {class_name}: keep must be a Keep, not {keep!r:.80}; give keep=Keep()"
        raise TypeError(msg)
    if isinstance(result, (TypeVar, DefaultTypeVar)):
        msg = f"job class {class_name}: its result is the type variable {result}; name a type, such as Job[Thumbnail]"
        raise TypeError(msg)
    if keep is None and result is not None:
        msg = f"job class {class_name}: nothing keeps its result; give keep=Keep(), or derive it from Job without a result"
        raise TypeError(msg)
    return msgspec.structs.replace(spec, keep=keep, result=result)


R_co = DefaultTypeVar("R_co", covariant=True, default=object)
"""The result of a job."""


class Job(msgspec.Struct, Generic[R_co], metaclass=JobMeta):
    """A job's contract: its fields, and the class keywords below. Other class keywords go to `msgspec.Struct`.

    `Job[R]` has a result of type R, which the handler returns and a job store keeps; it needs `keep`. A bare `Job` has none.

    A subclass inherits fields and hooks, but no other keyword. A subclass without `name` and `queue` is abstract and can't be
    published.

    Class keywords:
        name: The job's name on the wire.
        queue: The job's queue.
        priority: The priority of a publish that gives none. Default: NORMAL.
        expires_s: Seconds from the publish after which a job that hasn't started expires. Default: never.
        expired: Whether an expired job is dropped ("drop") or goes to the dead letters ("dead"). Default:
            the queue's `expired`.
        version: The version of the fields, at least 1. Every publish sends it. A worker runs jobs up to the version of its own
            class; a job of a newer version waits for another worker. Default: 1.
        keep: What the app's job store keeps of each publish, and for how long: state, progress and result. Default: nothing.
        enc_hook: A function of a value of a type that msgspec can't encode; returns a value that msgspec can encode.
        dec_hook: A function of a type that msgspec can't decode, and of the decoded value; returns an instance of that type.
    """


def is_job_class(value: object) -> TypeGuard[type[Job]]:
    """Return whether `value` is a job class, abstract or not."""
    return isinstance(value, type) and issubclass(value, Job)


def spec_of(job_class: type) -> Spec | None:
    """Return the specification of `job_class` itself; None for an abstract class, since a specification isn't inherited."""
    return _specs.get(job_class)


def hooks_of(job_class: type[Job]) -> tuple[EncHook, DecHook]:
    """Return the hooks that `job_class` has or inherits; without any, hooks that refuse the type and say what to do."""
    enc_hook = next((_enc_hooks[base] for base in job_class.__mro__ if base in _enc_hooks), _no_enc_hook)
    dec_hook = next((_dec_hooks[base] for base in job_class.__mro__ if base in _dec_hooks), _no_dec_hook)
    return enc_hook, dec_hook
