"""LoadProblem: nodes of any graph on a row of devices, the busiest of which is to be least busy.

    load of a device = its nodes' times + the cost of every tensor that enters or leaves it
                       (charge "stages": once for each device, in the sum)
    or               = its nodes' times; a link is busy for the cost of all tensors that cross it
                       (charge "boundaries": links lie between neighbours and work beside devices)

The published placement problems are of this kind (see the readers); times and sizes are in a
file's own unit. A CPU takes `cpu_time` and pays neither for tensors nor for memory.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx  # type: ignore[import-untyped]
import numpy as np

from p2bw.compiler.placement.instance import Numbers, topological

BITS = 50  # of the sum of all times: exact in floats, however they are added up


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one node costs, forward and backward."""

    name: str
    time: float
    size: float = 0.0
    cpu_time: float = 0.0
    accelerated: bool = True  # an accelerator can run it


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor: its producer and its readers, as numbers of nodes."""

    ends: tuple[int, ...]
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProblem:
    """Nodes, tensors, what comes before what, and what shares a device."""

    nodes: tuple[Node, ...]
    transfers: tuple[Transfer, ...]
    order: tuple[tuple[int, int], ...]  # no later on the row than
    together: tuple[tuple[int, ...], ...] = ()
    memory: float = math.inf  # of an accelerator
    devices: int  # accelerators that the file offers
    charge: Literal["stages", "boundaries"] = "stages"
    unit: str


@dataclass(frozen=True, slots=True)
class Device:
    """What a used device is busy for, and what it holds."""

    kind: Literal["accelerator", "cpu"]
    load: float
    memory: float


def judge_loads(
    problem: LoadProblem, place: Sequence[int], kinds: Sequence[Literal["accelerator", "cpu"]]
) -> tuple[float, tuple[Device, ...]]:
    """The exact objective of a placement, and each device's share; by the definition alone."""
    terms: list[list[float]] = [[] for _ in kinds]
    sizes: list[list[float]] = [[] for _ in kinds]
    links: list[list[float]] = [[] for _ in kinds]  # after each device
    for node, k in zip(problem.nodes, place, strict=True):
        terms[k].append(node.cpu_time if kinds[k] == "cpu" else node.time)
        sizes[k].append(node.size)
    for transfer in problem.transfers:
        touched = {place[end] for end in transfer.ends}
        if problem.charge == "boundaries":
            for k in range(min(touched), max(touched)):
                links[k].append(transfer.cost)
        elif len(touched) > 1:
            for k in touched:
                if kinds[k] == "accelerator":
                    terms[k].append(transfer.cost)
    devices = tuple(
        Device(kind, math.fsum(terms[k]), math.fsum(sizes[k])) for k, kind in enumerate(kinds)
    )
    return max([device.load for device in devices] + [math.fsum(costs) for costs in links]), devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """A LoadProblem over groups in a topological order, in whole steps of time and size.

    Sums of steps are exact, so that a placement does not depend on how a machine adds.
    """

    groups: tuple[tuple[int, ...], ...]  # nodes
    predecessors: tuple[tuple[int, ...], ...]
    time: Numbers
    cpu_time: Numbers
    size: Numbers
    unaccelerated: Numbers  # nodes that only a CPU can run
    cuts: tuple[tuple[tuple[int, ...], int], ...]  # groups that a tensor joins, its cost
    memory: int
    charge: Literal["stages", "boundaries"]
    steps: float  # in one unit of time

    def nodes_to_stages(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Stage of each node, from the stage of each group."""
        place = [0] * sum(map(len, self.groups))
        for members, stage in zip(self.groups, stages, strict=True):
            for node in members:
                place[node] = stage
        return tuple(place)


def contract(problem: LoadProblem) -> Loads:
    """Join what must share a device, and what shares one in some best placement."""
    leader = _components(problem)
    weightless = _weightless(problem)
    while _absorb(problem, leader, weightless):
        pass
    after: dict[int, set[int]] = {own: set() for own in leader}
    for u, v in problem.order:
        after[leader[u]].add(leader[v])
    first = topological(after, leader)
    number = {own: place for place, own in enumerate(first)}
    members: list[list[int]] = [[] for _ in first]
    for node, own in enumerate(leader):
        members[number[own]].append(node)
    groups = tuple(map(tuple, members))
    predecessors: list[set[int]] = [set() for _ in groups]
    for own, found in after.items():
        for v in found - {own}:
            predecessors[number[v]].add(number[own])

    times = [node.time for node in problem.nodes]
    cpu_times = [node.cpu_time for node in problem.nodes]
    sizes = [node.size for node in problem.nodes]
    costs = [transfer.cost for transfer in problem.transfers]
    steps = _steps([*times, *cpu_times, *costs])
    bytes_steps = _steps(sizes)

    def total(values: Sequence[float], factor: float) -> Numbers:
        return np.array([sum(round(values[v] * factor) for v in own) for own in groups], np.int64)

    cuts: Counter[tuple[int, ...]] = Counter()
    for transfer in problem.transfers:
        ends = tuple(sorted({number[leader[end]] for end in transfer.ends}))
        if len(ends) > 1 and transfer.cost:
            cuts[ends] += round(transfer.cost * steps)
    whole = sum(round(size * bytes_steps) for size in sizes)
    return Loads(
        groups=groups,
        predecessors=tuple(tuple(sorted(found)) for found in predecessors),
        time=total(times, steps),
        cpu_time=total(cpu_times, steps),
        size=total(sizes, bytes_steps),
        unaccelerated=total([float(not node.accelerated) for node in problem.nodes], 1),
        cuts=tuple(sorted(cuts.items())),
        memory=int(min(problem.memory * bytes_steps, whole)),
        charge=problem.charge,
        steps=steps,
    )


def _steps(values: Iterable[float]) -> float:
    """A power of two: multiplying by it rounds nothing but the last bits of small values."""
    total = math.fsum(values)
    return 2.0 ** (BITS - math.ceil(math.log2(total))) if total else 1.0


def _components(problem: LoadProblem) -> list[int]:
    """The first node of each node's group: what is joined, or lies on a path between the joined."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(problem.nodes)))
    graph.add_edges_from(problem.order)
    for nodes in problem.together:
        graph.add_edges_from(zip(nodes, nodes[1:] + nodes[:1], strict=True))
    leader = list(range(len(problem.nodes)))
    for component in nx.strongly_connected_components(graph):
        for node in component:
            leader[node] = min(component)
    return leader


def _weightless(problem: LoadProblem) -> list[bool]:
    return [
        node.accelerated and not (node.time or node.cpu_time or node.size) for node in problem.nodes
    ]


def _absorb(problem: LoadProblem, leader: list[int], weightless: Sequence[bool]) -> bool:
    """Join weightless groups to a neighbour that takes part in all they do; True if any was.

    Such a group has one neighbour in the order at most, and each of its tensors joins that
    neighbour as well. Moved beside it, it adds nothing there and leaves every other device no
    busier; so some best placement has them together.
    """
    heavy = {own for own, light in zip(leader, weightless, strict=True) if not light}
    beside: dict[int, set[int]] = {own: set() for own in leader}
    for u, v in problem.order:
        beside[leader[u]].add(leader[v])
        beside[leader[v]].add(leader[u])
    common: dict[int, set[int]] = {}
    for transfer in problem.transfers:
        ends = {leader[end] for end in transfer.ends}
        if len(ends) > 1 and transfer.cost:
            for own in ends:
                common[own] = common.get(own, ends) & ends
    joined = {}
    for own in sorted(set(beside) - heavy):
        near = beside[own] - {own}
        hosts = common[own] - {own} if own in common else near
        if near:
            hosts = hosts & near if len(near) == 1 else set()
        host = min(hosts, default=own)
        if host != own and host not in joined and own not in joined.values():
            joined[own] = host
    leader[:] = [joined.get(own, own) for own in leader]
    return bool(joined)
