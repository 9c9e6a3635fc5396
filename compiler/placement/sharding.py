"""tabulate: a VariantProblem in whole steps of time and memory, by degree of tensor parallelism.

Sums of steps are exact in floats, so that a plan does not depend on how a machine adds.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
import numpy as np

from p2bw.compiler.placement.contract import BITS
from p2bw.compiler.placement.ideals import Floats
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.knapsack import Option
from p2bw.compiler.placement.variants import Variant, VariantProblem
from p2bw.contract.errors import InfeasibleError

AMPLE = 2**52  # more than any sum of steps


@dataclass(frozen=True, slots=True)
class Cost:
    """What a variant costs: each replica but one adds `exchange` to the `time`."""

    time: int
    exchange: int
    per_microbatch: int
    fixed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Stages of one degree: the variants of each node, and what an edge costs at its ends."""

    degree: int
    variants: tuple[tuple[Cost, ...], ...]  # by node; none: it cannot be in such a stage
    sent: Floats  # by edge
    received: Floats

    def options(self, node: int, replicas: int, in_flight: int) -> list[Option]:
        """Time of all replicas together, and size on each."""
        return [
            Option(
                cost.time + (replicas - 1) * cost.exchange,
                cost.per_microbatch * in_flight + cost.fixed,
                place,
            )
            for place, cost in enumerate(self.variants[node])
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Nodes in a topological order, and what they cost.

    `work`, `room`, `sent` and `received` are the least that a node or an edge can cost, summed
    over the devices of a replica.
    """

    order: tuple[int, ...]  # nodes of the problem
    predecessors: tuple[tuple[int, ...], ...]
    sources: Numbers  # of edges
    targets: Numbers
    shardings: tuple[Sharding, ...]
    work: Floats
    room: Floats
    sent: Floats
    received: Floats
    devices: int  # as many as can be used
    replicas: tuple[int, ...]  # that a stage may have
    most_replicas: int  # of all stages
    capacity: int
    steps: float  # in one unit of time
    units: float  # in one byte


def tabulate(problem: VariantProblem, devices: int, *, replicated: bool) -> Tables:
    """The tables of a problem; without `replicated`, of stages that have one device."""
    degrees = sorted({d for node in problem.nodes for d in node.variants if d <= devices})
    degrees = [d for d in degrees if replicated or d == 1]
    _check_degrees(problem, degrees, devices)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(problem.nodes)))
    graph.add_edges_from((edge.source, edge.target) for edge in problem.edges)
    order = list(nx.lexicographical_topological_sort(graph))
    number = {node: place for place, node in enumerate(order)}
    if not replicated:
        devices = min(devices, len(problem.nodes))
    most = min(devices, problem.microbatches)
    devices = min(devices, most * max(degrees))
    steps, units = _scales(problem, most)
    shardings = tuple(_sharding(problem, order, degree, steps, units) for degree in degrees)
    limit = problem.memory * units
    divisors = (d for d in range(1, most + 1) if problem.microbatches % d == 0)
    return Tables(
        order=tuple(order),
        predecessors=tuple(tuple(sorted(number[u] for u in graph.pred[v])) for v in order),
        sources=np.array([number[edge.source] for edge in problem.edges], np.int64),
        targets=np.array([number[edge.target] for edge in problem.edges], np.int64),
        shardings=shardings,
        work=_least(shardings, lambda cost: cost.time),
        room=_least(shardings, lambda cost: cost.per_microbatch + cost.fixed),
        sent=np.min([own.degree * own.sent for own in shardings], axis=0),
        received=np.min([own.degree * own.received for own in shardings], axis=0),
        devices=devices,
        replicas=tuple(divisors) if replicated else (1,),
        most_replicas=most,
        capacity=int(limit) if limit < AMPLE else AMPLE,
        steps=steps,
        units=units,
    )


def _check_degrees(problem: VariantProblem, degrees: list[int], devices: int) -> None:
    for node in problem.nodes:
        if not node.variants.keys() & set(degrees):
            least = min(node.variants)
            cure = "offer more (--stages)" if least > devices else "try --replication per-stage"
            raise InfeasibleError(
                f"node {node.name} needs {least} devices, and a stage can have no more than "
                f"{max(degrees, default=1)}; {cure}"
            )


def _scales(problem: VariantProblem, most: int) -> tuple[float, float]:
    """Steps in a unit of time, and in a byte; powers of two, to round nothing but last bits."""

    def largest(cost: Callable[[Variant], float]) -> Iterable[float]:
        for node in problem.nodes:
            yield max(d * cost(v) for d, own in node.variants.items() for v in own)

    times = list(largest(lambda v: v.time + most * _exchange(problem, v)))
    for edge in problem.edges:
        times += [d * _moved(problem, edge.bytes, s) for d, s in edge.sync_source.items()]
        times += [d * _moved(problem, edge.bytes, s) for d, s in edge.sync_target.items()]
    return _power(times), _power(largest(lambda v: most * v.per_microbatch + v.fixed))


def _power(values: Iterable[float]) -> float:
    total = math.fsum(values)
    return 2.0 ** (BITS - math.ceil(math.log2(total))) if total else 1.0


def _exchange(problem: VariantProblem, variant: Variant) -> float:
    return 4 * variant.parameters / (problem.microbatches * problem.bandwidth)


def _moved(problem: VariantProblem, size: float, sync: float) -> float:
    return 2 * (size + sync) / problem.bandwidth


def _sharding(
    problem: VariantProblem, order: list[int], degree: int, steps: float, units: float
) -> Sharding:
    def costs(variants: Iterable[Variant]) -> Iterable[Cost]:
        for v in variants:
            yield Cost(
                round(v.time * steps),
                round(_exchange(problem, v) * steps),
                round(v.per_microbatch * units),
                round(v.fixed * units),
            )

    def moved(sizes: Iterable[tuple[float, Mapping[int, float]]]) -> Floats:
        # An end that has no variant of this degree is never in such a stage.
        each = [round(_moved(problem, size, sync.get(degree, 0.0)) * steps) for size, sync in sizes]
        return np.array(each, np.float64)

    return Sharding(
        degree=degree,
        variants=tuple(tuple(costs(problem.nodes[v].variants.get(degree, ()))) for v in order),
        sent=moved((edge.bytes, edge.sync_source) for edge in problem.edges),
        received=moved((edge.bytes, edge.sync_target) for edge in problem.edges),
    )


def _least(shardings: tuple[Sharding, ...], cost: Callable[[Cost], int]) -> Floats:
    nodes = range(len(shardings[0].variants))
    return np.array(
        [min(s.degree * cost(own) for s in shardings for own in s.variants[v]) for v in nodes],
        np.float64,
    )
