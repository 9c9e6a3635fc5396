"""LoadProblem: nodes of any graph on a row of devices, the busiest of which is to be least busy.

    load of a device = its nodes' times + the cost of every tensor that enters or leaves it

The published device-placement problems are of this kind (see their reader); times and sizes are in
a file's own unit. A CPU takes `cpu_time` and pays neither for tensors nor for memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
    timed_on_cpu: bool = False  # `cpu_time` means something
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
    for node, k in zip(problem.nodes, place, strict=True):
        terms[k].append(node.cpu_time if kinds[k] == "cpu" else node.time)
        sizes[k].append(node.size)
    for transfer in problem.transfers:
        touched = {place[end] for end in transfer.ends}
        if len(touched) > 1:
            for k in touched:
                if kinds[k] == "accelerator":
                    terms[k].append(transfer.cost)
    devices = tuple(
        Device(kind, math.fsum(terms[k]), math.fsum(sizes[k])) for k, kind in enumerate(kinds)
    )
    return max(device.load for device in devices), devices
