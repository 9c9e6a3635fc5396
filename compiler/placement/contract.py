"""contract: a LoadProblem over as few groups as decide it, in whole numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import numpy as np

from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.loads import LoadProblem

BITS = 50  # of the sum of all times: exact in floats, however they are added up


@dataclass(frozen=True, slots=True)
class Free:
    """Nodes that cost nothing anywhere, to lie before all of `anchors` (`first`) or after them."""

    nodes: tuple[int, ...]
    anchors: tuple[int, ...]
    first: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """A LoadProblem over groups in a topological order, in whole steps of time and size.

    Sums of steps are exact, so that a placement does not depend on how a machine adds.
    """

    charge: Literal["stages", "boundaries"]
    groups: tuple[tuple[int, ...], ...]  # nodes
    predecessors: tuple[tuple[int, ...], ...]
    time: Numbers
    cpu_time: Numbers
    size: Numbers
    unaccelerated: Numbers  # nodes that only a CPU can run
    cuts: tuple[tuple[tuple[int, ...], int], ...]  # groups that a tensor joins, its cost
    memory: int
    steps: float  # in one unit of time

    free: tuple[Free, ...]

    def nodes_to_stages(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Stage of each node, from the stage of each group."""
        place: dict[int, int] = {}
        for members, stage in zip(self.groups, stages, strict=True):
            place.update(dict.fromkeys(members, stage))
        for free in reversed(self.free):
            beside = [place[node] for node in free.anchors]
            stage = (min if free.first else max)(beside, default=0)
            place.update(dict.fromkeys(free.nodes, stage))
        return tuple(place[node] for node in range(len(place)))


def contract(problem: LoadProblem) -> Loads:
    """Join what must share a device or shares one in some best placement; leave out what is free.

    Free groups weigh nothing and exchange nothing: they have a place wherever their neighbours are.
    """
    groups = _Groups(problem)
    while groups.absorb() or groups.release():
        pass
    return _tabulate(problem, groups)


class _Groups:
    """Groups by their leaders while they are joined and released."""

    def __init__(self, problem: LoadProblem) -> None:
        self.problem = problem
        self.leader = components(problem)
        self.free: dict[int, Free] = {}
        ample = math.fsum(node.size for node in problem.nodes) <= problem.memory
        heavy = (
            bool(node.time or node.cpu_time) or not (node.accelerated and (ample or not node.size))
            for node in problem.nodes
        )
        self.heavy = {own for own, weighs in zip(self.leader, heavy, strict=True) if weighs}
        self._connect()

    def _connect(self) -> None:
        """What is between groups: the order, and by group the groups that share all its tensors."""
        leader, free = self.leader, self.free
        self.after: dict[int, set[int]] = {own: set() for own in leader if own not in free}
        self.before: dict[int, set[int]] = {own: set() for own in self.after}
        for u, v in self.problem.order:
            if leader[u] != leader[v] and leader[u] not in free and leader[v] not in free:
                self.after[leader[u]].add(leader[v])
                self.before[leader[v]].add(leader[u])
        self.common: dict[int, set[int]] = {}
        for transfer in self.problem.transfers:
            ends = {leader[end] for end in transfer.ends}
            if len(ends) > 1 and transfer.cost:
                for own in ends:
                    self.common[own] = self.common.get(own, ends) & ends

    def absorb(self) -> bool:
        """Join weightless groups to a neighbour that takes part in all they do; True if any was.

        Such a group has one neighbour in the order at most, and each of its tensors joins that
        neighbour as well. Moved beside it, it adds nothing there and leaves every other device no
        busier; so some best placement has them together.
        """
        joined: dict[int, int] = {}
        hosts: set[int] = set()
        for own in sorted(self.after.keys() - self.heavy):
            near = self.after[own] | self.before[own]
            fit = self.common.get(own, near) - {own}
            host = min(fit & near if near else fit, default=own)
            if len(near) < 2 and host != own and host not in joined and own not in hosts:
                joined[own] = host
                hosts.add(host)
        self.leader[:] = [joined.get(own, own) for own in self.leader]
        if joined:
            self._connect()
        return bool(joined)

    def release(self) -> bool:
        """Leave out weightless groups without tensors at either end of the order."""
        found: set[int] = set()
        for own in sorted(self.after.keys() - self.heavy - self.common.keys()):
            anchors = self.after[own] | self.before[own]
            at_end = not self.after[own] or not self.before[own]
            if at_end and not anchors & found and len(self.after) > len(found) + 1:
                nodes = tuple(node for node, first in enumerate(self.leader) if first == own)
                self.free[own] = Free(nodes, tuple(sorted(anchors)), bool(self.after[own]))
                found.add(own)
        if found:
            self._connect()
        return bool(found)


def _tabulate(problem: LoadProblem, groups: _Groups) -> Loads:
    order = nx.DiGraph()
    order.add_nodes_from(groups.after)
    order.add_edges_from((u, v) for u, found in groups.after.items() for v in found)
    first = list(nx.lexicographical_topological_sort(order))
    number = {own: place for place, own in enumerate(first)}
    members: list[list[int]] = [[] for _ in first]
    for node, own in enumerate(groups.leader):
        if own in number:
            members[number[own]].append(node)
    times = [node.time for node in problem.nodes]
    cpu_times = [node.cpu_time for node in problem.nodes]
    sizes = [node.size for node in problem.nodes]
    steps = _steps([*times, *cpu_times, *(transfer.cost for transfer in problem.transfers)])
    size_steps = _steps(sizes)

    def total(values: Sequence[float], factor: float) -> Numbers:
        return np.array([sum(round(values[v] * factor) for v in own) for own in members], np.int64)

    cuts: Counter[tuple[int, ...]] = Counter()
    for transfer in problem.transfers:
        owners = {groups.leader[end] for end in transfer.ends}
        if len(owners) > 1 and transfer.cost:
            cuts[tuple(sorted(number[own] for own in owners))] += round(transfer.cost * steps)
    whole = sum(round(size * size_steps) for size in sizes)
    return Loads(
        charge=problem.charge,
        groups=tuple(map(tuple, members)),
        predecessors=tuple(tuple(sorted(number[u] for u in groups.before[own])) for own in first),
        time=total(times, steps),
        cpu_time=total(cpu_times, steps),
        size=total(sizes, size_steps),
        unaccelerated=total([float(not node.accelerated) for node in problem.nodes], 1),
        cuts=tuple(sorted(cuts.items())),
        memory=int(min(problem.memory * size_steps, whole)),
        steps=steps,
        free=tuple(groups.free.values()),
    )


def _steps(values: Iterable[float]) -> float:
    """A power of two: multiplying by it rounds nothing but the last bits of small values."""
    total = math.fsum(values)
    return 2.0 ** (BITS - math.ceil(math.log2(total))) if total else 1.0


def components(problem: LoadProblem) -> list[int]:
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
