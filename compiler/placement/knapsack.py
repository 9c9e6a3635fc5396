"""Choose a variant of each node of a stage: the fastest choice that fits into its memory.

A node's useful variants, from the fastest to the smallest, form a staircase of time and memory;
its lower hull gives steps, each of which buys memory for time. Steps taken in the order of what
they cost per byte, the last one in part, are the relaxation's optimum: a lower bound, and a choice
once the last step is taken whole. A dynamic program over the nodes closes what is left.
Times and sizes are whole numbers, exact in floats.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from p2bw.compiler.placement.ideals import Flags, Floats
from p2bw.compiler.placement.instance import Numbers

SLACK = 4  # steps of time: more than floats can be off by where they bound
MANY = 20_000  # choices of some nodes: from here on, what is as good but for
CLOSE = 1e-7  # of its time counts as no better: sums can come arbitrarily near to each other


class StoppedError(Exception):
    """A search had to end."""


@dataclass(frozen=True, slots=True)
class Option:
    """A variant, by its place in the file's list."""

    time: int
    size: int
    place: int


Staircase = tuple[Option, ...]  # slower, and smaller


def staircase(options: Sequence[Option]) -> Staircase:
    """The options that no other one beats in time and size."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.time, o.size, o.place)):
        if not kept or option.size < kept[-1].size:
            kept.append(option)
    return tuple(kept)


def hull(stairs: Staircase) -> list[int]:
    """Places on the lower hull: each step costs more time per byte than the one before."""
    kept: list[int] = []
    for place, option in enumerate(stairs):
        while len(kept) > 1:
            first, last = stairs[kept[-2]], stairs[kept[-1]]
            saved, spent = first.size - last.size, last.time - first.time
            if (option.time - last.time) * saved > spent * (last.size - option.size):
                break
            kept.pop()
        kept.append(place)
    return kept


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of some stages: the relaxation's time, and that of a choice that fits."""

    below: Floats
    above: Floats


class Knapsack:
    """The variants of all nodes at one degree, number of replicas and microbatches in flight."""

    def __init__(self, stairs: Sequence[Staircase], capacity: int) -> None:
        self.stairs = stairs
        self.capacity = capacity
        self.fast_time = _column([own[0].time if own else 0 for own in stairs])
        self.fast_size = _column([own[0].size if own else 0 for own in stairs])
        self.least_time = _column([own[-1].time if own else 0 for own in stairs])
        self.least_size = _column([own[-1].size if own else 0 for own in stairs])
        self.steps = [
            (
                _column([o.time - own[0].time for o in own]),
                _column([o.size - own[0].size for o in own]),
            )
            for own in stairs
        ]
        steps = sorted(
            (_slope(own, i, j), v, i, own[j].time - own[i].time, own[i].size - own[j].size)
            for v, own in enumerate(stairs)
            for i, j in pairwise(hull(own))
        )
        self.step_node = np.array([v for _, v, _, _, _ in steps], np.int64)
        self.step_first = np.array([i == 0 for _, _, i, _, _ in steps], bool)
        self.step_time = _column([time for *_, time, _ in steps])
        self.step_size = _column([size for *_, size in steps])
        self.single = bool(self.step_first.all())  # no node has two steps

    def bounds(self, inside: Flags, excess: Floats) -> Bounds:
        """Of stages (rows of `inside`) that exceed the capacity: time on top of the fastest."""
        here = inside[:, self.step_node]
        sizes, times = here * self.step_size, here * self.step_time
        size, time = sizes.cumsum(axis=1), times.cumsum(axis=1)
        last = (size >= excess[:, None]).argmax(axis=1)
        row = np.arange(len(last))
        before = time[row, last] - times[row, last]
        missing = excess - (size[row, last] - sizes[row, last])
        below = before + times[row, last] * (missing / sizes[row, last])
        # Some later step may do instead of the last; or it makes an earlier one superfluous.
        later = np.arange(here.shape[1]) > last[:, None]
        fits = here & later & self.step_first & (self.step_size >= missing[:, None])
        instead = np.where(fits, self.step_time, np.inf).min(axis=1)
        above = before + np.minimum(times[row, last], instead)
        if self.single:
            spare = size[row, last] - excess
            idle = here & ~later & (self.step_size <= spare[:, None])
            returned = np.where(idle, self.step_time, 0.0).max(axis=1)
            above = np.minimum(above, before + times[row, last] - returned)
        return Bounds(np.floor(below) - SLACK, above)

    def fastest(
        self, nodes: Sequence[int], limit: float, stop: Callable[[], bool] = lambda: False
    ) -> tuple[int, tuple[int, ...]] | None:
        """The least time of these nodes, at most `limit`, and the place of each one's variant.

        Node by node, the choices so far that none beats in time and size, and whose relaxation is
        not beyond the best whole choice known.
        """
        time = np.array([self.fast_time[nodes].sum()])
        size = np.array([self.fast_size[nodes].sum()])
        rest = _Rest(self, nodes)
        came: list[tuple[Numbers, Numbers]] = []  # the choice before, and the node's option
        best = limit
        for v in rest.order:
            if stop():
                raise StoppedError
            more_time, more_size = self.steps[v]
            rest.drop(v)
            now_time = (time[:, None] + more_time).ravel()
            now_size = (size[:, None] + more_size).ravel()
            below, above = rest.bounds(now_size - self.capacity)
            leader = (now_time + above).argmin()
            best = min(best, float((now_time + above)[leader]))
            margin = -SLACK if len(now_time) < MANY else best * CLOSE
            good = now_time + below <= best - margin
            good[leader] |= (now_time + above)[leader] <= limit
            kept = np.flatnonzero(good)
            kept = kept[np.lexsort((now_time[kept], now_size[kept]))]
            least = np.minimum.accumulate(now_time[kept])
            kept = kept[np.diff(least, prepend=np.inf) < 0]
            time, size = now_time[kept], now_size[kept]
            if not len(kept):
                return None
            came.append((kept // len(more_time), kept % len(more_time)))
        fits = np.flatnonzero((size <= self.capacity) & (time <= limit))
        if not len(fits):
            return None
        row = fits[time[fits].argmin()]
        found = time[row]
        chosen = dict.fromkeys(nodes, 0)
        for v, (before, option) in zip(reversed(rest.order), reversed(came), strict=True):
            chosen[v], row = int(option[row]), before[row]
        return int(found), tuple(self.stairs[v][i].place for v, i in chosen.items())


class _Rest:
    """The relaxation of the nodes that are still to be chosen."""

    def __init__(self, sack: Knapsack, nodes: Sequence[int]) -> None:
        here = np.isin(sack.step_node, nodes)
        self.node = sack.step_node[here]
        self.time, self.size = sack.step_time[here], sack.step_size[here]
        self.order = list(dict.fromkeys(self.node.tolist()))  # what buys memory for least first

    def drop(self, node: int) -> None:
        """Leave a node out."""
        kept = self.node != node
        self.node, self.time, self.size = self.node[kept], self.time[kept], self.size[kept]

    def bounds(self, excess: Floats) -> tuple[Floats, Floats]:
        """Time that buys so much memory, of steps in part and of whole steps in their order."""
        size = np.concatenate([[0.0], self.size.cumsum()])
        time = np.concatenate([[0.0], self.time.cumsum(), [np.inf]])
        below = np.interp(excess, size, time[:-1], right=np.inf)
        below[excess == size[-1]] = time[-2]
        return below, time[np.searchsorted(size, excess)]


def _slope(stairs: Staircase, i: int, j: int) -> float:
    return (stairs[j].time - stairs[i].time) / (stairs[i].size - stairs[j].size)


def _column(values: Sequence[int]) -> Floats:
    return np.array(values, np.float64)
