"""The result of a job class: said where the class is written, known to publishers and workers alike."""

import types
from typing import Any, Generic, TypeVar

import msgspec
import pytest

from leveret import Job, Keep, Queue
from leveret.job import spec_of

images = Queue("images")
_T = TypeVar("_T")


class Thumbnail(msgspec.Struct):
    width: int


class Resize(Job[Thumbnail], name="image.resize", queue=images, keep=Keep(result_s=60)):
    url: str


class Measure(Job[_T], Generic[_T]):
    url: str


def test_the_result_is_the_parameter_of_job() -> None:
    """A handle would decode the result as something else than its type says."""
    spec = spec_of(Resize)

    assert spec is not None
    assert (spec.result, spec.keep) == (Thumbnail, Keep(result_s=60))
    assert msgspec.json.decode(msgspec.json.encode(Resize("x")), type=Resize) == Resize("x")


def test_a_bare_job_has_no_result_and_nothing_is_kept() -> None:
    """A job that nobody asks for would cost a header and a store."""

    class Send(Job, name="mail.send", queue=images):
        to: str

    spec = spec_of(Send)
    assert spec is not None
    assert (spec.result, spec.keep) == (None, None)


def test_a_class_may_say_its_result_through_a_base_or_inherit_it() -> None:
    """Families of jobs would have to repeat it."""

    class Width(Measure[int], name="image.width", queue=images, keep=Keep()):
        pass

    class Small(Resize, name="image.small", queue=images, keep=Keep()):
        pass

    assert [spec.result for spec in map(spec_of, (Width, Small)) if spec] == [int, Thumbnail]


@pytest.mark.parametrize(
    ("base", "keywords", "says"),
    [
        (Job[Thumbnail], {}, "nothing keeps its result; give keep="),
        (Measure, {"keep": Keep()}, "its result is the type variable"),
        (Resize, {}, "nothing keeps its result"),
    ],
)
def test_a_result_that_nobody_could_have_is_refused_where_it_is_written(
    base: Any, keywords: dict[str, Any], says: str
) -> None:
    """Its waiter would learn it in production."""
    with pytest.raises(TypeError, match=says):
        types.new_class("Wrong", (base,), {"name": "wrong", "queue": images, **keywords})


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"result_s": 0}, "result_s must be a number of seconds above 0"),
        ({"failed_s": True}, "failed_s must be a number of seconds"),
        ({"result_s": float("inf")}, "at most 315360000"),
        ({"max_bytes": 0}, "max_bytes must be a whole number of bytes above 0"),
        ({"required": 1}, "required must be True or False"),
        ({"body": "yes"}, "body must be True or False"),
    ],
)
def test_a_keep_that_makes_no_sense_is_refused(keywords: dict[str, Any], says: str) -> None:
    """A store would keep nothing, or for ever."""
    with pytest.raises(ValueError, match=says):
        Keep(**keywords)
