"""rows: placements that cut the groups' own order, as starts where the dynamic program gives none
or leaves a gap: it does not know how many stages read a tensor, nor all orders of many branches.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np

from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.instance import Instance, Numbers

# Of the least busiest stage: with more room, cuts find places where less crosses.
ROOM = (1.0, 1.001, 1.003, 1.01, 1.03, 1.06, 1.1, 1.15, 1.2, 1.3, 1.5)


def row_placements(instance: Instance, shape: Shape) -> Iterator[tuple[int, ...]]:
    """The stage of each group: cuts where the fewest bytes cross, with less and less balance.

    Those between stages that slower links join are chosen first; there, what is read by many
    groups is likely to be sent to many stages.
    """
    if not 1 < shape.depth <= instance.size:
        return
    work = (instance.forward_ps + instance.backward_ps).min(axis=0)
    sums = np.array([0, *accumulate(map(int, work))])
    crossing, crossings = _crossing(instance, False), _crossing(instance, True)
    borders = _borders(instance, shape)
    least = _least(sums, shape.depth)
    found: dict[tuple[int, ...], None] = {}  # in the order of ROOM
    for room in ROOM:
        outer = [0, *_cuts(sums, crossings, shape.depth, int(least * room), borders), instance.size]
        cuts: list[int] = []
        for (a, b), (i, j) in zip(
            pairwise([0, *borders, shape.depth]), pairwise(outer), strict=True
        ):
            part = slice(i, j + 1)
            inner = _cuts(sums[part], crossing[part], b - a, int(least * room), range(1, b - a))
            cuts += [i + cut for cut in inner] + [j]
        found[tuple(cuts[:-1])] = None
    for bounds in found:
        yield tuple(int(k) for k in np.searchsorted(bounds, np.arange(instance.size), side="right"))


def _borders(instance: Instance, shape: Shape) -> list[int]:
    """Numbers of stages after which data passes more ports than it has to."""
    if shape.layout == "any":
        return []
    ranks = [shape.rank(k, 0) for k in range(shape.depth)]
    ports = [len(instance.network.route(*pair)) for pair in pairwise(ranks)]
    return [k for k, count in enumerate(ports, 1) if count > min(ports)]


def _crossing(instance: Instance, every: bool) -> Numbers:
    """Bytes that cross in front of each group, both ways; or as often as groups read them."""
    change = np.zeros(instance.size + 1, np.int64)
    for edge in instance.edges:
        for reader in edge.consumers if every else (max(edge.consumers),):
            change[edge.producer + 1] += edge.bytes + edge.gradient
            change[reader + 1] -= edge.bytes + edge.gradient
    return np.cumsum(change)


def _least(sums: Numbers, parts: int) -> int:
    """Picoseconds of the busiest part if it is as little busy as can be."""
    low, high = int(np.diff(sums).max()), int(sums[-1])
    while low < high:
        middle = (low + high) // 2
        if _latest(sums, parts, middle)[-1] == len(sums) - 1:
            high = middle
        else:
            low = middle + 1
    return low


def _latest(sums: Numbers, parts: int, longest: int) -> list[int]:
    """Where each part ends at the latest; every part leaves a group for each that follows."""
    ends = [0]
    for left in reversed(range(parts)):
        ends.append(min(_end(sums, ends[-1], longest), len(sums) - 1 - left))
    return ends[1:]


def _end(sums: Numbers, start: int, longest: int) -> int:
    return int(np.searchsorted(sums, sums[start] + longest, side="right")) - 1


def _cuts(
    sums: Numbers, crossing: Numbers, parts: int, longest: int, after: Sequence[int]
) -> list[int]:
    """The cuts after some of the parts: as few bytes across as can be, one after the other."""
    count = len(sums) - 1
    # The same from the back: where what follows each part starts at the earliest.
    turned = _latest(sums[-1] - sums[::-1], parts, longest)
    cuts, done = [0], 0
    for k in after:
        last = cuts[-1]
        for _ in range(done, k):
            last = _end(sums, last, longest)
        first = max(count - turned[parts - k - 1], cuts[-1] + k - done)
        last = max(first, min(last, count - (parts - k)))
        # The last of equals: what is left over is less.
        cuts.append(last - int(crossing[first : last + 1][::-1].argmin()))
        done = k
    return cuts[1:]
