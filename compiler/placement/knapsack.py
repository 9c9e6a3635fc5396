"""Choose a variant of each node of a stage: the fastest choice that fits into its memory.

A node's useful variants, from the fastest to the smallest, form a staircase of time and memory;
its lower hull gives steps, each of which buys memory for time. Steps taken in the order of what
they cost per byte, the last one in part, are the relaxation's optimum: a lower bound, and a choice
once the last step is taken whole. Branching on that last step's node closes what is left.
Times and sizes are whole numbers, exact in floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from p2bw.compiler.placement.ideals import Flags, Floats

SLACK = 4  # steps of time: more than floats can be off by where they bound


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


def hull(stairs: Staircase, low: int, high: int) -> list[int]:
    """Places low..high on the lower hull: each step costs more time per byte than the last."""
    kept: list[int] = []
    for place in range(low, high + 1):
        option = stairs[place]
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
        steps = sorted(
            (_slope(own, i, j), v, i, own[j].time - own[i].time, own[i].size - own[j].size)
            for v, own in enumerate(stairs)
            for i, j in pairwise(hull(own, 0, len(own) - 1))
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

    def fastest(self, nodes: Sequence[int], limit: float) -> tuple[int, tuple[int, ...]] | None:
        """The least time of these nodes, at most `limit`, and the place of each one's variant."""
        search = _Search([self.stairs[v] for v in nodes], self.capacity, limit)
        search.explore([(0, len(own) - 1) for own in search.stairs])
        if search.best is None:
            return None
        chosen = [own[i] for own, i in zip(search.stairs, search.best, strict=True)]
        return sum(o.time for o in chosen), tuple(o.place for o in chosen)


class _Search:
    """Branch and bound; a branch allows a range of each node's staircase."""

    def __init__(self, stairs: list[Staircase], capacity: int, limit: float) -> None:
        self.stairs, self.capacity, self.limit = stairs, capacity, limit
        self.best: list[int] | None = None

    def explore(self, ranges: list[tuple[int, int]]) -> None:
        """Keep the best choice of these ranges, if it beats what is known."""
        stack = [ranges]
        while stack:
            ranges = stack.pop()
            if (split := self._relax(ranges)) is not None:
                v, low, high = split
                # The rounded-up choice is known; with less of this node, or at least as much.
                stack.append([*ranges[:v], (high, ranges[v][1]), *ranges[v + 1 :]])
                stack.append([*ranges[:v], (ranges[v][0], low), *ranges[v + 1 :]])

    def _relax(self, ranges: list[tuple[int, int]]) -> tuple[int, int, int] | None:
        """Solve the relaxation; the node to branch on, and the ranges' ends, if it may help."""
        chosen = [low for low, _ in ranges]
        time = sum(own[i].time for own, i in zip(self.stairs, chosen, strict=True))
        size = sum(own[i].size for own, i in zip(self.stairs, chosen, strict=True))
        if time > self.limit:
            return None
        for slope, v, i, j in self._steps(ranges) if size > self.capacity else ():
            a, b = self.stairs[v][i], self.stairs[v][j]
            if size - a.size + b.size <= self.capacity:
                if time + (size - self.capacity) * slope - SLACK > self.limit:
                    return None
                chosen[v] = j
                self._offer(chosen, time - a.time + b.time)
                return v, j - 1, j
            chosen[v] = j
            time, size = time - a.time + b.time, size - a.size + b.size
        if size <= self.capacity:
            self._offer(chosen, time)
        return None

    def _steps(self, ranges: list[tuple[int, int]]) -> list[tuple[float, int, int, int]]:
        found = []
        for v, (low, high) in enumerate(ranges):
            own = self.stairs[v]
            found += [(_slope(own, i, j), v, i, j) for i, j in pairwise(hull(own, low, high))]
        return sorted(found)

    def _offer(self, chosen: list[int], time: int) -> None:
        if time <= self.limit:
            self.best, self.limit = list(chosen), time - 1


def _slope(stairs: Staircase, i: int, j: int) -> float:
    return (stairs[j].time - stairs[i].time) / (stairs[i].size - stairs[j].size)


def _column(values: Sequence[int]) -> Floats:
    return np.array(values, np.float64)
