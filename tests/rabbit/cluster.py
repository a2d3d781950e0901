"""A RabbitMQ cluster of three nodes, each on a host of its own (`network`), so that nodes die and links are cut one by one."""

import asyncio
import json
import time
from collections.abc import Mapping

from tests.nodes import free_ports
from tests.rabbit.network import HOME, Network
from tests.rabbit.node import Installation, Node, Place

_HOSTS = ("n1", "n2", "n3")
_WHOLE_S, _ALONE_S = 60.0, 10.0


class Cluster:
    """Three nodes: `nodes`, `url` of all of them, and levers for the links between them. Each node has its own: kill9, pause, ctl and so on.

    This process reaches each node at its own `url`. A peer that is silent for `ticktime_s` counts as down (RabbitMQ's own: 60 s).
    """

    def __init__(
        self, installation: Installation, *, ticktime_s: int = 8, conf: Mapping[str, str] | None = None
    ) -> None:
        self._installation = installation
        self._ticktime_s = ticktime_s
        self._conf = {"cluster_partition_handling": "pause_minority", **(conf or {})}
        self.network = Network(_HOSTS)
        self.nodes: list[Node] = []

    @property
    def url(self) -> str:
        """The URLs of all nodes, separated by commas."""
        return self.url_from(self.nodes[0])

    def url_from(self, first: Node) -> str:
        """The URLs of all nodes, `first` first."""
        return ",".join(node.url for node in (first, *self.others(first)))

    def others(self, node: Node) -> list[Node]:
        """The nodes but this one."""
        return [other for other in self.nodes if other is not node]

    async def start(self) -> None:
        """Make the network, and start all nodes at once; return once each is a member."""
        self.network.open()
        names = {host: f"rabbit@{self.network.address[host]}" for host in _HOSTS}
        discovery = {
            "cluster_formation.peer_discovery_backend": "classic_config",
            **{f"cluster_formation.classic_config.nodes.{n}": name for n, name in enumerate(names.values(), 1)},
        }
        [epmd_port], cookie = free_ports(1), Place().cookie
        for host, name in names.items():
            place = Place(
                node=name,
                address=self.network.address[host],
                enter=self.network.enter(host),
                cookie=cookie,
                ticktime_s=self._ticktime_s,
                epmd_port=epmd_port,
            )
            self.nodes.append(Node(self._installation, conf={**discovery, **self._conf}, place=place))
        if self._installation.version.startswith(
            "3."
        ):  # started at once under load, such a node may form a cluster by itself
            await self.nodes[0].start()
        await asyncio.gather(*(node.start() for node in self.nodes))
        await self.whole()

    def calm(self) -> None:
        """End all cuts, and let the nodes go on that hang."""
        self.network.heal()
        for node in self.nodes:
            node.resume()

    async def whole(self) -> None:
        """End all that this cluster suffers, and return once each node sees each other as a member; RuntimeError after a minute.

        On 3.10 and 4.0 a node that hung or was cut off may stay alone for good: the loneliest one is then started again.
        """
        self.calm()
        await asyncio.gather(*(node.start() for node in self.nodes))
        began = restarted = time.monotonic()
        while min(seen := await asyncio.gather(*(self._count(node) for node in self.nodes))) < len(self.nodes):
            now = time.monotonic()
            if now > began + _WHOLE_S:
                raise RuntimeError(f"not whole after {_WHOLE_S:.0f} s: the nodes see {seen} members")
            if now > restarted + _ALONE_S:
                restarted = now
                alone = self.nodes[seen.index(min(seen))]
                await alone.kill9()
                await alone.start()
            await asyncio.sleep(0.2)  # membership has no event

    async def members(self, node: Node) -> set[str]:
        """Return the names of the running nodes that `node` sees; none while it is paused or starts."""
        try:
            status: Mapping[str, list[str]] = json.loads(await node.ctl("cluster_status", "--formatter", "json"))
        except RuntimeError:
            return set()
        return set(status["running_nodes"])

    async def _count(self, node: Node) -> int:
        return len(await self.members(node))

    async def leader(self, queue: str, *, asked: Node | None = None) -> Node:
        """Return the node that leads a quorum queue."""
        rows: list[Mapping[str, str]] = json.loads(
            await (asked or self.nodes[0]).ctl("list_queues", "name", "leader", "--formatter", "json")
        )
        [leader] = [row["leader"] for row in rows if row["name"] == queue]
        return next(node for node in self.nodes if node.name == leader)

    async def lead(self, queue: str, node: Node) -> None:
        """Make `node` the leader of a quorum queue."""
        await self.nodes[0].eval(
            f"ra:transfer_leadership({{'%2F_{queue}', '{(await self.leader(queue)).name}'}},"
            f" {{'%2F_{queue}', '{node.name}'}})."
        )
        ends = time.monotonic() + 20
        while await self.leader(queue) is not node:
            if time.monotonic() > ends:
                raise RuntimeError(f"{node.name} doesn't lead {queue} after 20 s")

    def isolate(self, node: Node, *, from_clients: bool = False) -> None:
        """Cut the node from its peers; clients reach all three, unless they are to be cut off too."""
        home = (HOME,) if from_clients else ()
        self.network.cut(self._host(node), *(self._host(other) for other in self.others(node)), *home)

    def cut_off(self, node: Node) -> None:
        """Cut clients from the node, silently; its peers still reach it."""
        self.network.cut(HOME, self._host(node))

    def heal(self) -> None:
        """End all cuts."""
        self.network.heal()

    async def close(self) -> None:
        """End all nodes and remove their network."""
        await asyncio.gather(*(node.close() for node in self.nodes))
        self.network.close()

    def _host(self, node: Node) -> str:
        return _HOSTS[self.nodes.index(node)]
