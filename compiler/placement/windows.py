"""What a bound on the period says, before any search, of where groups and tensors can be."""

import math

import numpy as np

from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.instance import PS, Instance

TOLERANCE = 1e-6  # periods that differ by less, relatively, are equal


def horizon_s(instance: Instance) -> float:
    """More seconds than any placement is busy for."""
    compute = 2 * instance.forward_ps + instance.backward_ps + instance.update_ps
    seconds = float(compute.sum() + sum(sum(tied.state.update_ps) for tied in instance.tied)) / PS
    moved = sum((edge.bytes + edge.gradient) * len(edge.consumers) for edge in instance.edges)
    moved += 2 * int(instance.gradients.sum())
    moved += sum(2 * tied.state.gradients * (1 + len(tied.groups)) for tied in instance.tied)
    return seconds + moved * instance.problem.topology.gpus / instance.network.slowest or 1.0


def stage_windows(
    instance: Instance, depth: int, recompute: Recompute, upper_s: float
) -> list[tuple[int, int]]:
    """First and last possible stage of each group, if no stage may be busy beyond `upper_s`.

    All that a group depends on fits in the stages up to its own, and likewise to the other side.
    """
    again = recompute == "always"
    times = instance.forward_ps * (2 if again else 1) + instance.backward_ps
    work_ps = times.min(axis=0)
    above = np.eye(instance.size, dtype=bool)
    for group, found in enumerate(instance.predecessors):
        for p in found:
            above[group] |= above[p]
    windows = []
    for group in range(instance.size):
        before = _stages_for(int(work_ps[above[group]].sum()) / PS, upper_s)
        after = _stages_for(int(work_ps[above[:, group]].sum()) / PS, upper_s)
        first, last = before - 1, depth - after
        if group in instance.pin:
            first, last = max(first, instance.pin[group]), min(last, instance.pin[group])
        windows.append((first, last))
    return windows


def _stages_for(work_s: float, upper_s: float) -> int:
    if upper_s == 0:
        return 1
    return max(1, math.ceil(work_s / upper_s * (1 - TOLERANCE)))


def routes_of(instance: Instance, windows: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """For each tensor, the pairs of stages that it may go between."""
    return [
        [
            (j, k)
            for j in stages_in(windows[edge.producer])
            for k in sorted({k for c in edge.consumers for k in stages_in(windows[c])})
            if j < k
        ]
        for edge in instance.edges
    ]


def stages_in(window: tuple[int, int]) -> range:
    return range(window[0], window[1] + 1)


def reduction(predecessors: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    """The edges that no longer path implies; predecessors come before a group."""
    above: list[int] = []
    edges = []
    for v, found in enumerate(predecessors):
        seen = 0
        for u in sorted(found, reverse=True):
            if not seen >> u & 1:
                edges.append((u, v))
            seen |= above[u]
        above.append(seen | 1 << v)
    return edges
