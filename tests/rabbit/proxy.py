"""The faulty link (`tests.proxy`) before a RabbitMQ."""

from tests import proxy


class FaultProxy(proxy.FaultProxy):
    """A faulty link to a RabbitMQ."""

    @property
    def url(self) -> str:
        """The broker's URL through this proxy, for guest on the default vhost."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"
