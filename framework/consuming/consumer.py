"""delivery → held → chain → ending. The chain returns how a run ended; only `Settlement.settle` acts on the ending."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..attempt import Attempt, make_attempt
from ..broker import Broker, Consumption, Delivery, Features, Subscription
from ..chain import bind, fold_consume
from ..clock import Timer
from ..codec import Decoder, UndecodableError
from ..context import current_attempt
from ..envelope import ALONE_FROM
from ..ids import is_slot_job_id
from ..job import Queue
from ..layer import AnyLayer, name_of, readiness_of
from ..outcome import (
    OUTCOMES,
    Aborted,
    Bury,
    CutOff,
    Ending,
    Kind,
    NotStarted,
    Repeated,
    Retry,
    Snooze,
    Undecodable,
    Unknown,
)
from ..publishing.publisher import Publisher
from ..runtime import Runtime
from ..texts import named
from .handler import Handler, innermost, take_back_cancels
from .limits import Limits
from .remembered import Past, key_of, slot_of
from .returning import Returning
from .routes import Route, contracts, unroutable
from .settlement import Ended, Lost, Settlement
from .slots import Gate, Held, QueueHeld, Returned, Slots, in_arrival_order
from .suspects import Suspects

if TYPE_CHECKING:
    from .recording import Recording

logger = logging.getLogger("leveret.consumer")

START_WITHIN_S = 60.0
"""A rate limit lowers the prefetch to the starts of this many seconds; the broker's consumer timeout includes waiting."""
_LEAST_LIMIT_S = 1.0
"""A shorter limit of the broker isn't believed: it would be a queue that was deleted and declared again at once."""
_UNWIND_S = 1.0
_TELL_S = 1.0
"""How long redeliveries that don't run are collected for one log line, seconds."""


class Consumer:
    """Runs the broker's deliveries in separate tasks, which a lost connection neither cancels nor repeats."""

    def __init__(
        self,
        broker: Broker,
        handlers: Sequence[Handler],
        *,
        publisher: Publisher,
        publish_layers: Sequence[AnyLayer],
        resources: object,
        runtime: Runtime,
        limits: Limits,
        around_sync: Callable[[], AbstractContextManager[object]] | None = None,
        observe: Callable[[Ended], None] | None = None,
        threads: Executor | None = None,
        recording: Recording | None = None,
    ) -> None:
        self._publisher = publisher
        self._recording = recording
        self._resources = resources
        self._runtime = runtime
        self._clock = runtime.clock
        self._threads = threads or ThreadPoolExecutor(limits.threads, thread_name_prefix="leveret-job")
        self._slots = Slots(limits, runtime.clock, self._start)
        self._take, self._free, self._queues = self._slots.take, self._slots.free, self._slots.queues  # looked up once
        self._subscriptions: list[Subscription] = []
        self._tasks: dict[asyncio.Task[None], Held | None] = {}
        """The running tasks, each with the delivery that it runs; None for a delivery that is settled without a run."""
        self._sweeper: Timer | None = None
        self.on_queues_changed: Callable[[], None] | None = None
        """Called when the state of a queue has changed."""
        self._lost_held = 0
        self._lost_running = 0
        self._told_recalled = 0
        self._teller: Timer | None = None
        self._stopping = False
        self._watchers: list[asyncio.Future[None]] = []
        self._create_task = asyncio.get_running_loop().create_task
        bind((layer for handler in handlers for layer in handler.layers), runtime)
        for queue in {handler.queue.name: handler.queue for handler in handlers}.values():
            own = [handler for handler in handlers if handler.queue == queue]
            self._open(queue, own, around_sync, broker.features(queue))
        self._settlement = Settlement(publish_layers, runtime, observe, self._subscriptions, recording)
        self._settlement.replacing.on_refusals_changed = self.queues_changed
        self._remembered = self._settlement.remembered
        self._end = self._settlement.end
        self._returning = Returning(self._settlement, self._queues)
        self._suspects = Suspects(
            self._slots,
            runtime,
            self._remembered,
            start=self._spawn,
            changed=self.changed,
            give_back=self._returning.give_back,
        )

    def _open(
        self,
        queue: Queue,
        handlers: Sequence[Handler],
        around_sync: Callable[[], AbstractContextManager[object]] | None,
        features: Features,
    ) -> None:
        routes: list[Route] = []
        for handler in handlers:
            inner = innermost(
                handler,
                clock=self._clock,
                threads=self._threads,
                around_sync=around_sync,
                stopping=lambda: self._stopping,
            )
            routes.append(
                Route(
                    handler,
                    handler.spec.version,
                    Decoder(handler.job_class),
                    fold_consume(handler.layers, inner),
                    not handler.is_async,
                )
            )
        limit = self._slots.limits.of(queue.name, in_threads=all(route.in_thread for route in routes))
        # Middleware may hold back a whole queue only if every handler of the queue has the same instance.
        common = [
            layer for layer in handlers[0].layers if all(any(layer is other for other in h.layers) for h in handlers)
        ]
        where = f"queue {queue.name!r}"
        gates = [gate for layer in common if (gate := readiness_of(layer, where)) is not None]
        # Twice the limit: per level, as many jobs wait here as may run. With only one waiting, LOW jobs started before HIGH
        # jobs while the broker refilled the window (measured on the demo). More would keep long jobs from idle workers.
        prefetch = 2 * limit
        for gate in gates:
            if gate.starts_per_s is not None:
                prefetch = min(prefetch, max(1, int(gate.starts_per_s * START_WITHIN_S)))
        readiness = Gate(gates) if gates else None
        held_s, counts = features.held_at_most_s, features.counts_crashes
        self._slots.add_queue(QueueHeld(queue, routes, limit, readiness, held_s, counts_crashes=counts))
        self._subscriptions.append(Subscription(queue, prefetch))

    @property
    def subscriptions(self) -> Sequence[Subscription]:
        """The queues to consume, with their prefetch."""
        return self._subscriptions

    @property
    def running(self) -> int:
        """The number of running handlers."""
        return self._slots.running

    @property
    def busy(self) -> int:
        """The number of deliveries that run or are being settled."""
        return len(self._tasks)

    @property
    def held(self) -> int:
        """The number of deliveries that wait for a slot."""
        return self._slots.held

    @property
    def unsettled(self) -> int:
        """The number of retries and burials that can't be published now; their deliveries stay unacknowledged."""
        return self._settlement.replacing.unsettled

    @property
    def refusals(self) -> Mapping[str, str]:
        """As `Replacing.refusals`."""
        return self._settlement.replacing.refusals

    @property
    def counts(self) -> Counter[Kind]:
        """The number of endings so far, by kind."""
        return Counter({ending.kind: count for ending, count in self._settlement.counts.items()})

    async def changed(self) -> None:
        """Wait until a job starts or ends."""
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.append(watcher)
        await watcher

    def _tell(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def deliver(self, delivery: Delivery, /) -> None:
        """Take a delivery, which starts as soon as it has a slot."""
        envelope, queue = delivery.envelope, self._queues[delivery.queue.name]
        route = queue.routes.get(envelope.job)
        if (
            delivery.redelivered
            or envelope.crashes
            or self._stopping
            or route is None
            or delivery.problem is not None
            or envelope.version > route.version
            or envelope.bury_since_ms is not None
        ):
            if (delivery.redelivered or envelope.crashes) and self._is_known(delivery, route or queue.only):
                return
            if self._stopping:
                self._end_without_run(delivery, NotStarted())
                return
            ending: Ending | None = unroutable(delivery, queue.routes)
            if delivery.redelivered and (ending is None or isinstance(ending, Unknown)):
                ending = self._suspects.judge(delivery) or ending
            if ending is not None:
                self._end_without_run(delivery, ending)
                return
            route = route or queue.only
            assert route is not None
            if envelope.crashes >= ALONE_FROM:
                if delivery.redelivered or queue.counts_crashes:
                    self._suspects.add(Held(delivery, route, self._clock.now()))
                else:  # it was snoozed, and goes back to the suspects, of which a worker holds one at a time
                    self._returning.give_back(delivery)
                return
        if not self._take(Held(delivery, route, self._clock.now()), queue) and self._sweeper is None:
            self._sweep_later()

    def lost(self) -> None:
        """Forget the deliveries that haven't started and can no longer be settled; the broker delivers them again."""
        lost = sum(1 for _ in self._slots.remove(lambda held: not held.delivery.live))
        self._settlement.counts[Lost] += lost
        self._lost_held += lost
        running = [held for held in self._tasks.values() if held is not None and not held.delivery.live]
        self._lost_running = len(running)
        self._remembered.lose(running)
        self._suspects.lost()
        self._settlement.lost()
        self._tell()

    def overdue(self, queue: str, limit_s: float | None) -> None:
        """As `Sink.overdue`: wait with a delivery for a quarter of the limit, and run with one for three quarters."""
        held_by = self._queues[queue]
        if limit_s is None:
            ages = [age for held, age in self._ages() if held.delivery.queue.name == queue and held.delivery.live]
            limit_s = max([*ages, self._clock.monotonic() - held_by.oldest()])
        set_s = held_by.held_at_most_s
        if limit_s < _LEAST_LIMIT_S or (held_by.was_overdue and set_s is not None and limit_s >= set_s):
            return
        held_by.held_at_most_s, held_by.was_overdue = limit_s, True
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweep_later()
        limit = f"{round(limit_s, 1):g}"
        is_set = "consumer_timeout_s isn't set" if set_s is None else f"consumer_timeout_s is {set_s:g}"
        wrong = set_s is None or limit_s < 0.9 * set_s
        logger.warning(
            "queue %s: the broker took back a delivery that was held for %s s, its limit (RabbitMQ's consumer_timeout); %s. "
            "%sive each handler a Timeout of at most %.3g s. "
            "Deliveries of jobs that run for longer are now given back in time, so another worker may start such a job too",
            queue,
            limit,
            is_set,
            f"Set consumer_timeout_s={limit}, and g" if wrong else "G",
            held_by.run_s,
        )

    def _ages(self) -> Iterator[tuple[Held, float]]:
        """Yield what runs, each with the seconds for which its delivery is held."""
        now, wall = self._clock.monotonic(), self._clock.now()
        for held in self._tasks.values():
            if held is not None:
                yield held, now - held.since if held.since else wall - held.arrived

    def queues_changed(self) -> None:
        """Pass on that the state of a queue has changed."""
        if self.on_queues_changed is not None:
            self.on_queues_changed()

    def losses(self) -> str:
        """Return, for a log line, what was lost since the last call; empty if nothing was."""
        running, held = self._lost_running, self._lost_held
        self._lost_running = self._lost_held = 0
        if not running + held:
            return ""
        return f"; running jobs that can't be acknowledged any more: {running}, waiting jobs that went back: {held}"

    def _is_known(self, delivery: Delivery, route: Route | None) -> bool:
        """Settle a redelivery by the first run of its job, if this process remembers it; return whether it does."""
        if route is not None and not route.handler.remember:
            return False
        known = self._remembered.take(key_of(delivery.envelope))
        if isinstance(known, Past):
            self._end_without_run(delivery, known)
        elif known is not None and known.task is not None:
            returned = isinstance(known.delivery, Returned)
            known.delivery = delivery  # it goes on: its ending settles this delivery
            known.since = self._clock.monotonic()
            if returned:  # this worker gave the delivery back, so it counts no loss
                return True
            self._settlement.counts[Repeated] += 1
        else:
            return False
        self._tell_recalled()
        return True

    def _tell_recalled(self) -> None:
        if self._teller is None:
            self._teller = self._clock.call_later(_TELL_S, self._say_recalled)

    def _say_recalled(self) -> None:
        self._teller = None
        told, self._told_recalled = self._told_recalled, self._settlement.counts[Repeated]
        logger.info(
            "%d redelivered jobs aren't run again, since this process ran them or runs them",
            self._told_recalled - told,
        )

    async def _instead(self, held: Held, *, is_slot: bool) -> Repeated | Aborted | NotStarted | None:
        """Return why a job that has got its slot doesn't run; None if it does."""
        envelope = held.delivery.envelope
        if is_slot and self._is_repeated(held):
            return Repeated()
        if envelope.publish and self._recording is not None:
            instead = await self._recording.begin(
                envelope, redelivered=held.delivery.redelivered or envelope.crashes > 0
            )
            if instead is not None:
                return instead
        if envelope.crashes and not await held.delivery.begin():
            return NotStarted()
        return None

    def _is_repeated(self, held: Held) -> bool:
        """Whether the job of this cron slot runs here already, or was settled here: a slot may be published twice."""
        envelope = held.delivery.envelope
        slot = slot_of(envelope)
        return self._remembered.has_slot(envelope) or any(
            other is not held and other.delivery.live and slot_of(other.delivery.envelope) == slot
            for other in self._tasks.values()
            if other is not None
        )

    def _start(self, held: Held, queue: QueueHeld) -> None:
        held.task = task = self._create_task(self._work(held, queue))
        if not task.done():  # an eager task factory may have run it to its end
            self._tasks[task] = held
        if self._watchers:
            self._tell()

    def _end_without_run(self, delivery: Delivery, ending: Ending | Past) -> None:
        """Settle a delivery that doesn't run, in a later turn of the loop, because the broker may still be delivering it."""
        if isinstance(ending, NotStarted) and self._returning.publishes(delivery):
            self._returning.give_back(delivery)
            return

        async def settle() -> None:
            if isinstance(ending, Past):
                rest = self._settlement.recall(delivery, ending)
            else:
                rest = self._settlement.end(delivery, None, ending, None)
            if rest is not None:
                await rest

        self._spawn(settle())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that isn't the run of a job; a stop waits for it, too."""
        task = self._create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        if self._watchers:
            self._tell()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task, None)
        if self._watchers:
            self._tell()

    def _sweep_later(self) -> None:
        self._sweeper = self._clock.call_later(self._slots.hold_s / 4, self._sweep)

    def _sweep(self) -> None:
        """Give back deliveries that have waited too long: another worker may be idle, and some brokers close the channel of a slow consumer."""
        for held in self._slots.overdue(self._clock.monotonic()):
            if self._returning.publishes(held.delivery) and not held.delivery.envelope.crashes:
                # published again it would go behind every job of its level; this worker knows it when it comes back
                self._remembered.give_back(held.delivery.envelope)
                self._settlement.end(held.delivery, None, NotStarted(), None)
            else:
                self._end_without_run(held.delivery, NotStarted())
        guarded = any(queue.was_overdue for queue in self._queues.values())
        if guarded:
            for held, age in self._ages():
                if held.route.handler.remember and age > self._queues[held.delivery.queue.name].run_s:
                    self._return(held)
        self._sweeper = None
        if (self.held or guarded) and not self._stopping:
            self._sweep_later()

    def _return(self, held: Held) -> None:
        """Give back the delivery of a running job, which waits for the next delivery: overdue, it would cost the queue its channel."""
        delivery = held.delivery
        if delivery.live:
            self._returning.give_back_began(delivery)
            held.delivery = Returned(delivery.queue, delivery.envelope, delivery.redelivered)
            self._remembered.add(key_of(delivery.envelope), held)

    async def _work(self, held: Held, queue: QueueHeld) -> None:
        """Run one delivery, free its slot, settle it."""
        delivery, route = held.delivery, held.route
        envelope = delivery.envelope
        attempt: Attempt[Any] | None = None
        ending: Ending
        is_slot = (
            envelope.job_id.endswith("Z") and route.handler.remember and is_slot_job_id(envelope.job_id, envelope.app)
        )
        recording = self._recording if envelope.publish else None
        if queue.gate is not None:
            self._slots.begun(queue)
        try:
            if (is_slot or envelope.crashes or recording is not None) and (
                instead := await self._instead(held, is_slot=is_slot)
            ) is not None:
                ending = instead
            else:
                job = route.decoder.decode(envelope.body, envelope.content_type, envelope.content_encoding)
                attempt = make_attempt(
                    job, envelope, delivery.redelivered, held.arrived, self._resources, self._publisher, self._clock
                )
                if recording is not None:
                    recording.track(attempt, in_thread=route.in_thread)
                current_attempt.set(attempt)
                ending = await route.step(attempt)
                if not isinstance(ending, OUTCOMES):  # pyright: ignore[reportUnnecessaryIsInstance]
                    layers = ", ".join(map(name_of, route.handler.layers))
                    msg = f"middleware returned {ending!r:.80} instead of an outcome; look for a missing return in: {layers}"
                    ending = _refused(TypeError(msg))
        except (Retry, Snooze, Bury) as said:  # raised by middleware; `innermost` returns those of a handler
            ending = said
        except UndecodableError as undecodable:
            ending = Undecodable(f"{undecodable}{contracts(envelope, route, self._runtime.app)}")
        except asyncio.CancelledError as cancelled:
            ending = await self._cancelled(attempt, cancelled)
        except BaseException as failed:  # noqa: BLE001 - a SystemExit of a hook, or a panic of a native library: no job stops its worker
            ending = _refused(failed)
        finally:
            self._free(route, queue)
        if recording is not None:
            ending = await self._record(recording, held, attempt, ending)
        delivery = held.delivery  # a redelivery may have taken its place
        rest = self._end(delivery, attempt, ending, held.arrived)
        try:
            if rest is not None:
                await self._settle(held, delivery, rest)
            if is_slot:
                self._remembered.keep_slot(envelope)
        finally:
            task, held.task = held.task, None
            if task is not None:
                self._forget(task)

    async def _cancelled(self, attempt: Attempt[Any] | None, cancelled: asyncio.CancelledError) -> Ending:
        """Return how a run ended that was cancelled: by an abort, by a stop, or by user code."""
        if not self._settlement.cut:
            # The end of a whole program (asyncio.run) cancels the worker in the same turn: let the stop begin first.
            await take_back_cancels()
            if attempt is not None and attempt.aborting:
                return Aborted()
        return CutOff() if self._stopping else _refused(cancelled)

    async def _record(self, recording: Recording, held: Held, attempt: Attempt[Any] | None, ending: Ending) -> Ending:
        """Enter an ending into the job store; return the ending by which the delivery is settled.

        Once somebody has aborted a job, a failure of its run is its end: nothing is retried or buried.
        """
        if attempt is not None and attempt.aborting and isinstance(ending, (Retry, Snooze, Bury)):
            ending = Aborted()
        try:
            while True:
                try:
                    if not self._settlement.cut:
                        await take_back_cancels()
                    return await recording.end(held.delivery, attempt, ending)
                except asyncio.CancelledError:
                    if self._settlement.cut:  # the grace of a stop is over before the store has the ending
                        return CutOff()
                    # otherwise of a timer that the handler left behind
        except BaseException as failed:  # noqa: BLE001 - a SystemExit of a hook that encodes: no job stops its worker
            return _refused(failed)

    async def _settle(self, held: Held, delivery: Delivery, rest: Coroutine[Any, Any, None]) -> None:
        """Await the rest of a settlement, during which the delivery isn't given back."""
        held.since = float("inf")
        if not self._settlement.cut:
            await take_back_cancels()
        await rest
        if held.delivery is not delivery:  # redelivered during the settlement, which remembers the ending
            self.deliver(held.delivery)

    async def drain(self, consumption: Consumption, grace_s: float, hurry: asyncio.Event | None = None) -> bool:
        """Stop consuming, give back jobs that haven't started, finish the others within the grace, cut off the rest.

        Returns whether every job finished. `hurry` ends the grace early. Jobs that are cut off aren't settled, so that the
        broker delivers them again.
        """
        ends = time.monotonic() + grace_s
        self._stop_starting()
        hurried = asyncio.ensure_future(hurry.wait()) if hurry is not None else None
        try:
            await consumption.stop_taking()
            for held in in_arrival_order(self._slots.remove(lambda _: True)):
                self._returning.give_back(held.delivery)
            self._suspects.stop()
            while self._unfinished() and (left_s := ends - time.monotonic()) > 0 and not (hurried and hurried.done()):
                wanted = {*self._tasks, hurried} if hurried else set(self._tasks)
                await asyncio.wait(wanted, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:  # after a cancellation too: no handler outlives its worker
            if hurried is not None:
                hurried.cancel()
            drained = not self._unfinished()
            again = "a second signal to stop" if hurry is not None and hurry.is_set() else "cancelled"
            await self.cut_off(again if time.monotonic() < ends else f"the grace of {grace_s:g} s is over")
        return drained

    def _unfinished(self) -> bool:
        """Return whether tasks still run. Gives back the deliveries of tasks that were cancelled before their first step.

        The end of a whole program (asyncio.run) cancels such tasks. Their code never runs, so nothing else removes them.
        """
        for task in [task for task in self._tasks if task.done()]:
            held = self._tasks.pop(task)
            if held is not None:
                held.task = None
                self._free(held.route, self._queues[held.delivery.queue.name])
                self._returning.give_back(held.delivery)
        return bool(self._tasks)

    def _stop_starting(self) -> None:
        self._stopping = True
        self._settlement.replacing.stop()
        if self._teller is not None:
            self._teller.cancel()
            self._say_recalled()
        self._tell()
        self._slots.stop()
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def cut_off(self, why: str) -> None:
        """Cancel the jobs that still run, without settling them, so that the broker delivers them again. Only the first call acts."""
        self._stop_starting()
        if self._unfinished() and not self._settlement.cut:
            names = ", ".join(sorted(self._slots.busy_queues)) or "settling"
            logger.error("%s: jobs cut off, which the broker delivers again: %d (%s)", why, len(self._tasks), names)
            self._settlement.cut_off()
            self._settlement.counts[CutOff] += len(self._tasks)
            running = [held.delivery for held in self._tasks.values() if held is not None]
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=_UNWIND_S)
            await self._returning.uncount(running)
        await self._returning.finished()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _refused(error: BaseException) -> Bury:
    """Return the burial for an exception that leaves the outermost middleware; raise a GeneratorExit, after which nothing can be awaited."""
    if isinstance(error, GeneratorExit):
        raise error
    bury = Bury(named(error))
    bury.__cause__ = error
    return bury
