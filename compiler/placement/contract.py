"""Problems over as few groups as decide them, in whole numbers.

`contract` is for a LoadProblem, `contract_profile` for a ProfileProblem.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.loads import LoadProblem
from p2bw.compiler.placement.profile import ProfileProblem

BITS = 50  # of the sum of all times: exact in floats, however they are added up

Tensor = tuple[tuple[int, ...], float]  # nodes, cost
Cut = tuple[tuple[int, ...], int]  # groups, cost in steps


@dataclass(frozen=True, slots=True)
class Free:
    """Nodes that cost nothing anywhere, to lie before all of `anchors` (`first`) or after them."""

    nodes: tuple[int, ...]
    anchors: tuple[int, ...]
    first: bool


@dataclass(frozen=True, slots=True)
class Grouping:
    """Nodes in groups, in a topological order; some are left out, as free."""

    groups: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]
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

    def total(self, values: Sequence[float], steps: float = 1) -> Numbers:
        """Sum over each group of the nodes' values, each in whole steps."""
        sums = [sum(round(values[node] * steps) for node in own) for own in self.groups]
        return np.array(sums, np.int64)

    def cuts(self, tensors: Iterable[Tensor], steps: float) -> tuple[Cut, ...]:
        """The groups that each tensor joins, and its cost in steps; equal ones summed."""
        number = {node: i for i, own in enumerate(self.groups) for node in own}
        found: Counter[tuple[int, ...]] = Counter()
        for ends, cost in tensors:
            owners = {number[end] for end in ends if end in number}
            if len(owners) > 1 and cost:
                found[tuple(sorted(owners))] += round(cost * steps)
        return tuple(sorted(found.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loads:
    """A LoadProblem over groups in a topological order, in whole steps of time and size.

    Sums of steps are exact, so that a placement does not depend on how a machine adds.
    """

    grouping: Grouping
    predecessors: tuple[tuple[int, ...], ...]
    time: Numbers
    cpu_time: Numbers
    size: Numbers
    unaccelerated: Numbers  # nodes that only a CPU can run
    cuts: tuple[Cut, ...]
    memory: int
    steps: float  # in one unit of time


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A ProfileProblem over groups in a topological order, in whole steps of time and bytes."""

    grouping: Grouping
    predecessors: tuple[tuple[int, ...], ...]
    time: Numbers
    sync: Numbers  # 4 P / bw
    size: Numbers  # bytes held for one minibatch
    cuts: tuple[Cut, ...]  # 2 a / bw
    memory: int | None  # bytes; None if no stage could have too little
    steps: float  # in a second


def contract(problem: LoadProblem) -> Loads:
    """Join what must share a device or shares one in some best placement; leave out what is free.

    Free groups weigh nothing and exchange nothing: they have a place wherever their neighbours are.
    """
    ample = math.fsum(node.size for node in problem.nodes) <= problem.memory
    heavy = [
        bool(node.time or node.cpu_time) or not (node.accelerated and (ample or not node.size))
        for node in problem.nodes
    ]
    tensors = [(transfer.ends, transfer.cost) for transfer in problem.transfers]
    grouping = _group(components(problem), problem.order, tensors, heavy)
    times = [node.time for node in problem.nodes]
    cpu_times = [node.cpu_time for node in problem.nodes]
    sizes = [node.size for node in problem.nodes]
    steps = _steps([*times, *cpu_times, *(cost for _, cost in tensors)])
    size_steps = _steps(sizes)
    whole = sum(round(size * size_steps) for size in sizes)
    return Loads(
        grouping=grouping,
        predecessors=grouping.predecessors,
        time=grouping.total(times, steps),
        cpu_time=grouping.total(cpu_times, steps),
        size=grouping.total(sizes, size_steps),
        unaccelerated=grouping.total([float(not node.accelerated) for node in problem.nodes]),
        cuts=grouping.cuts(tensors, steps),
        memory=int(min(problem.memory * size_steps, whole)),
        steps=steps,
    )


def contract_profile(
    problem: ProfileProblem, workers: int, together: Sequence[tuple[int, ...]] = ()
) -> Flow:
    """The same for a ProfileProblem, exact for stages of up to so many workers."""
    ops = problem.operators
    ample = workers * math.fsum(op.parameters + op.activation for op in ops) <= problem.memory
    heavy = [bool(op.time or op.parameters or (op.activation and not ample)) for op in ops]
    tensors = [
        ((out.producer, *out.readers), 2 * out.bytes / problem.bandwidth) for out in problem.outputs
    ]
    leader = joined(len(ops), problem.order, together)
    grouping = _group(leader, problem.order, tensors, heavy)
    times = [op.time for op in ops]
    syncs = [4 * op.parameters / problem.bandwidth for op in ops]
    # Loads are multiplied by squares of replicas, in 63 bits.
    bits = min(BITS, 60 - 2 * workers.bit_length())
    steps = _steps([*times, *syncs, *(cost for _, cost in tensors)], bits)
    return Flow(
        grouping=grouping,
        predecessors=grouping.predecessors,
        time=grouping.total(times, steps),
        sync=grouping.total(syncs, steps),
        size=grouping.total([math.ceil(op.parameters + op.activation) for op in ops]),
        cuts=grouping.cuts(tensors, steps),
        memory=None if ample else math.floor(problem.memory),
        steps=steps,
    )


def _group(
    leader: list[int],
    order: Sequence[tuple[int, int]],
    tensors: Sequence[Tensor],
    heavy: Sequence[bool],
) -> Grouping:
    """Join and release all that can be; `heavy` nodes weigh something by themselves."""
    groups = _Groups(leader, order, tensors, heavy)
    while groups.absorb() or groups.release():
        pass
    return groups.freeze()


class _Groups:
    """Groups by their leaders while they are joined and released."""

    def __init__(
        self,
        leader: list[int],
        order: Sequence[tuple[int, int]],
        tensors: Sequence[Tensor],
        heavy: Sequence[bool],
    ) -> None:
        self.leader, self.order, self.tensors = leader, order, tensors
        self.free: dict[int, Free] = {}
        self.heavy = {own for own, weighs in zip(leader, heavy, strict=True) if weighs}
        self._connect()

    def _connect(self) -> None:
        """What is between groups: the order, and by group the groups that share all its tensors."""
        leader, free = self.leader, self.free
        self.after: dict[int, set[int]] = {own: set() for own in leader if own not in free}
        self.before: dict[int, set[int]] = {own: set() for own in self.after}
        for u, v in self.order:
            if leader[u] != leader[v] and leader[u] not in free and leader[v] not in free:
                self.after[leader[u]].add(leader[v])
                self.before[leader[v]].add(leader[u])
        self.common: dict[int, set[int]] = {}
        for nodes, cost in self.tensors:
            ends = {leader[node] for node in nodes}
            if len(ends) > 1 and cost:
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

    def freeze(self) -> Grouping:
        graph = nx.DiGraph()
        graph.add_nodes_from(self.after)
        graph.add_edges_from((u, v) for u, found in self.after.items() for v in found)
        first = list(nx.lexicographical_topological_sort(graph))
        number = {own: place for place, own in enumerate(first)}
        members: list[list[int]] = [[] for _ in first]
        for node, own in enumerate(self.leader):
            if own in number:
                members[number[own]].append(node)
        return Grouping(
            groups=tuple(map(tuple, members)),
            predecessors=tuple(tuple(sorted(number[u] for u in self.before[own])) for own in first),
            free=tuple(self.free.values()),
        )


def _steps(values: Iterable[float], bits: int = BITS) -> float:
    """A power of two: multiplying by it rounds nothing but the last bits of small values."""
    total = math.fsum(values)
    return 2.0 ** (bits - math.ceil(math.log2(total))) if total else 1.0


def components(problem: LoadProblem) -> list[int]:
    """The first node of each node's group: what is joined, or lies on a path between the joined."""
    return joined(len(problem.nodes), problem.order, problem.together)


def joined(
    count: int, order: Iterable[tuple[int, int]], together: Iterable[tuple[int, ...]]
) -> list[int]:
    """The same, of so many nodes."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(order)
    for nodes in together:
        graph.add_edges_from(zip(nodes, nodes[1:] + nodes[:1], strict=True))
    leader = list(range(count))
    for component in nx.strongly_connected_components(graph):
        for node in component:
            leader[node] = min(component)
    return leader
