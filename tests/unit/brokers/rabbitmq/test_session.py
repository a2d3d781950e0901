"""What an error says about a queue that differs on the broker."""

import pytest

from leveret import Priority, Queue
from leveret.brokers.rabbitmq import topology
from leveret.brokers.rabbitmq.session import difference
from leveret.brokers.rabbitmq.topology import Ladder

_ADVICE = ". Nothing was changed: correct the Queue in code, or let workers empty the queue on the broker and delete it"


@pytest.mark.parametrize(
    ("queue", "text", "differs"),
    [
        (
            Queue("emails", type="classic"),
            "inequivalent arg 'x-dead-letter-strategy' for queue 'emails' in vhost '/': received none but current is the value 'at-least-once'",
            "the app declares Queue(type='classic'), the broker has a quorum queue",
        ),
        (
            Queue("emails"),
            "inequivalent arg 'x-max-priority' for queue 'emails' in vhost '/': received none but current is the value '6' of type 'byte'",
            "the app declares Queue(type='quorum'), the broker has a classic queue",
        ),
        (
            Queue("emails"),
            "inequivalent arg 'x-overflow' for queue 'emails' in vhost '/': received the value 'reject-publish' but current is none",
            "the app declares Queue(type='quorum'), the broker has a classic queue",
        ),
        (
            Queue("emails", type="classic", priorities=False),
            "inequivalent arg 'x-max-priority' for queue 'emails' in vhost '/': received none but current is the value '6' of type 'byte'",
            "the app declares Queue(priorities=False), the broker has a queue with other priorities",
        ),
        (
            Queue("emails"),
            "inequivalent arg 'x-delivery-limit' for queue 'emails' in vhost '/': received '1000000' but current is '20'",
            "its topology on RabbitMQ differs from what leveret declares",
        ),
    ],
)
def test_a_queue_that_differs_is_named_by_its_type(queue: Queue, text: str, differs: str) -> None:
    """The texts are RabbitMQ's: who reads of an x-dead-letter-strategy doesn't think of the type."""
    assert difference(queue.name, topology.of_queue(queue), text) == differs + _ADVICE


def test_what_belongs_to_no_queue_is_not_named_after_one() -> None:
    """The delay ladder has no type that a user sets."""
    text = "inequivalent arg 'x-overflow' for queue 'lv.delay.1s' in vhost '/': received none but current is 'reject-publish'"
    assert difference("the delay queues", topology.of_ladder(Ladder(Priority.NORMAL, 3)), text).startswith(
        "its topology on RabbitMQ differs"
    )
