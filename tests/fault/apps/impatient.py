"""The app of `recorder` in a process that tries a sick queue often, and gives up after 3 tries of each of its physical queues."""

from leveret.brokers.rabbitmq import aside, consuming
from tests.fault.apps import recorder

consuming.FRUITLESS_TRIES = 3
aside.BASE_S, aside.CAP_S = 0.1, 0.2

app = recorder.app
