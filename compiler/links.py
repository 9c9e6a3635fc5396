"""Links: which ports or wires data between two devices passes, and how fast each is."""

import heapq
import math
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2bw.compiler.topology import Topology

# One direction of a link. In a tree of levels: level, unit, 0 (out of the unit) or 1 (into it);
# in a graph of wires: -1, number of the wire, 0 (from `a` to `b`) or 1.
Port = tuple[int, int, int]


def reverse(port: Port) -> Port:
    """The same link the other way."""
    level, number, way = port
    return level, number, 1 - way


class Network:
    """The routes of a topology, found once.

    In a graph of wires data takes the fewest wires, then the widest, then the lowest numbers;
    devices do not forward what is not theirs. The way back is the way there.
    """

    def __init__(self, topology: "Topology") -> None:
        self.topology = topology
        self._routes: dict[tuple[int, int], tuple[Port, ...]] = {}
        self._wires: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
        for number, wire in enumerate(topology.wires):
            self._wires[wire.a].append((wire.b, number, wire.bandwidth))
            self._wires[wire.b].append((wire.a, number, wire.bandwidth))
        self._paths: dict[int, dict[int, tuple[Port, ...]]] = {}

    def route(self, rank: int, peer: int) -> tuple[Port, ...]:
        """The ports that data from one rank to another passes; none from a rank to itself."""
        if (rank, peer) not in self._routes:
            self._routes[rank, peer] = self._find(rank, peer)
        return self._routes[rank, peer]

    def reaches(self, rank: int, peer: int) -> bool:
        """Data can go from one rank to the other."""
        if rank not in self._paths and self.topology.wires:
            self._paths[rank] = self._search(rank)
        return not self.topology.wires or peer in self._paths[rank]

    def bandwidth(self, port: Port) -> float:
        """Bytes/s."""
        level, number, _ = port
        topology = self.topology
        return topology.wires[number].bandwidth if level < 0 else topology.levels[level].bandwidth

    def name(self, port: Port) -> str:
        """For people: "network 1 out", or "GPU0 to GPU3"."""
        level, number, direction = port
        if level >= 0:
            return f"{self.topology.levels[level].name} {number} {('out', 'in')[direction]}"
        wire = self.topology.wires[number]
        ends = (wire.a, wire.b) if direction == 0 else (wire.b, wire.a)
        return " to ".join(map(self.topology.vertex, ends))

    def device_bandwidth(self, rank: int) -> float:
        """Bytes/s that a device can send, all its links together."""
        if not self.topology.wires:
            return self.topology.levels[0].bandwidth
        return math.fsum(bandwidth for _, _, bandwidth in self._wires[rank])

    @cached_property
    def fastest(self) -> float:
        """Bytes/s that the best-linked device can send, all its links together."""
        if not self.topology.wires:
            return self.topology.levels[0].bandwidth
        return max(map(self.device_bandwidth, range(self.topology.gpus)))

    @property
    def slowest(self) -> float:
        """Bytes/s of the slowest link."""
        links = self.topology.wires or self.topology.levels
        return min(link.bandwidth for link in links)

    def _find(self, rank: int, peer: int) -> tuple[Port, ...]:
        topology = self.topology
        if rank == peer:
            return ()
        if not topology.wires:
            units = [
                (topology.unit(rank, i), topology.unit(peer, i)) for i in range(topology.tiers)
            ]
            out = [(i, own, 0) for i, (own, other) in enumerate(units) if own != other]
            into = [(i, other, 1) for i, (own, other) in enumerate(units) if own != other]
            return (*out, *into)
        first = min(rank, peer)
        if first not in self._paths:
            self._paths[first] = self._search(first)
        path = self._paths[first][max(rank, peer)]
        if rank == first:
            return path
        return tuple(map(reverse, reversed(path)))

    def _search(self, source: int) -> dict[int, tuple[Port, ...]]:
        """The routes from one device to all others."""
        found: dict[int, tuple[Port, ...]] = {}
        # Wires so far, narrowest wire (negated: the widest way first), vertices, ports.
        heap: list[tuple[int, float, tuple[int, ...], tuple[Port, ...]]]
        heap = [(0, -float("inf"), (source,), ())]
        while heap:
            count, narrow, way, ports = heapq.heappop(heap)
            here = way[-1]
            if here in found:
                continue
            found[here] = ports
            if here != source and here < self.topology.gpus:
                continue
            for there, wire, bandwidth in self._wires[here]:
                if there not in found:
                    port = (-1, wire, int(self.topology.wires[wire].a != here))
                    step = (count + 1, max(narrow, -bandwidth), (*way, there), (*ports, port))
                    heapq.heappush(heap, step)
        return found
