"""job + options → envelope → the publish layers → the broker, confirmed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Generic, cast, final

import msgspec
from typing_extensions import TypeIs, TypeVar

from . import codec
from .attempt import current_attempt
from .broker import Broker, Posted
from .chain import AnyLayer, bind, fold_publish
from .envelope import Envelope, HeaderValue, Receipt, check_headers, header_bytes, pack_headers
from .errors import BrokerUnavailable, InvalidJob, MessageTooLarge, PublishError, PublishManyError, PublishTimeout
from .ids import new_job_id
from .job import Job, Priority, Queue, spec_of
from .outcome import MAX_DELAY_S
from .settings import Runtime

logger = logging.getLogger("leveret.publisher")

MAX_ID_BYTES = 200
_MOST_S = 1e10
"""300 years; as milliseconds since 1970 it still fits into 64 bits."""
_WINDOW = 1000
_REFILL = 700
"""A full window is filled again once no more are unconfirmed: waking up for each confirm would cost a turn of the loop each."""
_WINDOW_BYTES = 16 << 20
"""Most bytes of bodies that wait in tasks of their own: 1000 large ones would fill the memory."""

_J_co = TypeVar("_J_co", bound=Job, covariant=True, default=Job)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a job is to be published; the keywords of `Publisher.publish`."""

    priority: Priority | None = None
    delay_s: float | None = None
    at: datetime | None = None
    job_id: str | None = None
    correlation_id: str | None = None
    headers: Mapping[str, HeaderValue] | None = None
    expires_s: float | None = None


_PLAIN = Options()


@final
class Outgoing(Generic[_J_co]):
    """A job with its publish options, where a job is handed over: `publish_many`, a cron function. Same meaning as `Publisher.publish`."""

    __slots__ = ("_job", "_options")

    def __init__(
        self,
        job: _J_co,
        *,
        priority: Priority | None = None,
        delay_s: float | None = None,
        at: datetime | None = None,
        job_id: str | None = None,
        correlation_id: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        expires_s: float | None = None,
    ) -> None:
        self._job = job
        self._options = Options(
            priority=priority,
            delay_s=delay_s,
            at=at,
            job_id=job_id,
            correlation_id=correlation_id,
            headers=dict(headers)
            if isinstance(headers, Mapping)
            else headers,  # what isn't one is refused when it is published
            expires_s=expires_s,
        )

    @property
    def job(self) -> _J_co:
        """The job."""
        return self._job

    @property
    def options(self) -> Options:
        """Everything else that it was made with."""
        return self._options

    def __repr__(self) -> str:
        return f"Outgoing({self._job!r})"


def _number(name: str, value: object, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} is a number of seconds, not {value!r}"
        raise InvalidJob(msg)
    if not (value >= 0 if zero else value > 0) or value > _MOST_S:
        msg = f"{name} must be {'at least' if zero else 'above'} 0 and at most {_MOST_S:g}, not {value}"
        raise InvalidJob(msg)
    return float(value)


class _Contract:
    """What is looked up once a job class: its specification and its decoder."""

    __slots__ = ("decoder", "spec")

    def __init__(self, job: Job) -> None:
        spec = spec_of(type(job))
        if spec is None:
            msg = f"{type(job).__name__} is abstract: it names no job and no queue, so it can't be published"
            raise InvalidJob(msg)
        self.spec = spec
        try:
            self.decoder = codec.Decoder(type(job))
        except (
            Exception
        ) as error:  # a type that is imported for the type checker only, a union that msgspec can't tell apart
            msg = f"{spec.name}: no body of {type(job).__name__} could be decoded: {error}"
            raise InvalidJob(msg) from error


class Sender:
    """Makes envelopes and sends them: what `Publisher`, the cron publisher and the consumer share.

    A confirmed publish is durable where the broker is; one that raises `PublishTimeout(maybe_published=True)` may be
    there, and is safe to repeat under the same id: at least once.
    """

    def __init__(
        self,
        broker: Broker,
        layers: Sequence[AnyLayer],
        runtime: Runtime,
        observe: Callable[[Job, Envelope], None] | None = None,
    ) -> None:
        self._publishing = [layer for layer in layers if hasattr(layer, "publish")]
        bind(self._publishing, runtime)
        self._observe = observe
        self._broker = broker
        self._runtime = runtime
        self._settings = runtime.settings
        self._encode = codec.encoder(runtime.settings.encoding)
        self._content_type = codec.content_type(runtime.settings.encoding)
        self._queues: dict[str, Queue] = {}
        self._contracts: dict[type, _Contract] = {}
        self._decoders: dict[tuple[str, str], codec.Decoder] = {}
        self._send = fold_publish(self._publishing, self._to_broker)

    async def publish(self, job: Job, options: Options, timeout_s: float) -> Receipt:
        """Publish one job; raises a `PublishError`."""
        envelope = self.envelope(job, options, time.monotonic() + _number("timeout_s", timeout_s))
        if not self.bare or (sent := self.post(envelope)) is None:
            return await self.send(envelope)
        await sent.wait()
        if (error := sent.error()) is not None:
            raise error
        return Receipt(sent.job_id)

    def envelope(self, job: Job, options: Options, deadline: float) -> Envelope:
        """Return what will be sent for `job`, or raise InvalidJob or MessageTooLarge: nothing wrong leaves the process."""
        if not isinstance(job, Job):  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"a job is published, not {job!r:.80}" + (
                ": options go into publish itself" if isinstance(job, Outgoing) else ""
            )
            raise InvalidJob(msg)
        contract = self._contracts.get(type(job))
        if contract is None:
            contract = self._contracts[type(job)] = _Contract(job)
            queue = contract.spec.queue
            self._decoders[queue.name, contract.spec.name] = contract.decoder
            known = self._queues.setdefault(queue.name, queue)
            if known != queue:
                del self._contracts[type(job)]
                msg = f"job {contract.spec.name}: {queue!r} and {known!r} are one queue with two definitions; share one Queue"
                raise InvalidJob(msg)
        spec = contract.spec
        try:
            return self._checked(job, contract, options, deadline)
        except PublishError as error:
            error.args = (f"{spec.name} to queue {spec.queue.name}: {error}",)
            raise
        except (ValueError, TypeError, OverflowError) as error:  # text that isn't Unicode, a moment before the year 1
            msg = f"{spec.name} to queue {spec.queue.name}: {error}"
            raise InvalidJob(msg) from error

    def _checked(self, job: Job, contract: _Contract, options: Options, deadline: float) -> Envelope:
        spec = contract.spec
        now = self._runtime.clock.now()
        job_id = options.job_id
        if job_id is None:
            job_id = new_job_id()
        elif not isinstance(job_id, str) or not 0 < len(job_id.encode()) <= MAX_ID_BYTES:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"job_id is a text of 1 to {MAX_ID_BYTES} bytes, not {job_id!r:.80}"
            raise InvalidJob(msg)
        priority = spec.priority if options.priority is None else options.priority
        if priority is not spec.priority and priority not in spec.queue.levels:
            if isinstance(priority, Priority):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"{spec.queue!r} takes no priority but NORMAL"
            else:
                msg = f"priority is a Priority, not {priority!r}"
            raise InvalidJob(msg, job_id=job_id)
        body = self._encoded(job, contract, job_id)
        delay_s = 0.0 if options is _PLAIN else self._delay_s(options, now)
        expires_s = spec.expires_s if options.expires_s is None else _number("expires_s", options.expires_s)
        if expires_s is not None and expires_s <= delay_s:
            msg = f"it would expire after {expires_s:g} s, before its delay of {delay_s:g} s is over"
            raise InvalidJob(msg, job_id=job_id)
        try:
            headers: Mapping[str, object] = check_headers(options.headers) if options.headers else {}
        except ValueError as error:
            raise InvalidJob(str(error), job_id=job_id) from None
        running = current_attempt.get()
        correlation_id = options.correlation_id
        if correlation_id is None:
            correlation_id = None if running is None else running.envelope.correlation_id or running.job_id
        elif not isinstance(correlation_id, str) or not 0 < len(correlation_id.encode()) <= MAX_ID_BYTES:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"correlation_id is a text of 1 to {MAX_ID_BYTES} bytes, not {correlation_id!r:.80}"
            raise InvalidJob(msg, job_id=job_id)
        return Envelope(
            job_id=job_id,
            job=spec.name,
            queue=spec.queue.name,
            priority=priority,
            body=body,
            content_type=self._content_type,
            created_s=int(now),
            app=self._runtime.app,
            correlation_id=correlation_id,
            headers=headers,
            version=spec.version,
            due_ms=int((now + delay_s) * 1000) if delay_s else None,
            expires_at_ms=None if expires_s is None else int((now + expires_s) * 1000),
            deadline=deadline,
        )

    def _encoded(self, job: Job, contract: _Contract, job_id: str) -> bytes:
        settings = self._settings
        try:
            body = self._encode(job)
        except Exception as error:
            msg = f"it can't be encoded: {error}"
            raise InvalidJob(msg, job_id=job_id) from error
        if len(body) > settings.max_body_bytes:
            msg = f"its body has {len(body)} bytes, the limit is {settings.max_body_bytes}; put the data elsewhere and send a reference"
            raise MessageTooLarge(msg, job_id=job_id, size_bytes=len(body), limit_bytes=settings.max_body_bytes)
        if len(body) > settings.warn_body_bytes:
            logger.warning(
                "job %s %s has a body of %d bytes; brokers are slow with large ones",
                contract.spec.name,
                job_id,
                len(body),
            )
        if settings.validate:
            try:
                contract.decoder.decode(body, self._content_type)
            except codec.UndecodableError as error:
                raise InvalidJob(str(error), job_id=job_id) from error
        return body

    def _delay_s(self, options: Options, now: float) -> float:
        delay_s = 0.0 if options.delay_s is None else _number("delay_s", options.delay_s, zero=True)
        if options.at is not None:
            if options.delay_s is not None:
                msg = "delay_s and at exclude each other"
                raise InvalidJob(msg)
            if not isinstance(options.at, datetime) or options.at.utcoffset() is None:  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"at is an aware datetime (with a time zone), not {options.at!r}"
                raise InvalidJob(msg)
            delay_s = max(0.0, options.at.timestamp() - now)
        if delay_s > MAX_DELAY_S:
            msg = f"a delay of {delay_s:g} s is above 48 days"
            raise InvalidJob(msg)
        return delay_s

    async def send(self, envelope: Envelope) -> Receipt:
        """Send an envelope through the publish layers."""
        limit = self._settings.max_header_bytes
        if envelope.headers and (size := header_bytes(pack_headers(envelope))) > limit:
            msg = f"{envelope.job} to queue {envelope.queue}: its headers have {size} bytes, the limit is {limit}"
            raise MessageTooLarge(msg, job_id=envelope.job_id, size_bytes=size, limit_bytes=limit)
        return await self._send(envelope)

    async def _to_broker(self, envelope: Envelope) -> Receipt:
        delay_s = 0.0 if envelope.due_ms is None else max(0.0, envelope.due_ms / 1000 - self._runtime.clock.now())
        await self._broker.publish(self._queues[envelope.queue], envelope, delay_s=delay_s, deadline=envelope.deadline)
        if self._observe is not None:
            decoder = self._decoders[envelope.queue, envelope.job]
            self._observe(decoder.decode(envelope.body, envelope.content_type), envelope)
        return Receipt(envelope.job_id)

    def post(self, envelope: Envelope) -> Posted | None:
        """Send an envelope without a task, where nothing has to be waited for and no layer stands in between; None: use `send`."""
        if envelope.due_ms is not None or envelope.headers:
            return None
        return self._broker.post(self._queues[envelope.queue], envelope, deadline=envelope.deadline)

    @property
    def bare(self) -> bool:
        """Whether nothing stands between an envelope and the broker now, so that `post` may be tried."""
        return self._observe is None and all(
            hasattr(layer, "passes_publish") and layer.passes_publish() for layer in self._publishing
        )


def _is_posted(result: Receipt | PublishError | Posted | None) -> TypeIs[Posted]:
    return result is not None and not isinstance(result, (Receipt, PublishError))


class Batch:
    """Many jobs at once: pipelined, a bounded number unconfirmed, each with a result of its own."""

    def __init__(self, sender: Sender, deadline: float) -> None:
        self._sender = sender
        self._deadline = deadline
        self._results: list[Receipt | PublishError | Posted | None] = []
        """Of each job: what became of it; `Posted` while that isn't known, None while it has a task of its own."""
        self._known = 0
        """Results before it hold no `Posted`."""
        self._flying: set[asyncio.Task[None]] = set()
        self._flying_bytes = 0
        self._room: asyncio.Future[None] | None = None

    async def publish(self, jobs: Iterable[Job | Outgoing]) -> list[Receipt]:
        """Publish `jobs`; receipts in order, or `PublishManyError`."""
        sender, results, deadline = self._sender, self._results, self._deadline
        post = sender.bare
        try:
            for item in jobs:
                job, options = (item.job, item.options) if isinstance(item, Outgoing) else (item, _PLAIN)
                try:
                    if time.monotonic() >= deadline:
                        msg = "it wasn't sent: the time was over, which timeout_s of publish_many gives to all its jobs together"
                        raise PublishTimeout(msg, job_id=options.job_id, maybe_published=False)
                    envelope = sender.envelope(job, options, deadline)
                    sent = sender.post(envelope) if post else None
                    if sent is None and post:
                        await self._until(len(results) - _REFILL)
                        sent = sender.post(envelope)
                except PublishError as error:
                    results.append(error)
                    continue
                results.append(sent)
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
        """Wait until all that were posted are known, up to index `last`; those after it that have ended are taken along."""
        results, at = self._results, self._known
        if at <= last and _is_posted(sent := results[last]):
            await sent.wait()  # first, since those before it have mostly ended by then: one turn of the loop for all
        while at < len(results):
            sent = results[at]
            if _is_posted(sent):
                if not sent.ended:
                    if at > last:
                        break
                    await sent.wait()
                results[at] = sent.error() or Receipt(sent.job_id)
            at += 1
        self._known = at

    async def _fly(self, index: int, envelope: Envelope) -> None:
        """Send one in a task of its own."""
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
        except Exception as error:  # noqa: BLE001 - a user's layer: one job's failure, not everyone's
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


@final
class Publisher:
    """Publishes from an event loop; made by `App.publisher`.

    Safe to use from many tasks at once: what they publish is pipelined.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender: Sender | None = sender
        self._loop = asyncio._get_running_loop()
        """The loop that it was made on, and its connection belongs to; None for a test's attempt that was made outside of one."""

    def close(self) -> None:
        """Refuse what comes from now on; called when the block that made it is left."""
        self._sender = None

    def _open(self, job_id: str | None = None) -> Sender:
        if self._sender is None:
            msg = "this publisher is closed: its `async with app.publisher()` was left"
            raise BrokerUnavailable(msg, job_id=job_id)
        if self._loop is not None and asyncio._get_running_loop() is not self._loop:
            # a connection made on a loop that ends would take all publishes, retries and burials of a worker with it
            msg = (
                "nothing was sent: this publisher belongs to another event loop (asyncio.run makes a new one); in a `def` handler "
                "or a thread use app.blocking_publisher(), kept as a module's variable"
            )
            raise BrokerUnavailable(msg, job_id=job_id)
        return self._sender

    async def publish(
        self,
        job: Job,
        *,
        priority: Priority | None = None,
        delay_s: float | None = None,
        at: datetime | None = None,
        job_id: str | None = None,
        correlation_id: str | None = None,
        headers: Mapping[str, HeaderValue] | None = None,
        expires_s: float | None = None,
        timeout_s: float = 5.0,
    ) -> Receipt:
        """Return once the broker has confirmed it: from then on it runs at least once.

        Args:
            job: An instance of a `Job` class that names its job and queue.
            priority: None: the class's own, NORMAL unless it says otherwise.
            delay_s: Not before so many seconds, kept in the broker; at most 48 days. Excludes `at`.
            at: Not before this aware datetime; one in the past means at once.
            job_id: Up to 200 bytes; None: a new UUIDv7. It identifies, it doesn't deduplicate.
            correlation_id: None: inherited from the job whose handler runs here, if any.
            headers: Plain values, kept by every retry and replay; names must not begin with `lv-`.
            expires_s: Not run later than so many seconds from now; must be above the delay. None: the class's own.
            timeout_s: Seconds for all of it, connecting included.

        Raises:
            InvalidJob, MessageTooLarge: Refused before anything was sent.
            BrokerUnavailable, Unroutable: Nothing was kept.
            PublishTimeout: See its `maybe_published`; publish again under the same `job_id`.
        """
        options = Options(
            priority=priority,
            delay_s=delay_s,
            at=at,
            job_id=job_id,
            correlation_id=correlation_id,
            headers=headers,
            expires_s=expires_s,
        )
        return await self._open(job_id).publish(job, options, timeout_s)

    async def publish_many(self, jobs: Iterable[Job | Outgoing], *, timeout_s: float = 5.0) -> list[Receipt]:
        """Publish `jobs` pipelined; receipts in order, or `PublishManyError` if any failed; `timeout_s` is for all of them.

        Each is confirmed on its own: those with a receipt in the error's `results` are published whatever became of
        the others.
        """
        sender = self._open()
        if isinstance(jobs, (Job, Outgoing)):
            msg = "publish_many takes several jobs, not one"
            raise InvalidJob(msg)
        return await Batch(sender, time.monotonic() + _number("timeout_s", timeout_s)).publish(jobs)
