"""What devices are busy for that take the step from one ideal to another.

A tensor over the groups V is cut by J - I iff 0 < |V & (J - I)| < |V|. With n(I) = |V & I|,

    cut = 1 - [n(I) = n(J)] - [n(I) = 0 and n(J) = |V|]
        = 1 - [n(J) = 0] - [n(J) = 1] - [n(I) = |V|]
            - [n(I) = 0] ([n(J) = |V|] - [n(J) = 1]) - sum of [n(I) = i] [n(J) = i], 1 < i < |V|

is a matrix product of what is known of I and of J alone; sums of whole numbers, so exact.

Many graphs are blocks in a row: between two blocks is a group that depends on all before it, and on
which all behind it depend, and no tensor passes it by. From an I without such a group to a J with
it, the step always is one, and what it pays for is what crosses I and what crosses J:

    load = time(J) - time(I) + crossing(I) + crossing(J)

So the best I for a J is found among those that are best by max(best[I], crossing(I) - time(I) + x)
for some x: without a look at each pair.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from p2bw.compiler.placement.contract import Loads
from p2bw.compiler.placement.ideals import Flags, Floats
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.lattice import reaching

CHUNK = 64  # ideals that all before are tried for, at once


def blocks(loads: Loads, members: Flags) -> Iterator[slice]:
    """The ideals of each block in a row, by size: those with as many groups between blocks."""
    above = reaching(loads.predecessors)
    strictly = above & ~np.eye(len(above), dtype=bool)
    between = (above | above.T).all(axis=1)
    for ends, _ in loads.cuts:
        nodes = list(ends)
        between &= ~(strictly[:, nodes].any(axis=1) & strictly[nodes].any(axis=0))
    count = members[:, between].sum(axis=1)
    starts = [*np.flatnonzero(np.diff(count, prepend=-1)).tolist(), len(members)]
    yield from (slice(first, last) for first, last in pairwise(starts))


def crossing(loads: Loads, members: Flags) -> Floats:
    """Cost of the tensors that some group inside an ideal and some outside take part in."""
    total = np.zeros(len(members))
    for ends, cost in loads.cuts:
        inside = members[:, ends]
        total += cost * (inside.any(axis=1) & ~inside.all(axis=1))
    return total


class Leaps:
    """Steps from one block to a later one."""

    def __init__(self, loads: Loads, members: Flags) -> None:
        time, paid = (members @ loads.time).astype(np.float64), crossing(loads, members)
        cpu_time = (members @ loads.cpu_time).astype(np.float64)
        self.start = (paid - time, -cpu_time)
        self.end = (paid + time, cpu_time)
        self.size, self.unaccelerated = members @ loads.size, members @ loads.unaccelerated
        self.memory = loads.memory
        self.ample = self.size[-1] <= self.memory and not self.unaccelerated[-1]

    def reach(
        self, now: tuple[Floats, Numbers], earlier: Floats, block: slice, by_cpu: int, upper: float
    ) -> None:
        """Reach ideals of a block (views of best and whence it came) from all before the block.

        `earlier` is the best of those before, with one device less.
        """
        source = np.flatnonzero(np.isfinite(earlier))
        if not len(source):
            return
        target = np.arange(block.start, block.stop)
        source = source[np.argsort(earlier[source], kind="stable")]
        start, end = self.start[by_cpu][source], self.end[by_cpu][target]
        found, choice = _least(earlier[source], start, end)
        if not by_cpu and not self.ample:
            wrong = (found < np.minimum(now[0], upper)) & ~self._fits(source[choice], target)
            for some in np.array_split(np.flatnonzero(wrong), -(-wrong.sum() // CHUNK) or 1):
                busy = np.maximum(earlier[source][:, None], start[:, None] + end[some])
                busy[~self._fits(source[:, None], target[some])] = np.inf
                choice[some] = busy.argmin(axis=0)
                found[some] = busy[choice[some], np.arange(len(some))]
        better = found < now[0]
        now[0][better] = found[better]
        now[1][better] = 2 * source[choice[better]] + by_cpu

    def _fits(self, source: Numbers, target: Numbers) -> Flags:
        """An accelerator can take the step."""
        fits: Flags = self.size[target] - self.size[source] <= self.memory
        fits &= self.unaccelerated[target] == self.unaccelerated[source]
        return fits


def _least(best: Floats, start: Floats, end: Floats) -> tuple[Floats, Numbers]:
    """For each end the least max(best, start + end), and where it is; `best` ascends."""
    lowest = np.minimum.accumulate(start)
    place = np.maximum.accumulate(np.where(start == lowest, np.arange(len(start)), 0))
    turn = np.searchsorted(best - lowest, end)  # from here on `best` is the larger one
    choices = place[np.clip([turn - 1, turn], 0, len(best) - 1)]
    values = np.maximum(best[choices], start[choices] + end)
    which = values.argmin(axis=0)
    columns = np.arange(len(end))
    return values[which, columns], choices[which, columns]


class Prices:
    """Loads of the steps between the ideals of a block."""

    def __init__(self, loads: Loads, members: Flags) -> None:
        def sums(values: Numbers) -> Floats:
            result: Floats = (members @ values).astype(np.float64)
            return result

        some = np.array(members.any(axis=0) & ~members.all(axis=0))
        self.members = members[:, some].astype(np.float32)
        self.missing = 1 - self.members
        self.time, self.cpu_time = sums(loads.time), sums(loads.cpu_time)
        self.size, self.unaccelerated = sums(loads.size), sums(loads.unaccelerated)
        self.memory = loads.memory
        cuts = [cut for cut in loads.cuts if some[list(cut[0])].any()]
        self.charged = bool(cuts)
        if not self.charged:
            return
        cost = np.array([cost for _, cost in cuts], np.float64)
        inside = np.stack([members[:, ends].sum(axis=1) for ends, _ in cuts], axis=1)
        ends = np.array([len(ends) for ends, _ in cuts])
        self.late = (inside > 1) @ cost
        self.all = (inside == ends) @ cost
        before, after = [inside == 0], [((inside == ends) * 1.0 - (inside == 1)) * cost]
        for count in range(2, int(ends.max())):
            some = ends > count
            before.append(inside[:, some] == count)
            after.append((inside[:, some] == count) * cost[some])
        self.before = np.concatenate(before, axis=1).astype(np.float64)
        self.after = np.concatenate(after, axis=1)

    def steps(self, source: Numbers, target: Numbers) -> tuple[Floats, Floats]:
        """Loads of the steps from each source to each target, on an accelerator and on a CPU."""
        outside = (self.members[source] @ self.missing[target].T) > 0
        time = self.time[target] - self.time[source, None]
        if self.charged:
            time += self.late[target] - self.all[source, None]
            time -= self.before[source] @ self.after[target].T
        time[self.size[target] - self.size[source, None] > self.memory] = np.inf
        time[self.unaccelerated[target] > self.unaccelerated[source, None]] = np.inf
        cpu_time = self.cpu_time[target] - self.cpu_time[source, None]
        time[outside] = cpu_time[outside] = np.inf
        return time, cpu_time
