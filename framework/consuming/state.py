"""How a worker is: connecting, ready, degraded, stopping or failed, and each change as one log line."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Literal, TypeAlias, final

import msgspec

from ..broker import Consumption, QueueState
from ..clock import Clock
from ..settings import redact
from .consumer import Consumer

logger = logging.getLogger("leveret.worker")


StateName: TypeAlias = Literal["connecting", "ready", "degraded", "stopping", "failed"]


class WorkerState(msgspec.Struct, frozen=True):
    """How a worker is; see `Worker.state`."""

    name: StateName
    """
    - connecting: no queue is consumed; the worker waits for its broker.
    - ready: every queue is consumed.
    - degraded: the broker answers, but not every queue is consumed, or the dead letters of one take nothing; `queues` says which.
    - stopping: the worker takes no more jobs and finishes those that run.
    - failed: no queue is consumed, and waiting won't help.
    """
    since: datetime
    """When `name` began, UTC."""
    why: str
    """Why the worker isn't ready, on one line; empty if it is."""
    queues: tuple[QueueState, ...]
    """The state of each queue."""


class Watch:
    """Follows a worker's consumption, and logs each change of its state."""

    def __init__(self, consumer: Consumer, clock: Clock) -> None:
        self._consumer = consumer
        self._clock = clock
        self._consumption: Consumption | None = None
        self._failure: BaseException | None = None
        self._stopping = False
        self._was_ready = False
        self.state = WorkerState("connecting", self._now(), "", ())
        consumer.on_queues_changed = self._look

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), timezone.utc)

    def follow(self, consumption: Consumption) -> asyncio.Future[None]:
        """Follow `consumption`, whose first state is no change; return the wait for its failure, to be cancelled at the end."""
        self._consumption = consumption
        self.state = self._seen()
        self._was_ready = self.state.name == "ready"
        failed = asyncio.ensure_future(consumption.failed())
        failed.add_done_callback(self._failed)
        return failed

    def _failed(self, failed: asyncio.Future[None]) -> None:
        if not failed.cancelled() and (error := failed.exception()) is not None:
            self._failure = error
            self._look()

    def stop(self, grace: str) -> None:
        """Begin to stop; `grace` says what becomes of the running jobs."""
        self._stopping = True
        logger.info("stopping: %d running, %d held; %s", self._consumer.running, self._consumer.held, grace)
        self._look()

    def _seen(self) -> WorkerState:
        refusals = self._consumer.refusals
        queues = (
            () if self._consumption is None else tuple(_with(refusals, queue) for queue in self._consumption.queues)
        )
        name, why = self._judged(queues)
        return WorkerState(name, self.state.since if name == self.state.name else self._now(), why, queues)

    def _judged(self, queues: Sequence[QueueState]) -> tuple[StateName, str]:
        names = {queue.name for queue in queues}
        if self._stopping:
            return "stopping", ""
        if names == {"consumed"} and not any(queue.why for queue in queues):
            return "ready", ""
        if self._failure is not None and "consumed" not in names:
            return "failed", redact(" ".join(str(self._failure).split()))
        return "degraded" if names & {"consumed", "sick"} else "connecting", _reasons(queues)

    def _look(self) -> None:
        """Take over the state of the queues, and log a change."""
        if self._consumption is None:
            return
        before, state = self.state, self._seen()
        self.state = state
        same = state.name == before.name or {state.name, before.name} == {"ready", "degraded"}
        if same and _missing(state) == _missing(before):  # `Settlement` logs which burials are refused
            if losses := self._consumer.losses():
                logger.warning("%s: a channel or lease was lost%s", state.name, losses)
            return
        match state.name:
            case "ready":
                again = "consuming again" if self._was_ready else "consuming"
                self._was_ready = True
                logger.info("ready: %s %s", again, ", ".join(queue.queue for queue in state.queues))
            case "connecting" | "degraded":
                logger.warning("%s: %s%s", state.name, state.why, self._consumer.losses())
            case "failed":
                logger.critical("failed: %s", state.why)
            case "stopping":
                pass


@final
class Worker:
    """A running worker, as `App.worker` yields it."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def state(self) -> WorkerState:
        """Return how the worker is now; the call costs nothing, so a readiness probe may ask as often as it likes."""
        return self._watch.state


def _with(refusals: Mapping[str, str], queue: QueueState) -> QueueState:
    """Return the state of `queue` with the reason why its dead letters take nothing, if it is consumed all the same."""
    why = refusals.get(queue.queue) if queue.name == "consumed" else None
    return queue if why is None else msgspec.structs.replace(queue, why=f"its burials can't be published: {why}")


def _missing(state: WorkerState) -> set[str]:
    return {queue.queue for queue in state.queues if queue.name != "consumed"}


def _reasons(queues: Sequence[QueueState]) -> str:
    """Return why queues aren't consumed: each reason once, with its queues if others have another one."""
    reasons: dict[str, list[str]] = {}
    for queue in queues:
        if queue.name != "consumed" or queue.why:
            reasons.setdefault(queue.why or "not consumed yet", []).append(queue.queue)
    if len(reasons) == 1 and len(next(iter(reasons.values()))) == len(queues) > 1:
        return next(iter(reasons))
    return "; ".join(
        f"{'queue' if len(names) == 1 else 'queues'} {', '.join(names)}: {why}" for why, names in reasons.items()
    )
