"""What the lab takes from the memory broker, which it may not import."""

from __future__ import annotations

from leveret.brokers import memory
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.clock import ManualClock
from leveret.runtime import Runtime
from leveret.testing.lab import Memory, Store


def test_the_memory_broker_has_what_the_lab_takes_from_it() -> None:
    """The lab casts the module to `Memory`: without this assignment no checker would see a method that was renamed there."""
    module: Memory[MemoryStore] = memory
    made = module.MemoryStore()
    store: Store = made

    state = store.state(ManualClock())

    assert (state.delayed, state.next_due_in_s) == (0, None)
    assert isinstance(state.version, int)
    assert isinstance(module.MemoryBroker(made, Runtime(app="unit")), MemoryBroker)
