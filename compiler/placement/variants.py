"""VariantProblem: a graph whose nodes can run in several ways, on a pipeline of replicated stages.

A variant of a node (with or without recomputation, say) has its own time and memory; there are
variants for each degree of tensor parallelism. A stage has d replicas of t devices each, and

    load   = (times of its nodes' variants
              + 2 (bytes + sync) / bandwidth of each edge that enters or leaves it) / d
             + 4 (d - 1) / d * parameters / (microbatches * bandwidth)
    memory = sum of (per_microbatch * in flight + fixed) of its nodes' variants
    in flight = ceil(replicas of this stage and of all after it / d)

This is the model of Piper (NeurIPS 2021): the parameters are exchanged once per batch, every edge
is paid for, even where two carry one tensor, and nothing overlaps. Units are those of the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run a node, on one device of those that share it; sizes in bytes."""

    name: str
    time: float  # of a microbatch, forward and backward
    parameters: float  # exchanged between replicas
    per_microbatch: float  # held for each microbatch in flight
    fixed: float  # held besides


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantNode:
    """A node and its variants by degree of tensor parallelism."""

    name: str
    variants: Mapping[int, tuple[Variant, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Bytes from one node to another; tensor parallelism adds some, by degree of each end."""

    source: int
    target: int
    bytes: float
    sync_source: Mapping[int, float]
    sync_target: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantProblem:
    """Nodes with variants, edges, and the devices that the file offers."""

    nodes: tuple[VariantNode, ...]
    edges: tuple[Edge, ...]
    memory: float  # of a device
    devices: int
    microbatches: int  # in a batch
    bandwidth: float
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantStage:
    """A stage: its nodes with the variant of each, on `replicas` times `degree` devices."""

    nodes: tuple[int, ...]
    variants: tuple[Variant, ...]
    replicas: int
    degree: int


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage is busy for per microbatch, and what each of its devices holds."""

    load: float
    memory: float


def judge_stages(problem: VariantProblem, stages: Sequence[VariantStage]) -> tuple[StageCost, ...]:
    """The exact cost of each stage, by the definition alone."""
    costs = []
    left = sum(stage.replicas for stage in stages)
    for stage in stages:
        inside = set(stage.nodes)
        moved = []
        for edge in problem.edges:
            if edge.source in inside and edge.target not in inside:
                moved.append(2 * (edge.bytes + edge.sync_source[stage.degree]))
            if edge.target in inside and edge.source not in inside:
                moved.append(2 * (edge.bytes + edge.sync_target[stage.degree]))
        exchanged = math.fsum(variant.parameters for variant in stage.variants)
        exchanged *= 4 * (stage.replicas - 1) / problem.microbatches
        busy = math.fsum(variant.time for variant in stage.variants)
        busy += (math.fsum(moved) + exchanged) / problem.bandwidth
        in_flight = -(-left // stage.replicas)
        memory = math.fsum(v.per_microbatch * in_flight + v.fixed for v in stage.variants)
        costs.append(StageCost(busy / stage.replicas, memory))
        left -= stage.replicas
    return tuple(costs)
