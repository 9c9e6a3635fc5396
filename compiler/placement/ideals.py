"""Ideals: sets of groups that contain all their predecessors; a stage is the step between two.

A pipeline of d stages is a chain of ideals, empty = I0 < I1 < .. < Id = everything. All chains are
considered where the ideals are few enough to list (a transformer has about as many as groups);
otherwise those along a few topological orders.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from p2bw.compiler.placement.instance import PS, Instance, Numbers

MAX_IDEALS = 1600

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Ordered(Protocol):
    """Groups in a topological order."""

    @property
    def predecessors(self) -> tuple[tuple[int, ...], ...]: ...


@dataclass(frozen=True)
class Family:
    """Some ideals, by size; the first is empty and the last has all groups."""

    members: Flags  # ideal x group
    complete: bool  # these are all ideals there are

    @cached_property
    def pairs(self) -> tuple[Numbers, Numbers]:
        """Every two ideals of which the first is a part of the second, sorted by the first."""
        inside = self.members.astype(np.float32)
        subset = (inside @ (1 - inside).T) == 0
        np.fill_diagonal(subset, False)
        source, target = np.nonzero(subset)
        return source, target


def make_family(instance: Ordered, limit: int = MAX_IDEALS) -> Family:
    """All ideals, or those along a few topological orders where there are more than `limit`."""
    found = all_ideals(instance, limit)
    if found is None:
        return _family(instance, _along_orders(instance), False)
    return _family(instance, found, True)


def no_cuts(instance: Ordered) -> Family:
    """Nothing and everything: the one step of a single stage."""
    return _family(instance, {0, (1 << len(instance.predecessors)) - 1}, False)


def _family(instance: Ordered, found: set[int], complete: bool) -> Family:
    size = len(instance.predecessors)
    rows = sorted(found, key=lambda ideal: (ideal.bit_count(), ideal))
    packed = b"".join(ideal.to_bytes(size // 8 + 1, "little") for ideal in rows)
    bits = np.frombuffer(packed, np.uint8).reshape(len(rows), -1)
    members = np.unpackbits(bits, axis=1, count=size, bitorder="little").astype(bool)
    return Family(members, complete)


def all_ideals(instance: Ordered, limit: int) -> set[int] | None:
    """Breadth first, by adding one group whose predecessors are in; None beyond the limit."""
    needs = [sum(1 << p for p in found) for found in instance.predecessors]
    successors: list[list[int]] = [[] for _ in needs]
    for group, found in enumerate(instance.predecessors):
        for p in found:
            successors[p].append(group)
    start = frozenset(group for group, need in enumerate(needs) if need == 0)
    ready = {0: start}
    seen = {0}
    while ready:
        following: dict[int, frozenset[int]] = {}
        for ideal, addable in ready.items():
            for group in addable:
                larger = ideal | 1 << group
                if larger not in following:
                    new = [s for s in successors[group] if needs[s] & ~larger == 0]
                    following[larger] = (addable - {group}).union(new)
            if len(seen) + len(following) > limit:
                return None
        seen.update(following)
        ready = following
    return seen


def _along_orders(instance: Ordered) -> set[int]:
    """Prefixes of topological orders: as listed, depth first, and both from the back."""
    size = len(instance.predecessors)
    successors: list[list[int]] = [[] for _ in range(size)]
    for group, found in enumerate(instance.predecessors):
        for p in found:
            successors[p].append(group)
    forward = [list(found) for found in instance.predecessors]
    orders = [
        list(range(size)),
        _order(forward, lambda ready: ready[-1]),
        _order(forward, min),
        _order(successors, max)[::-1],
        _order(successors, lambda ready: ready[-1])[::-1],
    ]
    ideals = {0}
    for order in orders:
        ideal = 0
        for group in order:
            ideal |= 1 << group
            ideals.add(ideal)
    return ideals


def _order(needs: list[list[int]], pick: Callable[[list[int]], int]) -> list[int]:
    """A topological order; `pick` chooses among the groups that are ready, oldest first."""
    waiting = [len(set(found)) for found in needs]
    unlocks: list[list[int]] = [[] for _ in needs]
    for group, found in enumerate(needs):
        for p in set(found):
            unlocks[p].append(group)
    ready = [group for group, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        group = pick(ready)
        ready.remove(group)
        order.append(group)
        for following in unlocks[group]:
            waiting[following] -= 1
            if waiting[following] == 0:
                ready.append(following)
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Every possible stage: the groups between two ideals, and what is known of them alone.

    Arrays are indexed by step (last) and sorted by `source`. Sizes are whole numbers in floats,
    exact up to 2**53: numpy has no fast matrix product of integers.
    """

    family: Family
    source: Numbers
    target: Numbers
    forward_s: Floats  # kind of device x step, as the next two
    backward_s: Floats
    update_s: Floats
    weights: Floats
    frozen: Floats
    gradients: Floats
    optimizer: Floats
    stash: Floats
    buffers: Floats
    transient: Floats
    received: Floats  # bytes of tensors from before
    saved: Floats  # of those, what is kept for the backward
    received_gradient: Floats  # gradients that go back for them
    sent: Floats  # bytes of tensors made here and read later
    sent_gradient: Floats  # gradients that come back for those, from one reader each
    exchanged: Floats  # gradients of tied parameters that other stages hold as well
    pinned: Numbers  # the stage that it must be, or -1

    def where(self, mask: Flags) -> "Steps":
        """Only some of the steps."""
        kept = {
            field.name: getattr(self, field.name)[..., mask]
            for field in fields(self)
            if field.name != "family"
        }
        return replace(self, **kept)


def make_steps(instance: Instance, family: Family, longest_s: float | None = None) -> Steps:
    """Tabulate the steps between the ideals of a family.

    With `longest_s`, only those that no device is busy with for longer, as far as it can hold them.
    """
    members = family.members
    source, target = family.pairs
    if longest_s is not None:
        kept = _can_be(instance, members, source, target, longest_s)
        source, target = source[kept], target[kept]
    allowed, pinned = _allowed(instance, members, source, target)
    source, target, pinned = source[allowed], target[allowed], pinned[allowed]

    def added(values: Numbers) -> Floats:
        sums = (members @ values.T).astype(np.float64).T  # int64: exact
        result: Floats = sums[..., target] - sums[..., source]
        return result

    states = {
        field: added(getattr(instance, field))
        for field in ("weights", "frozen", "gradients", "optimizer", "update_ps")
    }
    exchanged = np.zeros(len(source))
    for tied in instance.tied:
        users = members[:, tied.groups].sum(axis=1)
        here = users[target] - users[source]
        for field, sizes in states.items():
            cost = np.array(getattr(tied.state, field))
            sizes += np.multiply.outer(cost, here > 0)
        exchanged += np.where((here > 0) & (here < len(tied.groups)), tied.state.gradients, 0)
    traffic = _traffic(instance, members, source, target)
    return Steps(
        family=family,
        source=source,
        target=target,
        forward_s=added(instance.forward_ps) / 1e12,
        backward_s=added(instance.backward_ps) / 1e12,
        update_s=states["update_ps"] / 1e12,
        weights=states["weights"],
        frozen=states["frozen"],
        gradients=states["gradients"],
        optimizer=states["optimizer"],
        stash=added(instance.stash),
        buffers=added(instance.buffers),
        transient=_largest(instance.transient, members, source, target),
        received=traffic[0],
        saved=traffic[1],
        received_gradient=traffic[2],
        sent=traffic[3],
        sent_gradient=traffic[4],
        exchanged=exchanged,
        pinned=pinned,
    )


def _can_be(
    instance: Instance, members: Flags, source: Numbers, target: Numbers, longest_s: float
) -> Flags:
    """Which steps take no longer on some kind of device, and fit into one, by what just adds up."""
    time = members @ (instance.forward_ps + instance.backward_ps).min(axis=0)
    state = instance.held(instance.versions(1), instance.gradient_copies())
    size = members @ (state + instance.buffers + instance.stash)
    room = max(map(instance.room, range(len(instance.forward_ps))))
    found: Flags = time[target] - time[source] <= longest_s * PS * (1 + 1e-9)
    found &= size[target] - size[source] <= room
    return found


def _allowed(
    instance: Instance, members: Flags, source: Numbers, target: Numbers
) -> tuple[Flags, Numbers]:
    """Which steps the user's constraints leave, and the stage that each is pinned to (or -1)."""

    def within(group: int) -> Flags:
        column = members[:, group]
        found: Flags = column[target] & ~column[source]
        return found

    allowed = np.ones(len(source), bool)
    pinned = np.full(len(source), -1)
    for group, stage in sorted(instance.pin.items()):
        here = within(group)
        allowed &= ~(here & (pinned >= 0) & (pinned != stage))
        pinned[here] = stage
    for first, second in instance.apart:
        allowed &= ~(within(first) & within(second))
    return allowed, pinned


def _largest(values: Numbers, members: Flags, source: Numbers, target: Numbers) -> Floats:
    """The largest value among the groups of each step, by bisection over the sorted values."""
    ranks = np.unique(values)
    at_least = np.stack([members[:, values >= value].sum(axis=1) for value in ranks])
    low = np.zeros(len(source), np.int64)
    high = np.full(len(source), len(ranks) - 1)
    while np.any(low < high):
        middle = (low + high + 1) // 2
        some = at_least[middle, target] > at_least[middle, source]
        low = np.where(some, middle, low)
        high = np.where(some, high, middle - 1)
    result: Floats = ranks[low].astype(np.float64)
    return result


def _traffic(
    instance: Instance, members: Flags, source: Numbers, target: Numbers
) -> tuple[Floats, ...]:
    """received, saved, received_gradient, sent, sent_gradient of each step.

    A tensor is live at an ideal that has its producer and lacks a reader. A step receives the
    tensors live at its source that it reads, and sends those live at its target that were not
    live at its source.
    """
    edges = instance.edges
    result = np.zeros((5, len(source)))
    if not edges:
        return tuple(result)
    made = members[:, [edge.producer for edge in edges]]
    read = np.stack([members[:, edge.consumers].sum(axis=1) for edge in edges], axis=1)
    live = made & (read < np.array([len(edge.consumers) for edge in edges]))
    sizes = np.array(
        [[edge.bytes, edge.bytes * edge.saved, edge.gradient] for edge in edges], np.float64
    ).T
    outgoing = live @ sizes[[0, 2]].T  # ideal x (bytes, gradients)
    first = np.searchsorted(source, np.arange(len(members) + 1))
    for ideal in range(len(members) - 1):
        step = slice(first[ideal], first[ideal + 1])
        after = target[step]
        result[3:, step] = outgoing[after].T
        here = np.flatnonzero(live[ideal])
        if len(here) and len(after):
            reads = read[np.ix_(after, here)] > read[ideal, here]
            result[:3, step] = sizes[:, here] @ reads.T
            result[3:, step] -= sizes[[0, 2]][:, here] @ live[np.ix_(after, here)].T
    return tuple(result)


def chain_to_stages(family: Family, chain: Iterable[int]) -> tuple[int, ...]:
    """Stage of each group, from the ideals after stage 0, 1, .."""
    rows = family.members[list(chain)]
    stages: tuple[int, ...] = tuple((~rows).sum(axis=0).tolist())
    return stages
