"""Publish many jobs at once: pipelined, with a bounded number unconfirmed, and one result per job."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from typing import cast

from msgspec.structs import replace
from typing_extensions import TypeIs

from ..broker import Posted
from ..envelope import Envelope, Receipt
from ..errors import PublishError, PublishManyError, PublishTimeout
from ..job import Job
from ..options import Outgoing, OutgoingOptions
from .sender import Sender, may_repeat

_WINDOW = 1000
_REFILL = 700
"""A full window is filled again when this many are unconfirmed; a wake-up per confirm would cost a turn of the loop per job."""
_KEPT_BYTES = 16 << 10
"""A job with a larger body isn't kept until its result is known, so it can't be sent again: 1000 large bodies would fill the memory."""
_WINDOW_BYTES = 16 << 20
"""The maximum of bytes in the bodies of jobs that have a task; 1000 large bodies would fill the memory."""


def _is_posted(result: Receipt | PublishError | Posted | None) -> TypeIs[Posted]:
    return result is not None and not isinstance(result, (Receipt, PublishError))


class Batch:
    """One call of `publish_many`."""

    def __init__(self, sender: Sender, deadline: float) -> None:
        self._sender = sender
        self._deadline = deadline
        self._results: list[Receipt | PublishError | Posted | None] = []
        """The result of each job: `Posted` until the result is known, None while the job has a task."""
        self._known = 0
        """No result before this index is a `Posted`."""
        self._kept: deque[Envelope | None] = deque()
        """The envelopes of the results from that index on, as far as they are needed for sending again."""
        self._unnoted: dict[int, Envelope] = {}
        """The posted jobs whose classes have `keep`, until they are confirmed."""
        self._flying: set[asyncio.Task[None]] = set()
        self._flying_bytes = 0
        self._room: asyncio.Future[None] | None = None

    async def publish(self, jobs: Iterable[Job | Outgoing]) -> list[Receipt]:
        """Publish `jobs`, and return the receipts in order. Raises `PublishManyError` if any job failed."""
        sender, results, kept, deadline = self._sender, self._results, self._kept, self._deadline
        post, plain = sender.bare, OutgoingOptions()
        try:
            for item in jobs:
                job, options = (item.job, item.options) if isinstance(item, Outgoing) else (item, plain)
                try:
                    if time.monotonic() >= deadline:
                        msg = (
                            "the job wasn't sent: the timeout_s of publish_many, which is for all of its jobs, was over"
                        )
                        raise PublishTimeout(msg, job_id=options.get("job_id"), maybe_published=False)
                    envelope = sender.envelope(job, options, deadline)
                    sent = sender.post(envelope) if post else None
                    if sent is None and post:
                        await self._until(len(results) - _REFILL)
                        sent = sender.post(envelope)
                except PublishError as error:
                    results.append(error)
                    kept.append(None)
                    continue
                if envelope.publish and sent is not None:
                    small = len(envelope.body) <= _KEPT_BYTES
                    self._unnoted[len(results)] = envelope if small else replace(envelope, body=b"")
                results.append(sent)
                kept.append(envelope if sent is not None and len(envelope.body) <= _KEPT_BYTES else None)
                if sent is None:
                    await self._fly(len(results) - 1, envelope)
            await self._until(len(results) - 1)
            if self._flying:
                await asyncio.wait(self._flying)
        finally:
            for task in self._flying:
                task.cancel()
        if not all(isinstance(result, Receipt) for result in results):
            raise PublishManyError(cast("list[Receipt | PublishError]", results))
        return cast("list[Receipt]", results)

    async def _until(self, last: int) -> None:
        """Wait until the results of all posted jobs up to index `last` are known; collect later ones that are known too."""
        results, kept, at = self._results, self._kept, self._known
        if at <= last and _is_posted(sent := results[last]):
            # The last one first: most of the others have ended by then, so that one turn of the loop is enough.
            await sent.wait()
        while at < len(results):
            sent = results[at]
            if _is_posted(sent):
                if not sent.ended:
                    if at > last:
                        break
                    await sent.wait()
                error, envelope = sent.error(), kept[0]
                unnoted = self._unnoted.pop(at, None) if self._unnoted else None
                if error is not None and envelope is not None and may_repeat(error, envelope):
                    results[at] = None
                    await self._fly(at, envelope)
                else:
                    results[at] = error or Receipt(sent.job_id)
                    if unnoted is not None and error is None:
                        self._sender.published(unnoted)
            kept.popleft()
            at += 1
        self._known = at

    async def _fly(self, index: int, envelope: Envelope) -> None:
        """Send `envelope` in a task, once there is room for one more."""
        size = len(envelope.body)
        if len(self._flying) >= _WINDOW or (self._flying and self._flying_bytes + size > _WINDOW_BYTES):
            self._room = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._room], timeout=max(0.0, self._deadline - time.monotonic()))
            self._room = None
        task = asyncio.get_running_loop().create_task(self._send(index, envelope))
        self._flying.add(task)
        self._flying_bytes += size
        task.add_done_callback(partial(self._landed, size))

    async def _send(self, index: int, envelope: Envelope) -> None:
        try:
            self._results[index] = await self._sender.send(envelope)
        except PublishError as error:
            self._results[index] = error
        except Exception as error:  # noqa: BLE001 - an error of a user's middleware must fail one job, not all
            failed = PublishError(f"{envelope.job}: {type(error).__name__}: {error}", job_id=envelope.job_id)
            failed.__cause__ = error
            self._results[index] = failed

    def _landed(self, size: int, task: asyncio.Task[None]) -> None:
        self._flying.discard(task)
        self._flying_bytes -= size
        if (
            self._room is not None
            and len(self._flying) <= _REFILL
            and self._flying_bytes <= _WINDOW_BYTES // 2
            and not self._room.done()
        ):
            self._room.set_result(None)
