"""Whether a handler's annotation fits the result of its job."""

import threading
from collections.abc import Hashable
from typing import Any, Never, NoReturn, Protocol, TypeVar

import pytest
from typing_extensions import TypeAliasType

from leveret import Bury, Done, Job, Keep, Outcome, Retry
from leveret.errors import ConfigurationError

from .kept import Bench, Paint, Plain, Resize, Thumbnail, images


def annotated(job: Any, returns: Any) -> Any:
    """Return a handler with an annotation."""

    async def handle(job: Any) -> Any: ...

    handle.__annotations__ = {"job": job, "return": returns} if returns is not ... else {"job": job}
    return handle


class Wide(Thumbnail):
    height: int = 0


class Mean(Job[float | None], name="image.mean", queue=images, keep=Keep()):
    """A job whose result may be None."""


Nothing = TypeAliasType("Nothing", Retry | None)


class Says(Protocol):
    """None is one, to the type checkers."""

    def __str__(self) -> str: ...


class Names(Job[dict[str, list[int]]], name="image.names", queue=images, keep=Keep()):
    """A job with a generic result."""


@pytest.mark.parametrize(
    ("job", "returns"),
    [
        (Resize, Thumbnail),
        (Resize, Wide),
        (Resize, Thumbnail | Retry | Bury),
        (Resize, Done),
        (Resize, Any),
        (Resize, ...),
        (Paint, None),
        (Paint, Outcome | None),
        *((Plain, says) for says in (..., Any, object, None, NoReturn, Never, Retry, Outcome | None, Any | Bury)),
        (Plain, TypeVar("T")),
        (Plain, Nothing),
        (Plain, Says),
        (Plain, Hashable),
        (Mean, int),
        (Mean, None),
        (Mean, float | None),
        (Names, dict[str, list[int]]),
        (Names, dict[str, Any]),
        (Names, dict),
    ],
)
async def test_an_annotation_that_may_be_the_result_passes(job: Any, returns: Any) -> None:
    """A right handler would be refused."""
    bench = Bench()
    bench.handler(annotated(job, returns))
    async with bench.works():
        pass


@pytest.mark.parametrize("job", [Resize, Plain])
async def test_an_annotation_that_cannot_be_resolved_passes(job: Any) -> None:
    """A type that is imported for the checkers only would be refused, though every value of it is right."""
    bench, handle = Bench(), annotated(job, "Nowhere")
    bench.handler(job=job)(handle)
    async with bench.works():
        pass


@pytest.mark.parametrize(
    ("job", "returns", "says"),
    [
        (Resize, int, "returns int, but the result of Resize is Thumbnail; correct one of them"),
        (Resize, None, "returns None, but the result of Resize is Thumbnail"),
        (Resize, Thumbnail | None, "but the result of Resize is Thumbnail"),
        (Wide, Thumbnail, ""),
        (Mean, str, "returns str, but the result of Mean is float | None"),
        (
            Names,
            dict[str, list[str]],
            r"returns dict\[str, list\[str\]\], but the result of Names is dict\[str, list\[int\]\]",
        ),
        (Names, list[int], r"returns list\[int\]"),
        (Paint, Thumbnail, r"Paint has no result; return None or an outcome, or derive Paint from Job\[Thumbnail\]$"),
        (Plain, int, r"returns int, but Plain has no result; .* derive Plain from Job\[int\] with keep=Keep\(\)$"),
        (Plain, int | str | None, r"derive Plain from Job\[int \| str\] with keep=Keep\(\)$"),
        (Plain, list[int], r"derive Plain from Job\[list\[int\]\] with keep=Keep\(\)$"),
        (Plain, Retry | bool, r"returns leveret.outcome.Retry \| bool, but Plain has no result"),
    ],
)
async def test_an_annotation_that_cannot_be_the_result_is_refused_at_the_start(
    job: Any, returns: Any, says: str
) -> None:
    """Every job of that class would be buried, in production."""
    if job is Wide:
        job, says = _Widened, "returns Thumbnail, but the result of _Widened is Wide"
    bench = Bench()
    bench.handler(annotated(job, returns))
    with pytest.raises(ConfigurationError, match=says):
        async with bench.works():
            pass


class _Widened(Job[Wide], name="image.widened", queue=images, keep=Keep()):
    """A job whose result is a subclass."""


async def test_a_result_that_nothing_can_decode_is_refused_at_the_start() -> None:
    """Every job of that class would be buried, in production."""

    class Locks(Job[threading.Event | threading.Barrier], name="image.locks", queue=images, keep=Keep()):
        pass

    bench = Bench()

    @bench.handler
    async def locks(job: Locks) -> threading.Event:
        return threading.Event()

    with pytest.raises(
        ConfigurationError, match=r"the result of Locks, .* can't be decoded: Type unions may not contain"
    ):
        async with bench.works():
            pass
