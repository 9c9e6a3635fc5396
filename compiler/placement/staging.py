"""Stages between two ideals of a VariantProblem: do they fit, and are they fast enough?"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from p2bw.compiler.placement.ideals import Family, Floats
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.knapsack import Knapsack, staircase
from p2bw.compiler.placement.sharding import AMPLE, Tables
from p2bw.compiler.placement.stop import Stop

PAIRS = 1 << 20  # ideals x ideals looked at in one go
ROWS = 1 << 12  # knapsacks relaxed in one go
NONE = -1


class Shape(NamedTuple):
    """A kind of stage: its tensor parallelism (as a number of `shardings`), and what follows."""

    sharding: int
    replicas: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class _Sums:
    """The knapsack of a shape, and its columns summed over each ideal."""

    knapsack: Knapsack
    fast_time: Floats
    fast_size: Floats
    least_time: Floats
    least_size: Floats


@dataclass(frozen=True, slots=True)
class _Edges:
    """What edges cost at one degree.

    A stage pays for those that enter the groups after its source, and for those that leave its
    target; less what goes past it, from the source to behind the target: a matrix product.
    """

    entering: Floats  # by ideal
    leaving: Floats
    past: Floats  # ideal x edge
    missing: Floats  # nodes of each ideal without a variant


class Stager:
    """Prices of stages along a family of ideals."""

    def __init__(self, tables: Tables, family: Family, stop: Stop) -> None:
        self.tables, self.stop = tables, stop
        self.members = members = family.members
        self.size = members.sum(axis=1)
        self.inside = members.astype(np.float32)
        self.outside = 1 - self.inside
        self.started = members[:, tables.sources]
        self.open = (~members[:, tables.targets]).astype(np.float64)
        self.edges = [self._edges(sharding) for sharding in range(len(tables.shardings))]
        self.sums: dict[Shape, _Sums] = {}
        self.known: dict[tuple[Shape, bytes, int], int] = {}  # no choice adds less

    def _edges(self, sharding: int) -> _Edges:
        own = self.tables.shardings[sharding]
        crossing = self.started * self.open
        lacking = np.array([not variants for variants in own.variants], np.float64)
        return _Edges(
            entering=crossing @ own.received,
            leaving=crossing @ own.sent,
            past=self.started * (own.received + own.sent),
            missing=self.members @ lacking,
        )

    def _sum(self, shape: Shape) -> _Sums:
        if shape not in self.sums:
            own = self.tables.shardings[shape.sharding]
            nodes = range(len(own.variants))
            stairs = [staircase(own.options(v, *shape[1:])) for v in nodes]
            sack = Knapsack(stairs, self.tables.capacity)
            columns = sack.fast_time, sack.fast_size, sack.least_time, sack.least_size
            self.sums[shape] = _Sums(sack, *(self.members @ column for column in columns))
        return self.sums[shape]

    def feasible(
        self, shape: Shape, sources: Numbers, targets: Numbers, cap: int
    ) -> tuple[Numbers, Numbers]:
        """The sources from which such a stage leads to a target by `cap`, and a target of each.

        Loads are those of all replicas together.
        """
        found = np.full(len(sources), NONE)
        most = max(1, PAIRS // max(1, len(sources)))
        for start in range(0, len(targets), most):
            left = np.flatnonzero(found == NONE)
            if not len(left):
                break
            found[left] = self._some(shape, sources[left], targets[start : start + most], cap)
        done = found != NONE
        return sources[done], found[done]

    def _some(self, shape: Shape, sources: Numbers, targets: Numbers, cap: int) -> Numbers:
        """A target for each source, or NONE."""
        sums, edges = self._sum(shape), self.edges[shape.sharding]
        found = np.full(len(sources), NONE)
        row = sources[:, None]
        pairs = self.size[row] < self.size[targets]
        pairs &= sums.fast_time[targets] - sums.fast_time[row] <= cap
        pairs &= sums.least_size[targets] - sums.least_size[row] <= self.tables.capacity
        pairs &= edges.missing[row] == edges.missing[targets]
        if not pairs.any():
            return found
        pairs &= self.inside[sources] @ self.outside[targets].T == 0
        i, j = np.nonzero(pairs)
        source, target = sources[i], targets[j]
        moved = edges.entering[source] + edges.leaving[target]
        moved -= (edges.past[sources] @ self.open[targets].T)[i, j]
        spare = cap - moved - (sums.fast_time[target] - sums.fast_time[source])
        excess = sums.fast_size[target] - sums.fast_size[source] - self.tables.capacity
        slower = sums.least_time[target] - sums.least_time[source]
        slower -= sums.fast_time[target] - sums.fast_time[source]
        sure = (spare >= 0) & ((excess <= 0) | (slower <= spare))
        below = np.zeros(len(i))
        found[i[sure]] = target[sure]
        rest = np.flatnonzero(~sure & (spare >= 0) & (found[i] == NONE))
        for start in range(0, len(rest), ROWS):
            some = rest[start : start + ROWS]
            inside = self.members[target[some]] & ~self.members[source[some]]
            bounds = sums.knapsack.bounds(inside, excess[some])
            sure[some] = bounds.above <= spare[some]
            below[some] = bounds.below
        found[i[sure]] = target[sure]
        perhaps = rest[~sure[rest] & (below[rest] <= spare[rest])]
        for pair in perhaps[np.argsort((below - spare)[perhaps], kind="stable")].tolist():
            if found[i[pair]] == NONE and self._exactly(
                shape, int(source[pair]), int(target[pair]), int(spare[pair])
            ):
                found[i[pair]] = target[pair]
        return found

    def _exactly(self, shape: Shape, source: int, target: int, spare: int) -> bool:
        """Whether some choice of variants that fits adds no more than `spare` to the fastest.

        That depends on the nodes that have a choice, and on what these have to save.
        """
        sums = self._sum(shape)
        inside = self.members[target] & ~self.members[source]
        fastest = int(sums.fast_time[target] - sums.fast_time[source])
        excess = int(sums.fast_size[target] - sums.fast_size[source]) - self.tables.capacity
        key = shape, inside[sums.knapsack.step_node].tobytes(), excess
        if self.known.get(key, 0) > spare:
            return False
        nodes = np.flatnonzero(inside).tolist()
        found = sums.knapsack.fastest(nodes, fastest + spare, self.stop)
        self.known[key] = spare + 1 if found is None else found[0] - fastest
        return found is not None

    def choose(self, shape: Shape, source: int, target: int) -> tuple[int, dict[int, int]]:
        """The least load of a stage's replicas together, and the place of each node's variant.

        Where the memory allows, a node has the first of its variants that are as fast.
        """
        sums, edges = self._sum(shape), self.edges[shape.sharding]
        nodes = np.flatnonzero(self.members[target] & ~self.members[source]).tolist()
        found = sums.knapsack.fastest(nodes, AMPLE)
        assert found is not None, "a stage was kept that does not fit"
        moved = edges.entering[source] + edges.leaving[target]
        moved -= edges.past[source] @ self.open[target]
        options = {v: self.tables.shardings[shape.sharding].options(v, *shape[1:]) for v in nodes}
        places = dict(zip(nodes, found[1], strict=True))
        room = self.tables.capacity - sum(options[v][place].size for v, place in places.items())
        for v, place in places.items():
            now = options[v][place]
            first = next(o for o in options[v] if o.time == now.time and o.size <= now.size + room)
            room -= first.size - now.size
            places[v] = first.place
        return found[0] + int(moved), places
