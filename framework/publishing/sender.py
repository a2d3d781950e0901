"""job + options → envelope → publishing middleware → broker, confirmed."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from .. import codec
from ..backoff import full_jitter
from ..broker import Broker, Posted, PublisherState
from ..chain import bind, fold_publish
from ..clock import moment_ms
from ..context import current_attempt
from ..envelope import Envelope, Receipt
from ..errors import ConfigurationError, InvalidJob, MessageTooLarge, PublishError, PublishTimeout
from ..handle import Handle, Kept
from ..headers import check_headers, header_bytes, pack_headers
from ..ids import new_job_id
from ..job import Job, Keep, Priority, Queue, Spec, spec_of
from ..layer import AnyLayer, Publish, is_bypass, is_publish_layer
from ..options import Outgoing, OutgoingOptions
from ..outbox import Inbox, has_inbox
from ..runtime import Runtime
from ..schemes import NO_STORE
from ..texts import said_by
from ..transactions import Transactional, is_transactional

if TYPE_CHECKING:
    from ..results.results import Results

_R = TypeVar("_R")

logger = logging.getLogger("leveret.publisher")

MAX_ID_BYTES = 200
_FIELD = re.compile(r": Expected (.*) - at `\$\.(.+)`\Z", re.DOTALL)
"""The end of a text such as: the body can't be decoded as Mail: Expected `int`, got `str` - at `$.order_id`."""
_MOST_S = 1e10
"""About 300 years; a time so far from now still fits into 64 bits as milliseconds since 1970."""


def seconds_of(name: str, value: object, *, zero: bool = False) -> float:
    """Return `value`, the option `name`, as seconds. Raises InvalidJob unless it is above 0 (with `zero`, for a delay: at least 0) and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} must be a number of seconds, not {value!r}"
        raise InvalidJob(msg)
    if not (value >= 0 if zero else value > 0) or value > _MOST_S:
        msg = (
            f"{name} must be {'0 to 48 days' if zero else f'above 0 and at most {_MOST_S:g}'}, in seconds, not {value}"
        )
        raise InvalidJob(msg)
    return float(value)


def _why_invalid(text: str) -> str:
    """Return msgspec's text about a field as a sentence that begins with the field; any other text unchanged."""
    found = _FIELD.search(text)
    return f"field {found[2]}: expected {found[1].replace('`', '')}" if found else text


def _check_kept_id(name: str, job_id: object) -> None:
    """Raise InvalidJob for an id that no job with `keep` can have; it may come from a client of the program."""
    try:
        right = isinstance(job_id, str) and 0 < len(job_id.encode()) <= MAX_ID_BYTES and "\0" not in job_id
    except UnicodeEncodeError:  # half a surrogate pair
        right = False
    if not right:
        msg = f"{name} must be a str of 1 to {MAX_ID_BYTES} bytes without a null character, not {job_id!r:.80}"
        raise InvalidJob(msg)


def _never() -> bool:
    return False


def may_repeat(error: PublishError, envelope: Envelope, wait_s: float = 0.0) -> bool:
    """Return whether `envelope` is sent again after `wait_s`: its deadline hasn't passed, and the broker didn't read it, or may have lost it."""
    return (
        isinstance(error, PublishTimeout)
        and (envelope.resend or not error.maybe_published)
        and time.monotonic() + wait_s < envelope.deadline
    )


def _may_be_published(error: PublishError) -> bool:
    return isinstance(error, PublishTimeout) and error.maybe_published


class _Contract:
    """The specification and the codec of a job class, looked up once per class."""

    __slots__ = ("decoder", "encode", "kept", "spec")

    def __init__(self, job_class: type[Job], encoding: Literal["json", "msgpack"]) -> None:
        spec = spec_of(job_class)
        if spec is None:
            msg = f"{job_class.__name__} is abstract and can't be published; give the class a name= and a queue="
            raise InvalidJob(msg)
        self.spec = spec
        self.encode = codec.encoder(job_class, encoding)
        self.kept: Kept[Any] | None = None
        """What handles of the class ask; None for a class without `keep`, and where a test runs no job."""
        try:
            self.decoder = codec.Decoder(job_class)
        # A type that is only imported under TYPE_CHECKING, for example, or a union that msgspec can't decode.
        except Exception as error:
            msg = f"{spec.name}: a worker can't decode {job_class.__name__}: {error}"
            raise InvalidJob(msg) from error


class Sender:
    """Makes envelopes and sends them; `Publisher`, the cron publisher and the consumer share it.

    A confirmed publish is durable if the broker is. A publish that raises `PublishTimeout(maybe_published=True)` may have
    arrived; it is safe to repeat under the same id (at least once).

    Args:
        broker: The broker. `close` leaves it open.
        layers: The app's middleware.
        runtime: Settings, clock and chance.
        observe: Called with every job that was sent; for tests.
        outbox: What publishes inside a user's transaction, before the broker.
        open_results: Opens the job store; called once, for the first job whose class has `keep`. None: nothing is recorded.
    """

    def __init__(
        self,
        broker: Broker,
        layers: Sequence[AnyLayer],
        runtime: Runtime,
        observe: Callable[[Job, Envelope], None] | None = None,
        outbox: Transactional | None = None,
        open_results: Callable[[], Results | None] | None = None,
    ) -> None:
        publishing = [layer for layer in layers if is_publish_layer(layer)]
        bind(publishing, runtime)
        self._passes = [layer.passes_publish if is_bypass(layer) else _never for layer in publishing]
        self._observe = observe
        self._broker = broker
        self._runtime = runtime
        self._settings = runtime.settings
        self._content_type = codec.content_type(runtime.settings.encoding)
        self._queues: dict[str, Queue] = {}
        self._contracts: dict[type, _Contract] = {}
        self._decoders: dict[tuple[str, str], codec.Decoder] = {}
        self._keeps: dict[tuple[str, str], Keep] = {}
        self._publishing = publishing
        self._send = fold_publish(publishing, self._to_broker)
        self.transactional: Transactional | None = outbox or (broker if is_transactional(broker) else None)
        """What publishes inside a user's transaction; None if nothing does."""
        self._open_results = open_results
        self._results: Results | None = None
        self.inbox: Inbox | None = next((one for one in (outbox, broker) if has_inbox(one)), None)
        """What knows which jobs' effects are committed; None if nothing does."""

    @property
    def state(self) -> PublisherState:
        """How publishing is, as the broker says."""
        return self._broker.publishing

    @property
    def closed_state(self) -> PublisherState:
        """Return the state of a publisher that is left now."""
        return self.state.then(self._runtime.clock.now(), "closed")

    async def publish(self, job: Job[_R], options: OutgoingOptions, timeout_s: float) -> Handle[_R]:
        """Publish one job. Raises `PublishError`."""
        envelope = self.envelope(job, options, time.monotonic() + seconds_of("timeout_s", timeout_s))
        if self.bare and (sent := self.post(envelope)) is not None:
            await sent.wait()
            if (error := sent.error()) is None:
                if not envelope.publish:
                    return Handle(sent.job_id)
                self.published(envelope)
                return self.handle(job, envelope, Receipt(sent.job_id))
            if not may_repeat(error, envelope):
                raise error
        return self.handle(job, envelope, await self.send(envelope))

    def handle(self, job: Job[_R], envelope: Envelope, receipt: Receipt) -> Handle[_R]:
        """Return the handle of a publish by its receipt."""
        if not envelope.publish or (kept := self._contracts[type(job)].kept) is None:
            return Handle(receipt.job_id, receipt.state)
        return Handle(receipt.job_id, receipt.state, kept, envelope.publish)

    def handle_of(self, job_id: str, job_class: type[Job[_R]]) -> Handle[_R]:
        """Return a handle of the newest publish of an id. Raises InvalidJob for a class of which nothing is kept."""
        contract = self._contract(job_class)
        if contract.kept is None:
            msg = f"handle(): nothing is kept of {contract.spec.name}; give {job_class.__name__} keep=Keep()"
            raise InvalidJob(msg, job_id=job_id)
        _check_kept_id("handle(): job_id", job_id)
        return Handle(job_id, "confirmed", contract.kept)

    def published(self, envelope: Envelope) -> None:
        """Note for the job store that the broker has confirmed a job whose class has `keep`."""
        if self._results is not None:
            self._results.published(envelope, self._keeps[envelope.queue, envelope.job])

    @property
    def results(self) -> Results | None:
        """The job store of this sender; None without one. Raises ConfigurationError for a wrong URL."""
        if self._results is None and self._open_results is not None:
            self._results = self._open_results()
        return self._results

    async def close(self) -> None:
        """Write to the job store what is noted for it, within its deadline, and close it."""
        if self._results is not None:
            await self._results.close()

    def _contract(self, job_class: type[Job]) -> _Contract:
        """Return what is known of a job class. Raises InvalidJob for a class whose jobs can't be published."""
        contract = self._contracts.get(job_class)
        if contract is not None:
            return contract
        contract = _Contract(job_class, self._settings.encoding)
        spec, queue = contract.spec, contract.spec.queue
        known = self._queues.setdefault(queue.name, queue)
        if known != queue:
            msg = f"job {spec.name}: {queue!r} and {known!r} are two definitions of the same queue; use the same Queue object for both"
            raise InvalidJob(msg)
        if spec.keep is not None:
            contract.kept = self._kept(job_class, spec)
            self._keeps[queue.name, spec.name] = spec.keep
        self._decoders[queue.name, spec.name] = contract.decoder
        self._contracts[job_class] = contract
        return contract

    def _kept(self, job_class: type[Job], spec: Spec) -> Kept[Any] | None:
        if self._open_results is None:
            return None
        try:
            results = self.results
            kept = None if results is None else results.kept(job_class, spec)
        except ConfigurationError as error:
            msg = f"job {spec.name} has keep=, and its store can't be used: {error}"
            raise InvalidJob(msg) from error
        if kept is None:
            msg = f"job {spec.name} has keep=, but {NO_STORE}"
            raise InvalidJob(msg)
        return kept

    def envelope(self, job: Job, options: OutgoingOptions, deadline: float) -> Envelope:
        """Return the envelope of `job`. Raises InvalidJob or MessageTooLarge, so that no wrong job leaves the process."""
        if not isinstance(job, Job):  # pyright: ignore[reportUnnecessaryIsInstance]
            given = f"the class {job.__name__}" if isinstance(job, type) else type(job).__name__
            hint = "; pass its options to publish() as keywords" if isinstance(job, Outgoing) else ""
            msg = f"publish() takes a Job instance, not {given}{hint}"
            raise InvalidJob(msg)
        contract = self._contracts.get(type(job)) or self._contract(type(job))
        spec = contract.spec
        try:
            return self._checked(job, contract, options, deadline)
        except PublishError as error:
            error.args = (f"{spec.name} to queue {spec.queue.name}: {error}",)
            raise
        except (ValueError, TypeError, OverflowError) as error:  # text that isn't Unicode, a time before the year 1
            msg = f"{spec.name} to queue {spec.queue.name}: {error}"
            raise InvalidJob(msg) from error

    def _checked(self, job: Job, contract: _Contract, options: OutgoingOptions, deadline: float) -> Envelope:
        spec = contract.spec
        now = self._runtime.clock.now()
        job_id = options.get("job_id")
        if job_id is None:
            job_id = new_job_id()
        elif not isinstance(job_id, str) or not 0 < len(job_id.encode()) <= MAX_ID_BYTES:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"job_id must be a str of 1 to {MAX_ID_BYTES} bytes, not {job_id!r:.80}"
            raise InvalidJob(msg)
        elif spec.keep is not None:
            _check_kept_id("job_id of a job with keep=", job_id)
        if (priority := options.get("priority")) is None:
            priority = spec.priority
        if priority is not spec.priority and priority not in spec.queue.levels:
            if isinstance(priority, Priority):  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"{spec.queue!r} takes only the priority NORMAL, not {priority.name}"
            else:
                level = next((one for one in Priority if one.value == priority), Priority.HIGH)
                msg = f"priority must be a Priority, such as Priority.{level.name}, not {priority!r}"
            raise InvalidJob(msg, job_id=job_id)
        body = self._encoded(job, contract, job_id)
        delay_s = self._delay_s(options, now, spec.queue) if "delay_s" in options or "at" in options else 0.0
        expires_s = options.get("expires_s")
        expires_s = spec.expires_s if expires_s is None else seconds_of("expires_s", expires_s)
        if expires_s is not None and expires_s <= delay_s:
            msg = f"the job would expire after {expires_s:g} s, before its delay of {delay_s:g} s is over"
            raise InvalidJob(msg, job_id=job_id)
        try:
            headers: Mapping[str, object] = check_headers(given) if (given := options.get("headers")) else {}
        except ValueError as error:
            raise InvalidJob(str(error), job_id=job_id) from None
        running = current_attempt.get()
        correlation_id = options.get("correlation_id")
        if correlation_id is None:
            correlation_id = None if running is None else running.envelope.correlation_id or running.job_id
        elif not isinstance(correlation_id, str) or not 0 < len(correlation_id.encode()) <= MAX_ID_BYTES:  # pyright: ignore[reportUnnecessaryIsInstance]
            msg = f"correlation_id must be a str of 1 to {MAX_ID_BYTES} bytes, not {correlation_id!r:.80}"
            raise InvalidJob(msg, job_id=job_id)
        # with more than 15 keywords CPython makes a dict for the call, which takes 0.5 µs: so `publish` isn't among them
        envelope = Envelope(
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
            due_ms=moment_ms(now + delay_s) if delay_s else None,
            expires_at_ms=None if expires_s is None else int((now + expires_s) * 1000),
            deadline=deadline,
            resend="resend" in options and bool(options["resend"]),
        )
        if spec.keep is None:
            return envelope
        return msgspec.structs.replace(envelope, publish=self._runtime.rng.getrandbits(64) - (1 << 63) or 1)

    def _encoded(self, job: Job, contract: _Contract, job_id: str) -> bytes:
        settings = self._settings
        try:
            body = contract.encode(job)
        except Exception as error:
            msg = f"the job can't be encoded: {said_by(error)}"
            raise InvalidJob(msg, job_id=job_id) from error
        if len(body) > settings.max_body_bytes:
            msg = f"the body has {len(body)} bytes, the limit is {settings.max_body_bytes}; store the data elsewhere and send a reference"
            raise MessageTooLarge(msg, job_id=job_id, size_bytes=len(body), limit_bytes=settings.max_body_bytes)
        if len(body) > settings.warn_body_bytes:
            logger.warning(
                "job %s %s has a body of %d bytes; large bodies slow a broker down",
                contract.spec.name,
                job_id,
                len(body),
            )
        if settings.validate:
            try:
                contract.decoder.decode(body, self._content_type)
            except codec.UndecodableError as error:
                cause = error.__cause__
                if isinstance(cause, msgspec.MsgspecError):  # one of a user's hook, if any, and nothing of msgspec's
                    cause = cause.__cause__
                raise InvalidJob(_why_invalid(str(error)), job_id=job_id) from cause
        return body

    def _delay_s(self, options: OutgoingOptions, now: float, queue: Queue) -> float:
        given_s, at = options.get("delay_s"), options.get("at")
        delay_s = 0.0 if given_s is None else seconds_of("delay_s", given_s, zero=True)
        if at is not None:
            if given_s is not None:
                msg = "delay_s and at exclude each other; give one of them"
                raise InvalidJob(msg)
            if not isinstance(at, datetime) or at.utcoffset() is None:  # pyright: ignore[reportUnnecessaryIsInstance]
                msg = f"at must be an aware datetime (with a time zone), not {at!r}"
                raise InvalidJob(msg)
            delay_s = max(0.0, at.timestamp() - now)
        if delay_s and delay_s > (limit_s := self._broker.features(queue).max_delay_s):
            msg = f"the delay of {delay_s:.0f} s is above the limit of {limit_s / 86_400:g} days ({limit_s:.0f} s)"
            raise InvalidJob(msg)
        return delay_s

    def check_headers(self, envelope: Envelope) -> None:
        """Raise MessageTooLarge if the headers are too large."""
        limit = self._settings.max_header_bytes
        if envelope.headers and (size := header_bytes(pack_headers(envelope))) > limit:
            msg = f"{envelope.job} to queue {envelope.queue}: the headers have {size} bytes, the limit is {limit}"
            raise MessageTooLarge(msg, job_id=envelope.job_id, size_bytes=size, limit_bytes=limit)

    async def send(self, envelope: Envelope) -> Receipt:
        """Send an envelope through the publishing middleware."""
        self.check_headers(envelope)
        return await self._send(envelope)

    async def send_to(self, last: Publish, envelope: Envelope) -> Receipt:
        """Send an envelope through the publishing middleware, and then to `last` instead of the broker."""
        self.check_headers(envelope)
        return await fold_publish(self._publishing, last)(envelope)

    def queue_of(self, envelope: Envelope) -> Queue:
        """Return the queue of an envelope that this sender made."""
        return self._queues[envelope.queue]

    async def at_once(self, jobs: Iterable[tuple[Queue, Envelope]], _deadline: float) -> None:
        """Publish the jobs of a transaction without it, as an `Add` for tests."""
        for _, envelope in jobs:
            await self._to_broker(envelope)

    async def _to_broker(self, envelope: Envelope) -> Receipt:
        try:
            await self._broker.publish(self._queues[envelope.queue], envelope)
        except PublishTimeout as error:
            if not may_repeat(error, envelope):
                raise
            await self._repeat(envelope, error)
        if envelope.publish:
            self.published(envelope)
        if self._observe is not None:
            decoder = self._decoders[envelope.queue, envelope.job]
            self._observe(decoder.decode(envelope.body, envelope.content_type), envelope)
        return Receipt(envelope.job_id)

    async def _repeat(self, envelope: Envelope, error: PublishError) -> None:
        """Send `envelope` again, at once and then with back-off, until it is confirmed; raise once its deadline passes."""
        queue, settings, wait_s, tries, maybe = self._queues[envelope.queue], self._settings, 0.0, 0, False
        while may_repeat(error, envelope, wait_s):
            maybe = maybe or _may_be_published(error)
            await asyncio.sleep(wait_s)
            try:
                await self._broker.publish(queue, envelope)
            except PublishError as again:
                error = again
            else:
                return
            tries += 1
            base_s, cap_s = settings.reconnect_base_s, settings.reconnect_cap_s
            wait_s = full_jitter(tries, base_s=base_s, cap_s=cap_s, rng=self._runtime.rng)
        if maybe and not _may_be_published(error):
            msg = f"{error}; an earlier try may be in the queue, so publish it again under the same id"
            raise PublishTimeout(msg, job_id=envelope.job_id, maybe_published=True) from error
        raise error

    def post(self, envelope: Envelope) -> Posted | None:
        """Send an envelope without a task if it can be sent at once; None: nothing was sent, use `send`. Call it only while `bare`."""
        if envelope.due_ms is not None or envelope.headers or envelope.resend:
            return None
        return self._broker.post(self._queues[envelope.queue], envelope)

    @property
    def observed(self) -> bool:
        """Whether a test runs the app."""
        return self._observe is not None

    @property
    def bare(self) -> bool:
        """Whether no middleware has anything to do for a publish now, so that `post` may be tried."""
        return self._observe is None and all(passes() for passes in self._passes)
