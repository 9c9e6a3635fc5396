"""What a period costs at least where ideals are too many to list: minimum cuts by position.

The position of an ideal is its time. Where it is between two positions, the tensors that leave the
ideal cost at least

    max over x of  min over ideals I of  live(I) + x (time(I) - position)

and the inner minimum is a minimum cut of a network: a group on the source's side is in the ideal,
and infinite arcs keep all that it needs there. What must be in by its position, or cannot be, is
fixed. The cuts themselves are good ideals to end a stage at.

Likewise for the parameters' synchronisation: the least of an ideal that has some time at least, the
most of one that has some time at most; and their difference for a stage between the two. Groups
that can be nearly anywhere are left out there, for both would count them in their favour.
"""

from heapq import heapify, heappop, heappush
from itertools import accumulate

import numpy as np
from ortools.graph.python import max_flow

from p2bw.compiler.placement.contract import Flow
from p2bw.compiler.placement.ideals import Flags
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.lattice import reaching

POSITIONS = 480
EVERY = 4  # of the positions gives its cuts to the family
BITS = 30  # of all costs together, in a network
INFINITE = 1 << 40
SLOPES = (0, 1, -1, 2, -2, 4, -4, 8, -8)  # x, in quarters
ROAMING = 8  # a group that can be at more than this part of the positions roams
RATES = (1, 2, 4, 8, 16, 32, 64)  # of synchronisation by time, in 32nds


class Positions:
    """The least that is live in each range of positions, and ideals where little is."""

    def __init__(self, flow: Flow) -> None:
        self.time, self.sync = flow.time, flow.sync
        self.total = int(flow.time.sum())
        costs = self.total + sum(cost for _, cost in flow.cuts)
        self.shift = max(0, costs.bit_length() - BITS)  # rounds down: the minima stay below
        self.above = reaching(flow.predecessors)
        self._build(flow)
        self.edges = [self.total * b // POSITIONS for b in range(POSITIONS + 1)]
        self.live: list[int] = []  # INFINITE steps where there is no ideal
        self.ideals: set[int] = set()
        # What an ideal in each range contains for sure, and what for sure not.
        rest = self.total - self.above.T @ self.time
        self.inside = np.array([rest < first for first in self.edges])
        self.outside = np.array([self.above @ self.time > last for last in self.edges[1:]])
        for b in range(POSITIONS):
            self._scan(b)

    def _build(self, flow: Flow) -> None:
        groups, tensors = len(flow.time), len(flow.cuts)
        arcs: list[tuple[int, int, int]] = []
        for tensor, (ends, cost) in enumerate(flow.cuts, groups):
            arcs.append((ends[0], tensor, cost >> self.shift))
            arcs += [(tensor, end, INFINITE) for end in ends[1:]]
        arcs += [(v, u, INFINITE) for v, found in enumerate(flow.predecessors) for u in found]
        self.source, self.sink = groups + tensors, groups + tensors + 1
        tails, heads, costs = np.array(arcs, np.int64).reshape(-1, 3).T
        every = np.arange(groups)
        self.costs = costs
        self.network = max_flow.SimpleMaxFlow()
        self.arcs = self.network.add_arcs_with_capacity(
            np.concatenate([tails, every, np.full(groups, self.source)]),
            np.concatenate([heads, np.full(groups, self.sink), every]),
            np.zeros(len(tails) + 2 * groups, np.int64),
        )

    def _scan(self, b: int) -> None:
        inside, outside = self.inside[b], self.outside[b]
        least, unit = 0, 4 << self.shift
        for slope in SLOPES:
            end = self.edges[b + 1] if slope > 0 else self.edges[b]
            found = self._cut(inside, outside, self.time * slope // unit, self.costs)
            found += -slope * end // unit  # all rounded down, so that the minimum stays below
            least = max(least, found)
            if found < INFINITE // 2 and b % EVERY == 0:
                self.ideals |= self._sides()
        self.live.append(min(least, INFINITE) << self.shift)

    def _cut(self, inside: Flags, outside: Flags, prices: Numbers, costs: Numbers) -> int:
        """The least of what is live, if that costs so much, and the prices of what is inside."""
        given = int(prices[inside].sum())
        prices = np.where(inside, 0, prices)
        leave = np.where(outside, INFINITE, np.maximum(prices, 0))
        stay = np.where(inside, INFINITE, np.maximum(-prices, 0))
        self.network.set_arcs_capacity(self.arcs, np.concatenate([costs, leave, stay]))
        status = self.network.solve(self.source, self.sink)
        assert status == self.network.OPTIMAL, status
        return int(self.network.optimal_flow()) + given + int(np.minimum(prices, 0).sum())

    def _sides(self) -> set[int]:
        """The smallest and the largest ideal of the last cut, as bits."""
        groups = len(self.time)
        small = self.network.get_source_side_min_cut()
        beyond = set(self.network.get_sink_side_min_cut())
        return {
            sum(1 << v for v in small if v < groups),
            sum(1 << v for v in range(groups) if v not in beyond),
        }

    def family(self) -> set[int]:
        """The cuts, and the ideals along two orders through a chain of them."""
        chain = [0]
        for ideal in sorted(self.ideals, key=lambda ideal: (ideal.bit_count(), ideal)):
            if chain[-1] & ideal == chain[-1]:
                chain.append(ideal)
        groups = range(len(self.time))
        part = [sum(not ideal >> v & 1 for ideal in chain) for v in groups]
        forth = _order(self.above, [(part[v], v) for v in groups])
        back = _order(self.above.T, [(-part[v], -v) for v in groups])[::-1]
        along = [accumulate(1 << v for v in order) for order in (forth, back)]
        return self.ideals.union(*along)

    def _synced(self) -> Numbers:
        """What a stage between two ranges has to synchronise at least."""
        nowhere = np.zeros(len(self.time), bool)
        free = np.where(self.costs == INFINITE, INFINITE, 0)
        roams = self.total - self.above.T @ self.time - self.above @ self.time
        sync = np.where(roams * ROAMING > self.total, 0, self.sync)
        unit = 32 << self.shift
        least, most = [], []
        for edge in self.edges[::EVERY]:
            inside = self.inside[self.edges.index(edge)]
            outside = self.above @ self.time > edge
            low, high = 0, int(sync.sum())
            for rate in RATES:
                price = 32 * sync - rate * self.time
                found = self._cut(inside, nowhere, price // unit, free) << self.shift
                low = max(low, found + rate * edge // 32)
                found = self._cut(nowhere, outside, -price // unit, free) << self.shift
                high = min(high, -(-rate * edge // 32) - found)
            least.append(low)
            most.append(high)
        ranges = np.arange(POSITIONS)
        later = np.array(least)[np.arange(POSITIONS + 1) // EVERY]
        earlier = np.array(most)[-(-(ranges + 1) // EVERY)]
        forced = (self.outside * self.sync) @ self.inside.T
        result: Numbers = np.maximum(forced, later - earlier[:, None])
        return result

    def bound(self, low: int, high: int, workers: int, most: int) -> int:
        """No period from `low` to below this one is enough; to a ten-thousandth, up to `high`."""
        synced = self._synced()
        while high - low > high // 10_000:
            period = (low + high) // 2
            if self._least_workers(period, most, synced) > workers:
                low = period + 1
            else:
                high = period
        return low

    def _least_workers(self, period: int, most: int, synced: Numbers) -> int:
        """At least so many are needed: stages go from range to range, links take the least live.

        A stage has the time between its ranges, and is synchronised for what is between them.
        """
        never = np.iinfo(np.int32).max // 2
        needed = np.array([-(-live // period) for live in self.live] + [0])
        start = np.array([*self.edges[:-1], self.total])
        least = np.full(POSITIONS + 1, never)
        least[-1] = 0

        def from_(end: int, first: int, own: int, between: Numbers) -> int:
            found = never
            for r in range(max(1, own), most + 1):
                weight = r * (start - end) + (r - 1) * between
                last = int(np.searchsorted(weight, r * r * period, "right"))
                fits = least[first:last]
                if first:  # the first stage does not pay for its end
                    fits = np.where(needed[first:last] <= r, fits, never)
                found = min(found, r + int(fits.min(initial=never)))
            return found

        for b in range(POSITIONS - 1, -1, -1):
            least[b] = from_(self.edges[b + 1], b + 1, int(needed[b]), synced[b])
        return from_(0, 0, 0, self.inside @ self.sync)


def _order(above: Flags, keys: list[tuple[int, int]]) -> list[int]:
    """Each group after all that it needs; of those that can be next, the least key first."""
    waiting = above.sum(axis=1) - 1
    ready = [(key, v) for v, key in enumerate(keys) if not waiting[v]]
    heapify(ready)
    order = []
    while ready:
        _, v = heappop(ready)
        order.append(v)
        waiting -= above[:, v]
        for w in np.flatnonzero(above[:, v] & (waiting == 0)).tolist():
            if w != v:
                heappush(ready, (keys[w], w))
    return order
