"""Uplinks: what a stage puts on the ports that several devices share, at least."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from p2bw.compiler.links import Port, reverse
from p2bw.compiler.placement.evaluate import Shape, ring_bytes
from p2bw.compiler.placement.ideals import Flags, Floats, Steps
from p2bw.compiler.placement.instance import Instance
from p2bw.compiler.problem import PlacementProblem

Crossings = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, order=True)
class Uplink:
    """The port of a group of ranks that holds replicas of a stage.

    `up`, `down`, `around`, `alone`: of how many replicas the next stage, the previous one, the next
    replica, and all other stages lie outside the group. `least_out` and `least_into`: bytes that
    the group's other stages send through the port, at least.
    """

    up: int
    down: int
    around: int
    alone: int
    bandwidth: float
    least_out: float
    least_into: float

    def seconds(self, steps: Steps, ring: Floats, exchange: Floats) -> Floats:
        """What each step, as the stage, makes of the port's time."""
        both = self.around * ring + self.alone * exchange
        out = self.up * steps.sent + self.down * steps.received_gradient + both
        into = self.down * steps.received + self.up * steps.sent_gradient + both
        result: Floats = np.maximum(out + self.least_out, into + self.least_into) / self.bandwidth
        return result


def make_uplinks(
    instance: Instance, steps: Steps, shape: Shape, possible: Callable[[int], Flags]
) -> tuple[tuple[Uplink, ...], ...]:
    """By stage, the ports it uses; `possible` says which steps can be a stage."""
    ports = list(_shared_ports(instance, shape))
    if not ports:
        return ((),) * shape.depth
    ring = ring_bytes(1, shape.width, instance.slots(shape.depth)) * steps.gradients
    columns = np.stack(
        [steps.sent, steps.received_gradient, ring, steps.received, steps.sent_gradient]
    )
    # What tied parameters exchange is zero for most steps: the others' least leaves it out.
    least = []
    for k in range(shape.depth):
        some = columns[:, possible(k)]
        least.append(some.min(axis=1) if some.size else np.zeros(5))
    found: list[set[Uplink]] = [set() for _ in range(shape.depth)]
    for bandwidth, members in ports:
        for k, (up, down, around, alone) in members.items():
            others = [(c, least[i]) for i, c in members.items() if i != k]
            out = math.fsum(c[0] * size[0] + c[1] * size[1] + c[2] * size[2] for c, size in others)
            into = math.fsum(c[1] * size[3] + c[0] * size[4] + c[2] * size[2] for c, size in others)
            found[k].add(Uplink(up, down, around, alone, bandwidth, out, into))
    return tuple(tuple(sorted(ports)) for ports in found)


def _shared_ports(instance: Instance, shape: Shape) -> Iterator[tuple[float, dict[int, Crossings]]]:
    """Bandwidth of each port beyond the devices' own, and by stage how many replicas use it."""
    topology = instance.problem.topology
    if topology.wires or shape.ranks:
        for port, members in _listed_crossings(instance, shape).items():
            if port[0] != 0:
                yield instance.network.bandwidth(port), members
        return
    for level in range(1, topology.tiers):
        for members in crossings(instance.problem, shape, level).values():
            yield topology.levels[level].bandwidth, members


def _listed_crossings(instance: Instance, shape: Shape) -> dict[Port, dict[int, Crossings]]:
    """By port and stage: of how many replicas what goes to any later stage, to any earlier stage,
    to the next replica, and to any other stage, passes it.
    """
    route = instance.network.route
    found: dict[Port, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0] * 5))
    for k, replica in product(range(shape.depth), range(shape.width)):
        own = shape.rank(k, replica)
        routes = [set(route(own, shape.rank(other, replica))) for other in range(shape.depth)]
        for kind, some in (
            (0, routes[k + 1 :]),
            (1, routes[:k]),
            (4, routes[:k] + routes[k + 1 :]),
        ):
            for port in set.intersection(*some) if some else ():
                found[port][k][kind] += 1
        for port in route(own, shape.rank(k, (replica + 1) % shape.width)):
            found[port][k][2] += 1
            found[reverse(port)][k][3] += 1
    return {
        port: {k: (c[0], c[1], min(c[2:4]), c[4]) for k, c in members.items()}
        for port, members in found.items()
    }


def crossings(
    problem: PlacementProblem, shape: Shape, level: int
) -> dict[int, dict[int, Crossings]]:
    """By group of ranks and stage: replicas with next, previous, ring neighbour, all outside.

    Ranks grow with the stage, so that what goes beyond the next stage leaves a group wherever the
    next stage is outside.
    """
    topology = problem.topology
    found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0] * 4))
    for replica in range(shape.width):
        units = [topology.unit(shape.rank(k, replica), level) for k in range(shape.depth)]
        count = Counter(units)
        for k, own in enumerate(units):
            following = shape.rank(k, (replica + 1) % shape.width)
            peers = (
                units[min(k + 1, shape.depth - 1)],
                units[max(k - 1, 0)],
                topology.unit(following, level),
            )
            for kind, peer in enumerate(peers):
                found[own][k][kind] += peer != own
            found[own][k][3] += count[own] == 1 and shape.depth > 1
    return {
        own: {k: (c[0], c[1], c[2], c[3]) for k, c in members.items()}
        for own, members in found.items()
        if any(any(c) for c in members.values())
    }
