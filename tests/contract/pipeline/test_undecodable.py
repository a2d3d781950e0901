"""Undecodable: buried byte for byte."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

from leveret import Retry
from leveret.failure import failures_of
from tests.contract.harness import Harness
from tests.contract.pipeline.apps import Runs, assert_empty, job_class, letters_of, make_app, publish

NESTED = b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "random bytes": (os.urandom(300), {}),
    "the wrong shape": (b'{"n": "seven"}', {}),
    "a field that is missing": (b"{}", {}),
    "an empty body": (b"", {}),
    "100 000 nested brackets": (NESTED, {}),
    "a __post_init__ that raises": (b'{"n": -1}', {}),
    "a wrong content type": (b'{"n": 1}', {"content_type": "application/x-python-pickle"}),
    "a content encoding": (b'{"n": 1}', {"content_encoding": "gzip"}),
    "an odd header of leveret's": (b'{"n": 1}', {"headers": {"lv-attempt": "many"}}),
}


async def test_what_cannot_be_decoded_is_buried_byte_for_byte_and_the_good_jobs_run(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad producer must neither stop a queue nor lose what it sent; the log has a line for each."""
    queue, runs = harness.queue(), Runs()
    work = job_class(queue)
    app = make_app(harness, work, runs)
    good = await publish(app, work(n=0))  # and so the queue is there

    for number, (body, properties) in enumerate(BAD.values(), 1):
        await harness.put(queue, body, job="contract.work", job_id=f"bad-{number}", **properties)
        good += await publish(app, work(n=number))
    with caplog.at_level(logging.WARNING, "leveret"):
        async with app.worker(queues=[queue.name]):
            ran = {(await runs.next()).job_id for _ in good}
            letters = await letters_of(harness, queue, len(BAD))

    assert ran == set(good)
    found = {letter.job_id: letter for letter in letters}
    assert found.keys() == {f"bad-{number}" for number in range(1, len(BAD) + 1)}
    for number, (body, properties) in enumerate(BAD.values(), 1):
        letter = found[f"bad-{number}"]
        assert letter.body == body
        assert letter.content_encoding == properties.get("content_encoding")
        [failure] = failures_of(letter)
        assert failure.message
    assert all("\n" not in record.getMessage() for record in caplog.records)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("leveret")]
    assert {sum(job_id + " " in line for line in told) for job_id in found} == {1}
    await assert_empty(harness, queue)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "us-ascii", "binary"])
async def test_an_encoding_that_changes_nothing_runs_and_is_kept(harness: Harness, encoding: str) -> None:
    """kombu, Celery and pika programs send one with every message; a retry that drops it changes the message for the next reader."""
    queue = harness.queue()
    runs = Runs(lambda _, attempt: Retry() if attempt.number == 1 else None)
    work = job_class(queue)
    app = make_app(harness, work, runs)
    await publish(app, work(n=0))  # and so the queue is there
    await harness.put(queue, b'{"n": 1}', job="contract.work", job_id="foreign", content_encoding=encoding)

    async with app.worker(queues=[queue.name]):
        attempts = [await runs.next() for _ in range(4)]

    assert [
        (attempt.number, attempt.job, attempt.envelope.content_encoding)
        for attempt in attempts
        if attempt.job_id == "foreign"
    ] == [(1, work(n=1), encoding), (2, work(n=1), encoding)]
    await assert_empty(harness, queue)
