"""The fewest workers that keep a period, replicas chosen stage by stage; exact over a family.

    least[I] = the least w + r over ideals J > I with least[J] = w such that the stage J - I with
               r replicas keeps the period and fits in memory, w workers behind it

What a stage costs is a sum over it, or belongs to one of its ideals:

    weight(r, J) - weight(r, I) <= r r T,   weight(r, J) = r time(J) + (r - 1) sync(J)
    live(I) <= r T,   live(J) <= r T unless I is empty

so for each (w, r) only the J of least weight matters, and an ideal takes it over from its covers.
Where memory is short it has to be a J that is small, too: if neither the one of least weight nor
the smallest is both, all are looked at. A stage without any time would be an idle one; there are
none: where it could save anything at all (parameters, memory), such J are left out.
"""

from dataclasses import dataclass

import numpy as np

from p2bw.compiler.placement.contract import Flow
from p2bw.compiler.placement.ideals import Flags
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.lattice import Lattice
from p2bw.compiler.placement.stop import Stop


@dataclass(frozen=True, slots=True)
class Row:
    """Stages front to back and their replicas; `period` in steps, rounded up."""

    period: int
    place: tuple[int, ...]  # of each node
    replicas: tuple[int, ...]


Ranks = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


def columns(workers: int, most: int) -> Numbers:
    """(workers behind a stage, its replicas): all that can be, by their sum."""
    pairs = [(w, r) for w in range(workers) for r in range(1, most + 1) if w + r <= workers]
    return np.array(sorted(pairs, key=lambda pair: (sum(pair), pair)), np.int64).T


class Search:
    """Placements on so many workers, at most `most` replicas a stage, over a family of ideals."""

    def __init__(self, flow: Flow, lattice: Lattice, workers: int, most: int) -> None:
        self.flow, self.lattice, self.workers = flow, lattice, workers
        every = int(flow.time.sum() + flow.sync.sum()) + sum(cost for _, cost in flow.cuts)
        self.longest = max(1, every)  # period that rules nothing out
        self.time, self.size = lattice.sums(flow.time), lattice.sums(flow.size)
        self.live = lattice.crossing(flow.cuts)
        sync = lattice.sums(flow.sync)
        self.weight = np.stack([r * self.time + (r - 1) * sync for r in range(1, most + 1)])
        self.after, self.replicas = columns(workers, most)
        self.column = self.replicas - 1
        self.total = self.after + self.replicas
        idle = flow.time == 0
        limited = flow.memory is not None
        costs = flow.sync[idle].any() or (limited and flow.size[idle].any())
        self.strict = bool(costs and not idle.all())
        if flow.memory is not None:
            self.room = flow.memory // -(-self.total // self.replicas)
        # By replicas: the ideals from light to heavy; and, where memory is short, by size.
        keys = [(self.weight[r], self.size) for r in range(most)]
        self.order = [np.stack([np.lexsort((size, weight)) for weight, size in keys])]
        if limited:
            self.order.append(np.stack([np.lexsort((weight, size)) for weight, size in keys]))
        self.sorted = np.take_along_axis(self.weight, self.order[0], axis=1)
        self.rank = [np.argsort(order, axis=1).astype(np.int32).T.copy() for order in self.order]
        count = len(self.live)
        shape = (count, len(self.after))
        self.best: list[Ranks] = [np.empty(shape, np.int32) for _ in self.order]
        # The same, of ideals with more time than the ideal alone.
        self.beyond: list[Ranks] = [
            np.empty(shape, np.int32) if self.strict else best for best in self.best
        ]

    def least_workers(self, period: int) -> Numbers:
        """For what is outside each ideal; more than there are, if they are too few."""
        count, none = len(self.live), self.workers + 1
        needed = -(-self.live // period)
        before = -(-self.time // period)
        least = np.full(count, none)
        least[-1] = 0
        for best, beyond, rank in zip(self.best, self.beyond, self.rank, strict=True):
            beyond[-1] = count
            best[-1] = np.where(self.after == 0, rank[-1, self.column], count)
        starts = self.lattice.starts
        for k in range(len(starts) - 3, 0, -1):
            level = slice(starts[k], starts[k + 1])
            taken = [self._take_over(k, t) for t in range(len(self.order))]
            able: Flags = self.replicas >= needed[level, None]
            reached = [beyond for _, beyond in taken]
            first = self._first(level, reached, able, period, least, needed)
            found = np.append(self.total, none)[first]
            found[found + before[level] > self.workers] = none
            least[level] = found
            own = able & (self.after == found[:, None])
            for t, (above, beyond) in enumerate(taken):
                self.beyond[t][level] = beyond
                mine = np.where(own, self.rank[t][level, self.column], count)
                np.minimum(above, mine, out=self.best[t][level])
        for choice in range(len(self.total)):
            if len(self._ends(0, choice, period, least, needed)):
                least[0] = self.total[choice]
                break
        return least

    def _take_over(self, k: int, t: int) -> tuple[Ranks, Ranks]:
        """What each ideal of a level takes over: the best rank of all, and of those with more time.

        By column; the same but where stages could be idle.
        """
        covers = self.lattice.covers[k]
        starts = self.lattice.starts
        time = self.time[starts[k] : starts[k + 1]]
        best = self.best[t][covers[:, 0]]
        for above in covers.T[1:]:
            np.minimum(best, self.best[t][above], out=best)
        if not self.strict:
            return best, best
        beyond = np.full_like(best, len(self.live))
        for above in covers.T:
            idle = (self.time[above] == time)[:, None]
            np.minimum(
                beyond, np.where(idle, self.beyond[t][above], self.best[t][above]), out=beyond
            )
        return best, beyond

    def _first(
        self,
        level: slice,
        reached: list[Ranks],
        able: Flags,
        period: int,
        least: Numbers,
        needed: Numbers,
    ) -> Numbers:
        """The first column by which each ideal of a level has a stage, or their count."""
        square = self.replicas**2 * period
        light = np.empty((level.stop - level.start, len(self.weight)), np.int64)
        for r, weight in enumerate(self.weight, 1):
            allowed = weight[level] + r * r * period
            light[:, r - 1] = np.searchsorted(self.sorted[r - 1], allowed, "right")
        fits = able & (reached[0] < light[:, self.column])
        if self.flow.memory is None:
            return _first_true(fits)
        last = len(self.live) - 1
        lightest, smallest = (
            order[self.column, np.minimum(reach, last)]
            for order, reach in zip(self.order, reached, strict=True)
        )
        size = self.size[level, None]
        small = able & (reached[1] <= last) & (self.size[smallest] - size <= self.room)
        weight = self.weight[:, level].T[:, self.column]
        sure = fits & (self.size[lightest] - size <= self.room)
        sure |= small & (self.weight[self.column, smallest] - weight <= square)
        first = _first_true(sure)
        for row, maybe in enumerate(fits & small & ~sure):
            for choice in np.flatnonzero(maybe[: first[row]]).tolist():
                if len(self._ends(level.start + row, choice, period, least, needed)):
                    first[row] = choice
                    break
        return first

    def _ends(
        self, ideal: int, choice: int, period: int, least: Numbers, needed: Numbers
    ) -> Numbers:
        """All ideals at which a stage that starts at an ideal can end, by a column."""
        r = self.replicas[choice]
        fits = least == self.after[choice]
        if ideal:
            fits &= needed <= r
        if self.strict:
            fits &= self.time > self.time[ideal]
        weight = self.weight[r - 1]
        fits &= weight - weight[ideal] <= r * r * period
        if self.flow.memory is not None:
            fits &= self.size - self.size[ideal] <= self.room[choice]
        ends = np.flatnonzero(fits)
        inside = self.lattice.members[ideal]
        result: Numbers = ends[self.lattice.members[np.ix_(ends, inside)].all(axis=1)]
        return result

    def row(self, period: int) -> Row | None:
        """A placement on the fewest workers that keep a period; None if they are too few."""
        least = self.least_workers(period)
        if least[0] > self.workers:
            return None
        needed = -(-self.live // period)
        ideal, full = 0, len(self.live) - 1
        stages = np.zeros(self.lattice.members.shape[1], np.int64)
        replicas: list[int] = []
        busiest = 1
        while ideal != full:
            for choice in np.flatnonzero(self.total == least[ideal]).tolist():
                r = int(self.replicas[choice])
                if r >= needed[ideal]:
                    ends = self._ends(ideal, choice, period, least, needed)
                    if len(ends):
                        break
            end = int(ends[0])
            load = int(self.weight[r - 1, end] - self.weight[r - 1, ideal])
            link = max(int(self.live[ideal]), int(self.live[end])) if ideal else 0
            busiest = max(busiest, -(-load // (r * r)), -(-link // r))
            stages += ~self.lattice.members[end]
            replicas.append(r)
            ideal = end
        place = self.flow.grouping.nodes_to_stages(stages.tolist())
        return Row(busiest, place, tuple(replicas))


def _first_true(flags: Flags) -> Numbers:
    """In each row; the number of columns where there is none."""
    result: Numbers = np.where(flags.any(axis=1), flags.argmax(axis=1), flags.shape[1])
    return result


def minimise(search: Search, low: int, row: Row | None, stop: Stop) -> tuple[Row | None, int]:
    """The least period, on the fewest workers, and a period below which none is.

    None is below `low`, and only what is better than `row` is looked for. The two periods differ
    if it had to stop; without a placement there is none, or it had to stop.
    """
    if row is None:
        row = search.row(search.longest)
        if row is None:
            return None, low
    best, nearly = row, True
    while low < best.period and not stop():
        period = best.period - 1 if nearly else (low + best.period) // 2
        better = search.row(period)
        if better is None:
            low, nearly = period + 1, True
        else:
            best, nearly = better, not nearly
    if best is row and not stop():
        best = search.row(best.period) or best
    return best, low
