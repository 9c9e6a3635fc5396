"""Families of ideals, and what covers what in them.

An ideal covers another if it contains it and no third lies between. A best choice among all ideals
that contain an ideal is the best of what its covers have found: a look at each cover, and not at
each pair of ideals.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from p2bw.compiler.placement.contract import Cut
from p2bw.compiler.placement.ideals import Flags
from p2bw.compiler.placement.instance import Numbers


@dataclass(frozen=True, slots=True)
class Lattice:
    """Ideals in levels, from the empty to the full one; covers are of later levels."""

    members: Flags  # ideal x group
    starts: tuple[int, ...]  # of each level, and the end
    covers: tuple[Numbers, ...]  # by level: ideal x what covers it (the first again, to fill up)

    def sums(self, values: Numbers) -> Numbers:
        """Of the groups in each ideal; exact."""
        groups = np.arange(self.members.shape[1])
        found = np.zeros(len(self.members), np.int64)
        for some in np.array_split(groups, max(1, len(groups) // 16)):
            found += self.members[:, some] @ values[some]
        return found

    def crossing(self, cuts: Sequence[Cut]) -> Numbers:
        """Cost of the tensors that some group inside an ideal and some outside take part in."""
        total = np.zeros(len(self.members), np.int64)
        for ends, cost in cuts:
            inside = self.members[:, ends]
            total += cost * (inside.any(axis=1) & ~inside.all(axis=1))
        return total


def all_ideals(predecessors: Sequence[Sequence[int]], limit: int) -> Lattice | None:
    """Breadth first, by adding one group whose predecessors are in; None beyond the limit."""
    needs = [sum(1 << p for p in found) for found in predecessors]
    successors: list[list[int]] = [[] for _ in needs]
    for group, found in enumerate(predecessors):
        for p in found:
            successors[p].append(group)
    level = {0: frozenset(group for group, need in enumerate(needs) if not need)}
    ideals = [0]
    starts = [0]
    covers: list[Numbers] = []
    while True:
        following: dict[int, frozenset[int]] = {}
        places: dict[int, int] = {}
        flat: list[int] = []
        for ideal, addable in level.items():
            for group in sorted(addable):
                larger = ideal | 1 << group
                if larger not in following:
                    new = [s for s in successors[group] if needs[s] & ~larger == 0]
                    following[larger] = (addable - {group}).union(new)
                    places[larger] = len(ideals) + len(places)
                flat.append(places[larger])
        starts.append(len(ideals))
        if not following:
            break
        if len(ideals) + len(following) > limit:
            return None
        covers.append(_pad(flat, [len(addable) for addable in level.values()]))
        ideals += following
        level = following
    return Lattice(_unpack(ideals, len(needs)), tuple(starts), tuple(covers))


def some_ideals(ideals: Iterable[int], size: int) -> Lattice:
    """A family of a few thousand ideals of so many groups, as bits; with the empty and full one."""
    rows = sorted({0, (1 << size) - 1, *ideals}, key=lambda ideal: (ideal.bit_count(), ideal))
    members = _unpack(rows, size)
    inside = members.astype(np.float32)
    below = (inside @ (1 - inside).T) == 0
    np.fill_diagonal(below, False)
    steps = below.astype(np.float32)
    covered = below & ((steps @ steps) == 0)
    depth = np.zeros(len(rows), np.int64)
    for row in range(len(rows) - 2, -1, -1):
        depth[row] = 1 + depth[below[row]].max()
    order = np.argsort(-depth, kind="stable")
    covered = covered[np.ix_(order, order)]
    starts = [0, *(1 + np.flatnonzero(np.diff(depth[order]))).tolist(), len(rows)]
    covers = []
    for first, last in pairwise(starts[:-1]):
        level, above = np.nonzero(covered[first:last])
        covers.append(_pad(above.tolist(), np.bincount(level, minlength=last - first).tolist()))
    return Lattice(members[order], tuple(starts), tuple(covers))


def reaching(predecessors: Sequence[Sequence[int]]) -> Flags:
    """Group x group: which need which, themselves included; predecessors come before."""
    above = np.eye(len(predecessors), dtype=bool)
    for v, found in enumerate(predecessors):
        for u in found:
            above[v] |= above[u]
    return above


def _pad(flat: list[int], counts: list[int]) -> Numbers:
    """Rows of so many values each, filled up with their first."""
    count = np.array(counts)
    table = np.zeros((len(counts), int(count.max())), np.int64)
    filled = np.arange(table.shape[1]) < count[:, None]
    table[filled] = flat
    result: Numbers = np.where(filled, table, table[:, :1])
    return result


def _unpack(ideals: Sequence[int], size: int) -> Flags:
    packed = b"".join(ideal.to_bytes(size // 8 + 1, "little") for ideal in ideals)
    bits = np.frombuffer(packed, np.uint8).reshape(len(ideals), -1)
    members: Flags = np.unpackbits(bits, axis=1, count=size, bitorder="little").view(bool)
    return members
