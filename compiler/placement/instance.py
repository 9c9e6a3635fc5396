"""Instance: a PlacementProblem as arrays over groups of blocks, in a topological order.

Times are whole picoseconds and sizes whole bytes, so that sums are exact, in any order, on every
machine: a plan must not depend on how a library adds.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from p2bw.compiler.devices import Device
from p2bw.compiler.links import Network
from p2bw.compiler.plan import Schedule
from p2bw.compiler.problem import ParameterCost, PlacementProblem, TensorCost
from p2bw.contract.errors import InfeasibleError
from p2bw.contract.schedule import updates_late

PS = 10**12  # picoseconds in a second

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class State:
    """What holding parameters costs a stage."""

    weights: int  # one version
    frozen: int  # weights that never change
    gradients: int  # one set
    optimizer: int
    update_ps: tuple[int, ...]  # by kind of device

    def bytes(self, versions: int, gradients: int) -> int:
        """With so many versions of the weights and sets of gradients."""
        return versions * self.weights + self.frozen + gradients * self.gradients + self.optimizer


@dataclass(frozen=True, slots=True)
class Tied:
    """Parameters that the same several groups use."""

    groups: tuple[int, ...]
    state: State


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor between groups."""

    producer: int
    consumers: tuple[int, ...]
    bytes: int
    gradient: int
    saved: bool
    names: tuple[str, ...]
    ordered: bool = False  # see TensorCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What one microbatch costs in each group; arrays are indexed by group.

    Times have a row for each kind of device (`Topology.kinds`).
    """

    problem: PlacementProblem
    network: Network
    kinds: tuple[int, ...]  # of each rank
    groups: tuple[tuple[int, ...], ...]  # block numbers
    forward_ps: Numbers  # kind x group
    backward_ps: Numbers  # kind x group
    stash: Numbers
    transient: Numbers
    buffers: Numbers
    weights: Numbers  # weights .. update_ps: of the parameters that no other group uses
    frozen: Numbers
    gradients: Numbers
    optimizer: Numbers
    update_ps: Numbers  # kind x group
    tied: tuple[Tied, ...]
    edges: tuple[Edge, ...]
    predecessors: tuple[tuple[int, ...], ...]
    pin: dict[int, int]
    apart: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return len(self.groups)

    def device(self, kind: int) -> Device:
        return self.problem.topology.kinds[kind]

    @property
    def roomiest(self) -> Device:
        """The kind of device that has the most room."""
        kinds = self.problem.topology.kinds
        return max(kinds, key=lambda device: device.memory_bytes - device.reserve_bytes)

    @property
    def reserve(self) -> int:
        return self.roomiest.reserve_bytes

    @property
    def limit(self) -> int:
        return self.roomiest.memory_bytes

    def room(self, kind: int) -> int:
        """Bytes of a device that a stage can have."""
        return self.device(kind).memory_bytes - self.device(kind).reserve_bytes

    def name(self, group: int) -> str:
        """The names of a group's blocks, for messages."""
        names = [self.problem.blocks[block].name for block in self.groups[group]]
        return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"

    def in_flight(self, stage: int, depth: int) -> int:
        """Microbatches between their forward and their backward at a stage (DESIGN, costs)."""
        return in_flight(self.problem.schedule, stage, depth, self.problem.microbatches_at(depth))

    def versions(self, in_flight: int, depth: int | None = None) -> int:
        """Weight versions that a stage keeps; the fewest that it could be, if no depth is given."""
        match self.problem.schedule:
            case "2bw":
                return 2
            case "stash":  # those of the microbatches in flight, m of which have the same
                m = self.problem.microbatches_at(depth or in_flight + self.size)
                return -(-(in_flight - 1) // m) + 1
            case _:
                return 1

    def gradient_copies(self, width: int = 1) -> int:
        """Sets of gradients that a stage keeps: two where updates are late."""
        schedule, clipped = self.problem.schedule, self.problem.clip_norm is not None
        return 2 if updates_late(schedule, replicated=width > 1, clipped=clipped) else 1

    def held(self, versions: int, gradients: int) -> Numbers:
        """Bytes of each group's own parameters, as `State.bytes` counts them."""
        return versions * self.weights + self.frozen + gradients * self.gradients + self.optimizer

    def bubble(self, depth: int) -> float:
        """Mean time per microbatch over the busiest stage's: the price of a flush per update."""
        return self.slots(depth) / self.problem.microbatches_at(depth)

    @property
    def drains(self) -> bool:
        """Whether the pipeline is empty before each update."""
        return self.problem.schedule in ("flush", "gpipe")

    def slots(self, depth: int) -> int:
        """How many microbatches' time an update takes, with what it takes to fill and to drain."""
        return self.problem.microbatches_at(depth) + (depth - 1 if self.drains else 0)

    def exposed(self, k: int, depth: int, width: int) -> int | None:
        """How many microbatches stage k computes from an update to the end of the next batch, whose
        gradients are summed up over the replicas then; None: that never makes a batch longer.

        In a flush these are all, and the stages before k hide as many slots as they are. Under 2bw
        they are those in flight; the last stage has none, and computes a batch while the one before
        is summed up.
        """
        m, ahead = self.problem.microbatches_at(depth), depth - 1 - k
        if self.drains:
            return self.slots(depth) - k
        if width == 1:
            return None
        if self.problem.schedule == "stash":
            return m
        return ahead or None

    def blocks_to_stages(self, stages: Iterable[int]) -> dict[str, int]:
        """Stage of every block by name, in the problem's order, from the stage of every group."""
        found = {
            block: stage
            for members, stage in zip(self.groups, stages, strict=True)
            for block in members
        }
        return {block.name: found[i] for i, block in enumerate(self.problem.blocks)}


def in_flight(schedule: Schedule, stage: int, depth: int, microbatches: int) -> int:
    """Microbatches between their forward and their backward at a stage."""
    match schedule:
        case "gpipe":
            return microbatches
        case "flush":
            return min(depth - stage, microbatches)
        case _:
            return depth - stage


def make_instance(problem: PlacementProblem, together: Iterable[Sequence[int]] = ()) -> Instance:
    """Contract the blocks that must share a stage and put the groups in a topological order.

    `together`: numbers of blocks to contract besides those that the problem's constraints name.
    """
    number = {block.name: i for i, block in enumerate(problem.blocks)}
    together = [*_together(problem, number), *(found for found in together if len(found) > 1)]
    edges: dict[int, set[int]] = {i: set() for i in range(len(number))}
    for tensor in problem.tensors:
        for consumer in tensor.consumers:
            edges[number[tensor.producer]].add(number[consumer])
    leader = _contract(edges, together)
    order = _topological(edges, leader)
    place = {first: group for group, first in enumerate(order)}
    group_of = [place[own] for own in leader]
    members: list[list[int]] = [[] for _ in order]
    for block, group in enumerate(group_of):
        members[group].append(block)
    groups = tuple(map(tuple, members))

    def total(values: list[int]) -> Numbers:
        sums = np.zeros(len(groups), np.int64)
        np.add.at(sums, group_of, values)
        return sums

    transient = np.zeros(len(groups), np.int64)
    np.maximum.at(transient, group_of, [block.transient_bytes for block in problem.blocks])
    kinds = [device.name for device in problem.topology.kinds]
    forward, backward = _times(problem, kinds)
    own, update_ps, tied = _parameters(problem.parameters, number, group_of, kinds)
    inner = _edges(problem, number, group_of)
    predecessors: list[set[int]] = [set() for _ in groups]
    for edge in inner:
        for group in edge.consumers:
            predecessors[group].add(edge.producer)
    pin, apart = _pinned(problem, number, group_of)
    return Instance(
        problem=problem,
        network=Network(problem.topology),
        kinds=tuple(kinds.index(device.name) for device in problem.topology.devices),
        groups=groups,
        forward_ps=np.stack([total(row) for row in forward]),
        backward_ps=np.stack([total(row) for row in backward]),
        stash=total([block.stash_bytes for block in problem.blocks]),
        buffers=total([block.buffer_bytes for block in problem.blocks]),
        transient=transient,
        weights=own[0],
        frozen=own[1],
        gradients=own[2],
        optimizer=own[3],
        update_ps=update_ps,
        tied=tied,
        edges=inner,
        predecessors=tuple(tuple(sorted(found)) for found in predecessors),
        pin=pin,
        apart=apart,
    )


def _together(problem: PlacementProblem, number: dict[str, int]) -> list[list[int]]:
    sets = [[number[name] for name in names] for names in problem.constraints.together]
    uncut = set(problem.constraints.never_cut)
    sets += [
        [number[name] for name in (tensor.producer, *tensor.consumers)]
        for tensor in problem.tensors
        if tensor.name in uncut
    ]
    if problem.schedule == "stash":  # stages on different versions can share no parameter
        sets += [[number[name] for name in parameter.blocks] for parameter in problem.parameters]
    return [found for found in sets if len(set(found)) > 1]


def _contract(edges: dict[int, set[int]], together: Sequence[Sequence[int]]) -> list[int]:
    """The first block of each block's group.

    What lies on a path between two blocks of one stage must be there as well: the groups are the
    strongly connected components of the graph with those blocks joined both ways.
    """
    if not together:
        return list(edges)
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(edges)
    graph.add_edges_from((u, v) for u, found in edges.items() for v in found)
    for blocks in together:
        graph.add_edges_from(zip(blocks, (*blocks[1:], blocks[0]), strict=True))
    leader = list(edges)
    for component in nx.strongly_connected_components(graph):
        for block in component:
            leader[block] = min(component)
    return leader


def _topological(edges: dict[int, set[int]], leader: list[int]) -> list[int]:
    """The leaders, as close to the order of the blocks as their edges allow."""
    successors: dict[int, set[int]] = {own: set() for own in leader}
    for u, found in edges.items():
        successors[leader[u]].update(leader[v] for v in found if leader[v] != leader[u])
    waiting = dict.fromkeys(successors, 0)
    for found in successors.values():
        for v in found:
            waiting[v] += 1
    ready = [own for own, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for v in successors[order[-1]]:
            waiting[v] -= 1
            if waiting[v] == 0:
                heapq.heappush(ready, v)
    assert len(order) == len(successors), "the groups form a cycle"
    return order


def _times(problem: PlacementProblem, kinds: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Picoseconds forward and backward: kind x block."""
    rows = [[block.on.get(kind, block) for block in problem.blocks] for kind in kinds]
    return (
        [[round(times.forward_s * PS) for times in row] for row in rows],
        [[round(times.backward_s * PS) for times in row] for row in rows],
    )


def _parameters(
    parameters: tuple[ParameterCost, ...],
    number: dict[str, int],
    group_of: list[int],
    kinds: list[str],
) -> tuple[Numbers, Numbers, tuple[Tied, ...]]:
    """Rows weights to optimizer of each group's own; updates by kind; the tied ones."""
    own = np.zeros((4 + len(kinds), max(group_of) + 1), np.int64)
    tied: dict[tuple[int, ...], list[int]] = {}
    for parameter in parameters:
        users = tuple(sorted({group_of[number[name]] for name in parameter.blocks}))
        trained = parameter.gradient_bytes > 0
        costs = [
            parameter.bytes if trained else 0,
            0 if trained else parameter.bytes,
            parameter.gradient_bytes,
            parameter.optimizer_bytes,
            *(round(parameter.on.get(kind, parameter.update_s) * PS) for kind in kinds),
        ]
        if len(users) == 1:
            own[:, users[0]] += costs
        else:
            known = tied.setdefault(users, [0] * len(costs))
            tied[users] = [a + b for a, b in zip(known, costs, strict=True)]
    states = tuple(
        Tied(users, State(weights, frozen, gradients, optimizer, tuple(update_ps)))
        for users, (weights, frozen, gradients, optimizer, *update_ps) in sorted(tied.items())
    )
    return own[:4], own[4:], states


def _edges(
    problem: PlacementProblem, number: dict[str, int], group_of: list[int]
) -> tuple[Edge, ...]:
    """The tensors between groups; those with the same ends and kind count as one."""
    found: dict[tuple[int, tuple[int, ...], bool], list[TensorCost]] = {}
    for tensor in problem.tensors:
        producer = group_of[number[tensor.producer]]
        readers = {group_of[number[name]] for name in tensor.consumers} - {producer}
        if readers:
            ends = producer, tuple(sorted(readers)), tensor.saved
            found.setdefault(ends, []).append(tensor)
    return tuple(
        Edge(
            producer,
            consumers,
            sum(tensor.bytes for tensor in tensors),
            sum(tensor.gradient_bytes for tensor in tensors),
            saved,
            tuple(tensor.name for tensor in tensors),
            any(tensor.ordered for tensor in tensors),
        )
        for (producer, consumers, saved), tensors in sorted(
            found.items(), key=lambda entry: entry[0]
        )
    )


def _pinned(
    problem: PlacementProblem, number: dict[str, int], group_of: list[int]
) -> tuple[dict[int, int], tuple[tuple[int, int], ...]]:
    pin: dict[int, int] = {}
    for name, stage in problem.constraints.pin.items():
        group = group_of[number[name]]
        if pin.setdefault(group, stage) != stage:
            raise InfeasibleError(
                f"block {name} is pinned to stage {stage}, and a block that shares its stage to "
                f"{pin[group]}; drop one of the two"
            )
    apart, stash = [], problem.schedule == "stash"
    for first, second in problem.constraints.apart:
        pair = sorted((group_of[number[first]], group_of[number[second]]))
        if pair[0] == pair[1]:
            raise InfeasibleError(
                f"blocks {first} and {second} must be apart, but together or never_cut"
                f"{', or a parameter that is used in several (under stash),' * stash} joins them"
            )
        apart.append((pair[0], pair[1]))
    return pin, tuple(sorted(set(apart)))
