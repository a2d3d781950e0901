"""What a contract may be: refused where it is written, not where it is published."""

import pickle
from typing import Any, cast

import msgspec
import pytest

from leveret import Job, Priority, Queue
from leveret.job import MAX_NAME_BYTES, spec_of

emails = Queue("emails")


class Send(Job, name="job.send", queue=emails, priority=Priority.HIGH, expires_s=60, frozen=True, kw_only=True):
    """A job with everything."""

    n: int = 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "ä",
        "x" * (MAX_NAME_BYTES + 1),
        "emails.low",
        "emails.dead",
        "emails.suspects",
        "lv.jobs",
        "a/b",
        "a\n",
    ],
)
def test_a_queue_name_that_the_broker_or_leveret_needs_is_refused(name: str) -> None:
    """Two queues would share their siblings or dead letters, or a declare would fail in production."""
    with pytest.raises(ValueError, match=r"queue"):
        Queue(name)


def test_a_queue_name_may_be_as_long_as_it_is_said() -> None:
    """The limit in the docs would be a lie."""
    assert Queue("x" * MAX_NAME_BYTES).name == "x" * MAX_NAME_BYTES


def test_what_becomes_of_expired_jobs_is_part_of_a_queue() -> None:
    """Two parts of an app that disagree on it must be told so: otherwise the order of imports decides what is dropped."""
    keeping = Queue("emails", expired="dead")

    assert keeping != emails
    assert (keeping.expired, emails.expired) == ("dead", "drop")
    assert repr(keeping) == "Queue('emails', expired='dead')"
    with pytest.raises(ValueError, match="queue 'emails': expired must be drop or dead, not True"):
        Queue("emails", expired=cast("Any", True))


def test_the_specification_is_the_classs_own() -> None:
    """A subclass would be published under its parent's name, and run by its parent's handler."""

    class Child(Send, frozen=True):
        pass

    spec = spec_of(Send)

    assert spec is not None
    assert (spec.name, spec.queue, spec.priority, spec.expires_s) == ("job.send", emails, Priority.HIGH, 60)
    assert spec_of(Child) is None


def test_a_job_class_takes_msgspecs_own_keywords() -> None:
    """Users would need a second class beside their contract."""
    job = Send(n=2)

    with pytest.raises(AttributeError):
        job.n = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert msgspec.json.encode(job) == b'{"n":2}'
    assert pickle.loads(pickle.dumps(job)) == job


async def asynchronous(kind: type[Any], value: Any) -> Any:
    """No hook."""


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"name": "x"}, 'queue must be a Queue, not None; give queue=Queue\\("…"\\)'),
        ({"queue": emails}, "name must be a str, not None; give name="),
        ({"name": "x", "queue": "emails"}, "not 'emails'; give queue=Queue"),
        ({"name": "a b", "queue": emails}, "must have 1 to"),
        ({"name": "x", "queue": emails, "priority": 3}, "priority must be a Priority"),
        ({"name": "x", "queue": emails, "expires_s": "60"}, "expires_s must be a number of seconds"),
        ({"name": "x", "queue": emails, "expires_s": 0}, "above 0"),
        ({"priority": Priority.LOW}, "need a name and a queue"),
        ({"expired": "dead"}, "need a name and a queue"),
        ({"name": "x", "queue": emails, "expired": "keep"}, "expired must be drop or dead, not 'keep'"),
        (
            {"name": "x", "queue": Queue("flat", priorities=False), "priority": Priority.LOW},
            "takes only priority NORMAL",
        ),
        ({"version": 2}, "version need a name and a queue"),
        ({"name": "x", "queue": emails, "version": 0}, "version must be at least 1 and fit into 64 bits, not 0"),
        ({"name": "x", "queue": emails, "version": 1 << 63}, "fit into 64 bits"),
        ({"name": "x", "queue": emails, "version": True}, "version must be an int, not True"),
        ({"name": "x", "queue": emails, "version": "2"}, "version must be an int, not '2'"),
        ({"enc_hook": 3}, r"enc_hook must be a plain function of \(value\), not 3"),
        (
            {"dec_hook": asynchronous},
            r"dec_hook must be a plain function of \(type, value\), not <function asynchronous",
        ),
    ],
)
def test_a_wrong_contract_is_refused_when_it_is_written(keywords: dict[str, object], says: str) -> None:
    """It would fail at the first publish, in production."""
    with pytest.raises((TypeError, ValueError), match=says) as refused:
        cast("Any", type(Job))("Wrong", (Job,), {}, **keywords)
    assert "Wrong" in str(refused.value)
