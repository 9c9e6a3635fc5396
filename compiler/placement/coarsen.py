"""coarsen: fewer, larger groups. Every placement of them is one of the finer groups as well.

Groups merge where a cut would be costly, as long as they stay small. Around the cuts of a placement
they are taken apart again, so that a search that starts from it can move the cuts a little.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from p2bw.compiler.placement.contraction import Contraction
from p2bw.compiler.placement.ideals import all_ideals
from p2bw.compiler.placement.instance import Instance, Numbers, make_instance

GRANULARITY = 192  # a coarse group has at most so small a share of the time and of the parameters,
MAX_GROUPS = 400  # or more of it where there would be more groups than this
COARSEST = 32  # granularity below which fewer ideals are not worth it

Sets = tuple[tuple[int, ...], ...]  # groups of an instance, by the coarse group that they are in


def coarsen(instance: Instance, ideals: int) -> Sets:
    """Sets of groups, small and without a cycle between them; what is pinned stays alone.

    As small as possible with at most `ideals` ideals, if sets that are still useful have so few.
    """
    alone = {*instance.pin, *chain.from_iterable(instance.apart)}
    contraction = Contraction(_sizes(instance), _cuts(instance), alone)
    first: Sets = ()
    granularity = float(GRANULARITY)
    while True:
        contraction.run(1 / granularity)
        if contraction.count <= MAX_GROUPS or granularity < 1:
            sets = tuple(contraction.joined.groups())
            first = first or sets
            if all_ideals(_Quotient.of(instance, sets), ideals) is not None:
                return sets
            if granularity < COARSEST:
                return first
        granularity /= 1.5


@dataclass(frozen=True, slots=True)
class _Quotient:
    """The order of the sets."""

    predecessors: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(instance: Instance, sets: Sets) -> "_Quotient":
        home = {group: i for i, members in enumerate(sets) for group in members}
        before: list[set[int]] = [set() for _ in sets]
        for group, found in enumerate(instance.predecessors):
            before[home[group]].update(home[p] for p in found)
        return _Quotient(tuple(tuple(sorted(found - {own})) for own, found in enumerate(before)))


def merged(instance: Instance, sets: Sets) -> Instance:
    """The instance with each set of its groups as one."""
    together = [tuple(chain.from_iterable(instance.groups[g] for g in found)) for found in sets]
    return make_instance(instance.problem, together)


def finer_stages(fine: Instance, coarse: Instance, stages: Sequence[int]) -> tuple[int, ...]:
    """The stage of each group of `fine`, from those of the groups of `coarse`."""
    home = {
        block: stage
        for blocks, stage in zip(coarse.groups, stages, strict=True)
        for block in blocks
    }
    return tuple(home[blocks[0]] for blocks in fine.groups)


def finer_edges(fine: Instance, coarse: Instance, some: Collection[int]) -> frozenset[int]:
    """The edges of `fine` that are one of some edges of `coarse`."""
    home = {block: group for group, blocks in enumerate(coarse.groups) for block in blocks}
    of = [home[blocks[0]] for blocks in fine.groups]
    ends = {(e.producer, e.consumers, e.saved) for e in (coarse.edges[i] for i in some)}
    return frozenset(
        i
        for i, edge in enumerate(fine.edges)
        if (
            of[edge.producer],
            tuple(sorted({of[c] for c in edge.consumers} - {of[edge.producer]})),
            edge.saved,
        )
        in ends
    )


def taken_apart(sets: Sets, far: Numbers, reach: float) -> Sets:
    """The sets, those dissolved that have a group less than `reach` from a cut."""
    found: list[tuple[int, ...]] = []
    for members in sets:
        near = bool((far[list(members)] < reach).any())
        found += [(group,) for group in members] if near else [members]
    return tuple(found)


def far_in_order(instance: Instance, stages: Sequence[int]) -> Numbers:
    """How much work (ps) lies in the order of the groups between each and the nearest cut."""
    work = work_ps(instance)
    end = np.cumsum(work)
    of_stage = np.zeros(max(stages) + 1, np.int64)
    np.add.at(of_stage, list(stages), work)
    far = np.full(instance.size, end[-1])
    for cut in np.cumsum(of_stage)[:-1]:
        far = np.minimum(far, np.maximum(np.maximum(cut - end, end - work - cut), 0))
    return far


def far_by_edges(instance: Instance, stages: Sequence[int]) -> Numbers:
    """How much work (ps) lies on the shortest path from each group to an edge that is cut."""
    work = work_ps(instance).tolist()
    far = [int(sum(work))] * instance.size
    edges = [(u, v) for v, found in enumerate(instance.predecessors) for u in found]
    for u, v in edges:
        if stages[u] != stages[v]:
            far[u] = far[v] = 0
    for u, v in edges:  # by v: forwards
        if stages[u] == stages[v]:
            far[v] = min(far[v], far[u] + work[u])
    for u, v in sorted(edges, reverse=True):  # by u: backwards
        if stages[u] == stages[v]:
            far[u] = min(far[u], far[v] + work[v])
    return np.array(far, np.int64)


def work_ps(instance: Instance) -> Numbers:
    """Time of each group on the kind of device that is best for it."""
    result: Numbers = (instance.forward_ps + instance.backward_ps).min(axis=0)
    return result


def _sizes(instance: Instance) -> list[tuple[float, ...]]:
    """Each group's share of the time and of the parameters' bytes (tied ones: its first user)."""
    weights = instance.weights + instance.frozen
    for tied in instance.tied:
        weights[tied.groups[0]] += tied.state.weights + tied.state.frozen
    work = work_ps(instance)
    return [
        (int(time) / (int(work.sum()) or 1), int(size) / (int(weights.sum()) or 1))
        for time, size in zip(work, weights, strict=True)
    ]


def _cuts(instance: Instance) -> dict[tuple[int, int], int]:
    """Per edge: the bytes alive, in the order of the groups, where it would be cut."""
    change = [0] * (instance.size + 1)
    for edge in instance.edges:
        change[edge.producer] += edge.bytes + edge.gradient
        change[max(edge.consumers)] -= edge.bytes + edge.gradient
    alive = np.cumsum(change).tolist()
    return {
        (edge.producer, consumer): min(alive[edge.producer], alive[consumer - 1])
        for edge in instance.edges
        for consumer in edge.consumers
    }
