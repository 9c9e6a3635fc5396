"""skeleton: a graph without the groups that make its ideals too many to list.

What is left out costs nothing and holds nothing, and what depends on it depends on what it depends
on. Every placement of the whole graph is one of the skeleton, in which some stages may be empty,
and takes no longer there: a bound on the skeleton bounds the whole.
"""

from dataclasses import replace

import numpy as np

from p2bw.compiler.placement.coarsen import work_ps
from p2bw.compiler.placement.ideals import MAX_IDEALS, all_ideals
from p2bw.compiler.placement.instance import Instance, Numbers, Tied


def skeleton(instance: Instance, ideals: int = MAX_IDEALS) -> Instance:
    """As much of the graph as has at most so many ideals.

    First go the groups with the least work for the freedom they have: the work that is neither
    before nor after them.
    """
    order = _by_worth(instance)
    fewest, most = 0, instance.size  # groups left out
    while fewest < most:
        count = (fewest + most) // 2
        if all_ideals(without(instance, order[:count]), ideals) is None:
            fewest = count + 1
        else:
            most = count
    return without(instance, order[:most])


def _by_worth(instance: Instance) -> list[int]:
    work = work_ps(instance)
    above = np.eye(instance.size, dtype=bool)
    for group, found in enumerate(instance.predecessors):
        for p in found:
            above[group] |= above[p]
    beside = int(work.sum()) - above @ work - above.T @ work + work
    worth = work / np.maximum(beside, 1)
    order: list[int] = np.argsort(worth, kind="stable").tolist()
    return order


def without(instance: Instance, left_out: list[int]) -> Instance:
    """The instance without some groups."""
    gone = set(left_out)
    kept = [group for group in range(instance.size) if group not in gone]
    number = {group: place for place, group in enumerate(kept)}
    before: list[int] = []  # by group: the kept groups that it depends on at once, as bits
    for found in instance.predecessors:
        before.append(0)
        for p in found:
            before[-1] |= 1 << number[p] if p in number else before[p]

    def some(values: Numbers) -> Numbers:
        result: Numbers = values[..., kept]
        return result

    edges = []
    for edge in instance.edges:
        readers = tuple(number[c] for c in edge.consumers if c in number)
        if readers and edge.producer in number:
            producer = number[edge.producer]
            edges.append(replace(edge, producer=producer, consumers=readers))
    tied = [
        Tied(tuple(number[g] for g in found.groups if g in number), found.state)
        for found in instance.tied
    ]
    return replace(
        instance,
        groups=tuple(instance.groups[group] for group in kept),
        forward_ps=some(instance.forward_ps),
        backward_ps=some(instance.backward_ps),
        stash=some(instance.stash),
        transient=some(instance.transient),
        buffers=some(instance.buffers),
        weights=some(instance.weights),
        frozen=some(instance.frozen),
        gradients=some(instance.gradients),
        optimizer=some(instance.optimizer),
        update_ps=some(instance.update_ps),
        tied=tuple(found for found in tied if found.groups),
        edges=tuple(edges),
        predecessors=tuple(_bits(before[group]) for group in kept),
        pin={number[g]: stage for g, stage in instance.pin.items() if g in number},
        apart=tuple(
            (number[a], number[b]) for a, b in instance.apart if a in number and b in number
        ),
    )


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)
