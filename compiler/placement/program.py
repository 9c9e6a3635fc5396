"""The placement of one shape as an integer program, on OR-Tools CP-SAT (DESIGN section 6).

    p[v,k] = 1 iff group v is in a stage <= k         x[v,k] = p[v,k] - p[v,k-1]
    y[t,j,k] >= x[u,j] + x[c,k] - 1                   tensor t of u goes from stage j to stage k
    g[t] = 1                                          every stage on its way passes it on: then
    h[t,i] >= p[u,i] - p[c,i] + g[t] - 1              it goes from i to i+1, and not from j to k
    z[q,k] >= x[v,k] for each user v                  stage k holds tied parameter q
    r[k] = 1                                          stage k recomputes its forward
    minimise T >= compute[k], T >= load of every port, memory[k] <= limit

Loads are rounded down, and the exchange of tied parameters is counted as between two stages, on
networks only where it cannot but pass, so that the optimum is a lower bound; `evaluate` says what
it is worth.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations, product
from typing import Any

import numpy as np

from p2bw.compiler.links import Port, reverse
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.evaluate import Shape, ring_bytes, ring_s
from p2bw.compiler.placement.instance import PS, Instance
from p2bw.compiler.placement.sums import Sum
from p2bw.compiler.placement.windows import reduction, stages_in

RESOLUTION = 2**30  # steps from 0 to the upper bound of T, and to the memory limit


class Model:
    """Variables and constraints; a variable that its window fixes is a plain 0 or 1."""

    def __init__(
        self,
        instance: Instance,
        shape: Shape,
        recompute: Recompute,
        windows: list[tuple[int, int]],
        routes: list[list[tuple[int, int]]],
        upper_s: float,
    ) -> None:
        from ortools.sat.python import cp_model

        self.instance = instance
        self.shape = shape
        self.recompute = recompute
        self.windows = windows
        self.routes = routes
        self.model = cp_model.CpModel()
        self.scale = RESOLUTION / upper_s if upper_s else 1.0
        self.period = self.model.new_int_var(0, RESOLUTION, "T")
        self.p = [
            [
                0 if k < first else 1 if k >= last else self._literal(f"p_{v}_{k}")
                for k in range(shape.depth)
            ]
            for v, (first, last) in enumerate(windows)
        ]
        self._order()
        self.relays: dict[int, Any] = {}
        self.y = [self._tensor(t) for t in range(len(routes))]
        self.h = [self._hops(t) for t in range(len(routes))]
        self.z = [self._holders(tied.groups) for tied in instance.tied]
        self._ports()
        self._uplinks()
        for k in range(shape.depth):
            again = self._recomputes(k)
            self._compute(k, again)
            self._memory(k, again)

    def _literal(self, name: str) -> Any:
        return self.model.new_bool_var(name)

    def _at_least(self, left: Sum, right: Sum) -> Any:
        left.plus(right, -1)
        return self.model.add(left.expression() >= 0)

    def _x(self, v: int, k: int) -> Sum:
        found = Sum()
        found.add(self.p[v][k])
        if k:
            found.add(self.p[v][k - 1], -1)
        return found

    def _add(self, total: Sum, values: Sequence[int] | np.ndarray[Any, Any], k: int) -> None:
        """Add sum over v of values[v] * x[v,k]."""
        for v, value in enumerate(values):
            if value and k in stages_in(self.windows[v]):
                total.plus(self._x(v, k), int(value))

    def _order(self) -> None:
        """p grows with k; data flows forward; no stage is empty; what the user keeps apart."""
        stages = range(self.shape.depth)
        for row in self.p:
            for early, late in pairwise(row):
                self._implies(early, late)
        for u, v in reduction(self.instance.predecessors):
            for k in stages:
                self._implies(self.p[v][k], self.p[u][k])
        for k in stages:
            some = Sum()
            self._add(some, [1] * self.instance.size, k)
            self._at_least(some, Sum(1))
            for first, second in self.instance.apart:
                both = self._x(first, k)
                both.plus(self._x(second, k))
                self._at_least(Sum(1), both)

    def _implies(self, a: Any, b: Any) -> None:
        """Literal a <= literal b."""
        if not (isinstance(a, int) and a == 0) and not (isinstance(b, int) and b == 1):
            self.model.add(a <= b)

    def _tensor(self, t: int) -> dict[tuple[int, int], Any]:
        edge = self.instance.edges[t]
        y = {(j, k): self._literal(f"y_{t}_{j}_{k}") for j, k in self.routes[t]}
        for c in edge.consumers:
            mine = [(j, k) for j, k in y if k in stages_in(self.windows[c])]
            for j, k in mine:
                both = self._x(edge.producer, j)
                both.plus(self._x(c, k))
                both.constant -= 1
                left = Sum()
                left.add(y[j, k])
                self._at_least(left, both)
            # Implied, and what makes the linear relaxation tight: the tensor crosses boundary i.
            for i in range(self.shape.depth - 1):
                crosses = Sum()
                for j, k in mine:
                    if j <= i < k:
                        crosses.add(y[j, k])
                apart = Sum()
                apart.add(self.p[edge.producer][i])
                apart.add(self.p[c][i], -1)
                if apart.most > 0:
                    self._at_least(crosses, apart)
        return y

    def _hops(self, t: int) -> dict[int, Any]:
        """By stage, whether it passes the tensor to the next; takes what is passed on out of y."""
        edge, y = self.instance.edges[t], self.y[t]
        if not (edge.bytes or edge.gradient) or all(k - j == 1 for j, k in y):
            return {}
        relay = self.relays[t] = self._literal(f"g_{t}")
        for pair, goes in y.items():
            y[pair] = self._literal("")
            left, right = Sum(), Sum()
            left.add(y[pair])
            right.add(goes)
            right.add(relay, -1)
            self._at_least(left, right)
        hops = {}
        first, last = min(j for j, _ in y), max(k for _, k in y)
        for i in range(first, last):
            hops[i] = self._literal(f"h_{t}_{i}")
            for c in edge.consumers:
                crosses = Sum(-1)
                crosses.add(self.p[edge.producer][i])
                crosses.add(self.p[c][i], -1)
                crosses.add(relay)
                left = Sum()
                left.add(hops[i])
                self._at_least(left, crosses)
        return hops

    def _holders(self, groups: tuple[int, ...]) -> list[Any]:
        z = []
        for k in range(self.shape.depth):
            held = self._literal(f"z_{groups[0]}_{k}")
            for group in groups:
                left = Sum()
                left.add(held)
                self._at_least(left, self._x(group, k))
            z.append(held)
        return z

    def _ports(self) -> None:
        """Every device's port, out and in; the replicas of a stage are alike."""
        depth, width = self.shape.depth, self.shape.width
        bandwidth_of = self.instance.network.device_bandwidth
        for k in range(depth):
            bandwidth = min(bandwidth_of(self.shape.rank(k, r)) for r in range(width))
            shared = Sum()
            self._ring(shared, k, (width > 1) / bandwidth)
            self._exchange(shared, k, bandwidth)
            for pairs in (
                [(k, other) for other in range(depth) if other != k],
                [(other, k) for other in range(depth) if other != k],
            ):
                load = Sum()
                load.plus(shared)
                for source, target in pairs:
                    self._flow(load, source, target, 1 / bandwidth)
                self._busy(load)

    def _uplinks(self) -> None:
        """Every other port or wire, one way and the other; equal loads once."""
        shape, network = self.shape, self.instance.network
        loads: dict[Port, dict[tuple[int, int], int]] = {}
        for r, j, k in product(range(shape.width), range(shape.depth), range(shape.depth)):
            # A stage with itself: the ring of its replicas.
            peer = shape.rank(k, r if j != k else (r + 1) % shape.width)
            for port in network.route(shape.rank(j, r), peer):
                if port[0] != 0:
                    counts = loads.setdefault(port, defaultdict(int))
                    counts[j, k] += 1
        for k, port in self._alone():
            if port in loads:
                loads[port][k, -1] += 1
        different = {
            (tuple(sorted(counts.items())), network.bandwidth(port))
            for port, counts in loads.items()
        }
        for counted, bandwidth in sorted(different):
            load = Sum()
            for (j, k), count in counted:
                if j == k:
                    self._ring(load, k, count / bandwidth)
                elif k < 0:
                    self._exchange(load, j, bandwidth / count)
                else:
                    self._flow(load, j, k, count / bandwidth)
            self._busy(load)

    def _alone(self) -> Iterator[tuple[int, Port]]:
        """For each replica of a stage, the ports that all it exchanges with other stages passes."""
        shape, network = self.shape, self.instance.network
        for k, r in product(range(shape.depth), range(shape.width)):
            own = shape.rank(k, r)
            routes = [
                set(network.route(own, shape.rank(j, r))) for j in range(shape.depth) if j != k
            ]
            for port in set.intersection(*routes) if routes else ():
                if port[0] != 0:
                    yield k, port
                    yield k, reverse(port)

    def _flow(self, load: Sum, source: int, target: int, s_per_byte: float) -> None:
        """Add what stage `source` sends to stage `target`: tensors forward, gradients back."""
        low, high = min(source, target), max(source, target)
        for edge, y, hops in zip(self.instance.edges, self.y, self.h, strict=True):
            size = edge.bytes if source < target else edge.gradient
            for literal in (y.get((low, high)), hops.get(low) if high == low + 1 else None):
                if literal is not None:
                    load.add(literal, self._ticks(size * s_per_byte))

    def _ring(self, load: Sum, k: int, s_per_byte: float) -> None:
        """Add the all-reduce between neighbouring replicas of a stage."""
        share = ring_bytes(1, self.shape.width, self._slots) * s_per_byte
        self._add(load, [self._ticks(int(size) * share) for size in self.instance.gradients], k)
        for tied, z in zip(self.instance.tied, self.z, strict=True):
            load.add(z[k], self._ticks(tied.state.gradients * share))

    def _exchange(self, load: Sum, k: int, bandwidth: float) -> None:
        """Add the gradients of tied parameters that stage k holds and another does too."""
        for tied in self.instance.tied:
            elsewhere = self._literal("")
            for here, there in permutations(tied.groups, 2):
                apart = self._x(here, k)
                apart.plus(self._x(there, k), -1)
                left = Sum()
                left.add(elsewhere)
                self._at_least(left, apart)
            size = ring_bytes(tied.state.gradients, 2, self._slots)
            load.add(elsewhere, self._ticks(size / bandwidth))

    @property
    def _slots(self) -> int:
        return self.instance.slots(self.shape.depth)

    def _ticks(self, seconds: float) -> int:
        """Time in whole steps of the resolution, rounded down."""
        return int(seconds * self.scale)

    def _busy(self, load: Sum, only_if: Any = None) -> None:
        """T >= load."""
        if load.most > 0:
            constraint = self.model.add(self.period >= load.expression())
            if only_if is not None:
                constraint.only_enforce_if(only_if)

    def _recomputes(self, k: int) -> Any:
        return self._literal(f"r_{k}") if self.recompute == "auto" else self.recompute == "always"

    def _compute(self, k: int, again: Any) -> None:
        instance = self.instance
        shape, summing_s = self.shape, ring_s(instance, self.shape, k)
        exposed = instance.exposed(k, shape.depth, shape.width)
        for kind in shape.kinds(instance, k):
            self._compute_on(k, kind, again, 1.0, 1.0 - instance.drains, 0.0)
            if exposed is not None:
                self._compute_on(k, kind, again, exposed / self._slots, 1.0, summing_s)

    def _compute_on(
        self, k: int, kind: int, again: Any, share: float, update: float, summing_s: float
    ) -> None:
        """T >= a share of the stage's work and, per slot, its update and the sum over replicas."""
        instance, slots = self.instance, self._slots
        load, more = Sum(), Sum()
        base = (instance.forward_ps[kind] + instance.backward_ps[kind]) / PS * share
        base += (instance.update_ps[kind] / PS * update + instance.gradients * summing_s) / slots
        self._add(load, [self._ticks(seconds) for seconds in base.tolist()], k)
        for tied, z in zip(instance.tied, self.z, strict=True):
            state = tied.state
            seconds = (state.update_ps[kind] / PS * update + state.gradients * summing_s) / slots
            load.add(z[k], self._ticks(seconds))
        more.plus(load)
        forward = instance.forward_ps[kind] / PS * share
        self._add(more, [self._ticks(seconds) for seconds in forward.tolist()], k)
        if isinstance(again, bool):
            self._busy(more if again else load)
        else:
            self._busy(load)
            self._busy(more, again)

    def _memory(self, k: int, again: Any) -> None:
        """Memory of stage k within the limit, both rounded in favour of fitting."""
        instance = self.instance
        room = min(map(instance.room, self.shape.kinds(instance, k)))
        unit = max(1, room // RESOLUTION)
        in_flight = instance.in_flight(k, self.shape.depth)
        versions = instance.versions(in_flight, self.shape.depth)
        copies = instance.gradient_copies(self.shape.width)
        fixed = Sum()
        self._add(fixed, (instance.held(versions, copies) + instance.buffers) // unit, k)
        for tied, z in zip(instance.tied, self.z, strict=True):
            fixed.add(z[k], tied.state.bytes(versions, copies) // unit)
        largest = self.model.new_int_var(0, int(instance.transient.max()) // unit, "")
        fixed.add(largest)
        for v, size in enumerate((instance.transient // unit).tolist()):
            if size and k in stages_in(self.windows[v]):
                own = Sum()
                self._add(own, [0] * v + [size], k)
                self.model.add(largest >= own.expression())
        kept, recomputed = Sum(), Sum()
        for edge, y, hops in zip(instance.edges, self.y, self.h, strict=True):
            if k in hops:
                fixed.add(hops[k], (edge.bytes + edge.gradient) // unit)
            if k - 1 in hops:
                fixed.add(hops[k - 1], (edge.bytes + edge.gradient) // unit)
                kept.add(hops[k - 1], in_flight * edge.bytes * edge.saved // unit)
                recomputed.add(hops[k - 1], in_flight * edge.bytes // unit)
            sent = [(target, literal) for (source, target), literal in y.items() if source == k]
            some = self._any([literal for _, literal in sent], len(edge.consumers) == 1)
            fixed.plus(some, edge.bytes // unit)
            for target, literal in sent:
                fixed.add(literal, edge.gradient * (target - k) // unit)
            for (source, target), literal in y.items():
                if target == k:
                    fixed.add(literal, (edge.bytes * (k - source) + edge.gradient) // unit)
                    kept.add(literal, in_flight * edge.bytes * edge.saved // unit)
                    recomputed.add(literal, in_flight * edge.bytes // unit)
        self._add(kept, in_flight * instance.stash // unit, k)
        self._add(recomputed, instance.stash // unit, k)
        for total, only_if in ((kept, False), (recomputed, True)):
            if isinstance(again, bool) and again != only_if:
                continue
            total.plus(fixed)
            constraint = self.model.add(total.expression() <= room // unit)
            if not isinstance(again, bool):
                constraint.only_enforce_if(again if only_if else again.negated())

    def _any(self, literals: list[Any], exclusive: bool) -> Sum:
        """1 iff some literal is; `exclusive` ones add up."""
        found = Sum()
        if exclusive or len(literals) < 2:
            for literal in literals:
                found.add(literal)
            return found
        some = self._literal("")
        self.model.add_max_equality(some, literals)
        found.add(some)
        return found
