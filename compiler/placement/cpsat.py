"""The placement of one shape as an integer program, on OR-Tools CP-SAT (DESIGN section 6).

    p[v,k] = 1 iff group v is in a stage <= k         x[v,k] = p[v,k] - p[v,k-1]
    y[t,j,k] >= x[u,j] + x[c,k] - 1                   tensor t of u goes from stage j to stage k
    g[t] = 1                                          every stage on its way passes it on: then
    h[t,i] >= p[u,i] - p[c,i] + g[t] - 1              it goes from i to i+1, and not from j to k
    z[q,k] >= x[v,k] for each user v                  stage k holds tied parameter q
    r[k] = 1                                          stage k recomputes its forward
    minimise T >= compute[k], T >= load of every port, memory[k] <= limit

Loads are rounded down, and the exchange of tied parameters is counted as between two stages and
not at all on networks, so that the optimum is a lower bound; `evaluate` says what it is worth.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from typing import Any

import numpy as np

from p2bw.compiler.links import Port
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.evaluate import Shape, ring_bytes
from p2bw.compiler.placement.instance import PS, Instance
from p2bw.compiler.placement.relays import Relayed, judge
from p2bw.compiler.placement.stop import Stop, Tell, run_solver
from p2bw.compiler.placement.windows import (
    TOLERANCE,
    horizon_s,
    reduction,
    routes_of,
    stage_windows,
    stages_in,
)

SEED = 1
WORKERS = 8  # interleaved: with their number fixed, every machine gets the same answer
ALONE = 0.25  # share of the limit that one worker has for itself first
MAX_PAIRS = 60_000  # y variables beyond which a solve would not end
RESOLUTION = 2**30  # steps from 0 to the upper bound of T, and to the memory limit
MAX_REPAIRS = 20


@dataclass(frozen=True, slots=True)
class Result:
    """No placement of the shape is busy for less than `bound_s`; infinity: there is none."""

    bound_s: float
    stages: tuple[int, ...] | None  # better than the upper bound
    spent: float  # deterministic time
    relayed: Relayed = frozenset()  # with which they are


def solve_shape(
    instance: Instance,
    shape: Shape,
    recompute: Recompute,
    *,
    upper_s: float,
    hint: Sequence[int] | None,
    limit: float,
    stop: Stop,
    any_will_do: bool = False,
    tell: Tell | None = None,
) -> Result:
    """The placement whose busiest resource is busy for the least time, if below `upper_s`.

    `tell` hears now and then of the best time so far and its bound, in seconds.
    """
    windows = stage_windows(instance, shape.depth, recompute, upper_s)
    if any(first > last for first, last in windows):
        return Result(upper_s, None, 0.0)
    routes = routes_of(instance, windows)
    if sum(map(len, routes)) > MAX_PAIRS:
        return Result(0.0, None, 0.0)
    model = _Model(instance, shape, recompute, windows, routes, min(upper_s, horizon_s(instance)))
    model.stop, model.any_will_do, model.tell = stop, any_will_do, tell
    model.require_below(upper_s)
    best: tuple[int, ...] | None = None
    relayed: Relayed = frozenset()
    spent = bound_s = 0.0
    for _ in range(MAX_REPAIRS):
        found = model.minimise(hint, limit - spent)
        spent += found.spent
        bound_s = max(bound_s, min(found.bound_s, upper_s))
        if found.stages is None:
            break
        hint = found.stages
        judged = judge(instance, shape, hint, recompute, start=found.relayed)
        real = judged.evaluation
        if real.feasible and real.busiest_s < upper_s:
            best, relayed, upper_s = hint, judged.relayed, real.busiest_s
        if upper_s <= bound_s * (1 + TOLERANCE) or spent >= limit or stop():
            break
        if any_will_do and best is not None:
            break
        # Rounding, or what the program leaves out, made it look better than it is.
        model.forbid(hint)
        model.require_below(upper_s)
    return Result(bound_s, best, spent, relayed)


class _Sum:
    """A linear expression in whole numbers, built in place."""

    def __init__(self, constant: int = 0) -> None:
        self.constant = constant
        self._factors: dict[int, int] = {}
        self._literals: dict[int, Any] = {}

    def add(self, literal: Any, factor: int = 1) -> None:
        """Add a variable times a factor; a plain number stands for itself."""
        if isinstance(literal, int):
            self.constant += literal * factor
        elif factor:
            self._literals[literal.index] = literal
            self._factors[literal.index] = self._factors.get(literal.index, 0) + factor

    def plus(self, other: "_Sum", factor: int = 1) -> None:
        self.constant += other.constant * factor
        for index, literal in other._literals.items():
            self.add(literal, other._factors[index] * factor)

    @property
    def most(self) -> int:
        """An upper bound, all of its variables being Boolean."""
        return self.constant + sum(factor for factor in self._factors.values() if factor > 0)

    def expression(self) -> Any:
        from ortools.sat.python import cp_model

        used = [index for index, factor in self._factors.items() if factor]
        return self.constant + cp_model.LinearExpr.weighted_sum(
            [self._literals[index] for index in used], [self._factors[index] for index in used]
        )


@dataclass(frozen=True, slots=True)
class _Found:
    bound_s: float
    stages: tuple[int, ...] | None
    spent: float
    settled: bool  # nothing better is left
    relayed: Relayed = frozenset()


class _Model:
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
        self.stop = Stop()
        self.any_will_do = False
        self.tell: Tell | None = None
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

    def _at_least(self, left: _Sum, right: _Sum) -> Any:
        left.plus(right, -1)
        return self.model.add(left.expression() >= 0)

    def _x(self, v: int, k: int) -> _Sum:
        found = _Sum()
        found.add(self.p[v][k])
        if k:
            found.add(self.p[v][k - 1], -1)
        return found

    def _add(self, total: _Sum, values: Sequence[int] | np.ndarray[Any, Any], k: int) -> None:
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
            some = _Sum()
            self._add(some, [1] * self.instance.size, k)
            self._at_least(some, _Sum(1))
            for first, second in self.instance.apart:
                both = self._x(first, k)
                both.plus(self._x(second, k))
                self._at_least(_Sum(1), both)

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
                left = _Sum()
                left.add(y[j, k])
                self._at_least(left, both)
            # Implied, and what makes the linear relaxation tight: the tensor crosses boundary i.
            for i in range(self.shape.depth - 1):
                crosses = _Sum()
                for j, k in mine:
                    if j <= i < k:
                        crosses.add(y[j, k])
                apart = _Sum()
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
            left, right = _Sum(), _Sum()
            left.add(y[pair])
            right.add(goes)
            right.add(relay, -1)
            self._at_least(left, right)
        hops = {}
        first, last = min(j for j, _ in y), max(k for _, k in y)
        for i in range(first, last):
            hops[i] = self._literal(f"h_{t}_{i}")
            for c in edge.consumers:
                crosses = _Sum(-1)
                crosses.add(self.p[edge.producer][i])
                crosses.add(self.p[c][i], -1)
                crosses.add(relay)
                left = _Sum()
                left.add(hops[i])
                self._at_least(left, crosses)
        return hops

    def _holders(self, groups: tuple[int, ...]) -> list[Any]:
        z = []
        for k in range(self.shape.depth):
            held = self._literal(f"z_{groups[0]}_{k}")
            for group in groups:
                left = _Sum()
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
            shared = _Sum()
            self._ring(shared, k, (width > 1) / bandwidth)
            self._exchange(shared, k, bandwidth)
            for pairs in (
                [(k, other) for other in range(depth) if other != k],
                [(other, k) for other in range(depth) if other != k],
            ):
                load = _Sum()
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
        different = {
            (tuple(sorted(counts.items())), network.bandwidth(port))
            for port, counts in loads.items()
        }
        for counted, bandwidth in sorted(different):
            load = _Sum()
            for (j, k), count in counted:
                if j == k:
                    self._ring(load, k, count / bandwidth)
                else:
                    self._flow(load, j, k, count / bandwidth)
            self._busy(load)

    def _flow(self, load: _Sum, source: int, target: int, s_per_byte: float) -> None:
        """Add what stage `source` sends to stage `target`: tensors forward, gradients back."""
        low, high = min(source, target), max(source, target)
        for edge, y, hops in zip(self.instance.edges, self.y, self.h, strict=True):
            size = edge.bytes if source < target else edge.gradient
            for literal in (y.get((low, high)), hops.get(low) if high == low + 1 else None):
                if literal is not None:
                    load.add(literal, self._ticks(size * s_per_byte))

    def _ring(self, load: _Sum, k: int, s_per_byte: float) -> None:
        """Add the all-reduce between neighbouring replicas of a stage."""
        share = ring_bytes(1, self.shape.width, self._m) * s_per_byte
        self._add(load, [self._ticks(int(size) * share) for size in self.instance.gradients], k)
        for tied, z in zip(self.instance.tied, self.z, strict=True):
            load.add(z[k], self._ticks(tied.state.gradients * share))

    def _exchange(self, load: _Sum, k: int, bandwidth: float) -> None:
        """Add the gradients of tied parameters that stage k holds and another does too."""
        for tied in self.instance.tied:
            elsewhere = self._literal("")
            for here, there in permutations(tied.groups, 2):
                apart = self._x(here, k)
                apart.plus(self._x(there, k), -1)
                left = _Sum()
                left.add(elsewhere)
                self._at_least(left, apart)
            size = ring_bytes(tied.state.gradients, 2, self._m)
            load.add(elsewhere, self._ticks(size / bandwidth))

    @property
    def _m(self) -> int:
        return self.instance.problem.microbatches_at(self.shape.depth)

    def _ticks(self, seconds: float) -> int:
        """Time in whole steps of the resolution, rounded down."""
        return int(seconds * self.scale)

    def _busy(self, load: _Sum, only_if: Any = None) -> None:
        """T >= load."""
        if load.most > 0:
            constraint = self.model.add(self.period >= load.expression())
            if only_if is not None:
                constraint.only_enforce_if(only_if)

    def _recomputes(self, k: int) -> Any:
        return self._literal(f"r_{k}") if self.recompute == "auto" else self.recompute == "always"

    def _compute(self, k: int, again: Any) -> None:
        instance = self.instance
        for kind in self.shape.kinds(instance, k):
            self._compute_on(k, kind, again)

    def _compute_on(self, k: int, kind: int, again: Any) -> None:
        instance = self.instance
        load, more = _Sum(), _Sum()
        base = (instance.forward_ps + instance.backward_ps) / PS + instance.update_ps / PS / self._m
        self._add(load, [self._ticks(seconds) for seconds in base[kind].tolist()], k)
        for tied, z in zip(instance.tied, self.z, strict=True):
            load.add(z[k], self._ticks(tied.state.update_ps[kind] / PS / self._m))
        more.plus(load)
        forward = instance.forward_ps[kind] / PS
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
        versions = instance.versions(in_flight)
        fixed = _Sum()
        state = versions * instance.weights + instance.gradients + instance.optimizer
        self._add(fixed, (state + instance.buffers) // unit, k)
        for tied, z in zip(instance.tied, self.z, strict=True):
            held = tied.state
            size = versions * held.weights + held.gradients + held.optimizer
            fixed.add(z[k], size // unit)
        largest = self.model.new_int_var(0, int(instance.transient.max()) // unit, "")
        fixed.add(largest)
        for v, size in enumerate((instance.transient // unit).tolist()):
            if size and k in stages_in(self.windows[v]):
                own = _Sum()
                self._add(own, [0] * v + [size], k)
                self.model.add(largest >= own.expression())
        kept, recomputed = _Sum(), _Sum()
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

    def _any(self, literals: list[Any], exclusive: bool) -> _Sum:
        """1 iff some literal is; `exclusive` ones add up."""
        found = _Sum()
        if exclusive or len(literals) < 2:
            for literal in literals:
                found.add(literal)
            return found
        some = self._literal("")
        self.model.add_max_equality(some, literals)
        found.add(some)
        return found

    # ---- solving

    def require_below(self, upper_s: float) -> None:
        """Ask for better than a known period, by more than the tolerance."""
        if upper_s < np.inf:
            self.model.add(self.period <= self._ticks(upper_s * (1 - TOLERANCE)))

    def forbid(self, stages: Sequence[int]) -> None:
        """Exclude one placement."""
        changed = _Sum()
        for row, stage in zip(self.p, stages, strict=True):
            for k, literal in enumerate(row):
                if k >= stage:
                    changed.constant += 1
                    changed.add(literal, -1)
                else:
                    changed.add(literal)
        self._at_least(changed, _Sum(1))

    def minimise(self, hint: Sequence[int] | None, limit: float) -> _Found:
        """One worker first, which settles most models at once; then several, taking turns."""
        self.model.minimize(self.period)
        found = self._run(hint, limit * ALONE, 1)
        if found.settled or self.stop() or (self.any_will_do and found.stages is not None):
            return found
        # Without a feasible hint none is given: where one worker sees at once that a model has no
        # solution, interleaved search (OR-Tools 9.15) aborts the process while it tries a hint.
        more = self._run(found.stages, limit - found.spent, WORKERS)
        return replace(
            more,
            bound_s=max(found.bound_s, more.bound_s),
            stages=more.stages or found.stages,
            relayed=more.relayed if more.stages else found.relayed,
            spent=found.spent + more.spent,
        )

    def _run(self, hint: Sequence[int] | None, limit: float, workers: int) -> _Found:
        from ortools.sat.python import cp_model

        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for row, stage in zip(self.p, hint or (), strict=hint is not None):
            for k, literal in enumerate(row):
                if not isinstance(literal, int):
                    self.model.add_hint(literal, k >= stage)
        solver = cp_model.CpSolver()
        solver.parameters.random_seed = SEED
        solver.parameters.num_workers = workers
        solver.parameters.interleave_search = workers > 1
        solver.parameters.max_deterministic_time = max(limit, 0.01)
        solver.parameters.catch_sigint_signal = False
        solver.parameters.stop_after_first_solution = self.any_will_do
        tell = self.tell
        status = run_solver(
            solver,
            self.model,
            self.stop,
            tell and (lambda best, bound: tell(best / self.scale, bound / self.scale)),
        )
        assert status != cp_model.MODEL_INVALID, self.model.validate()
        spent = solver.response_proto.deterministic_time
        if status == cp_model.INFEASIBLE:
            return _Found(np.inf, None, spent, True)
        bound_s = max(0.0, solver.best_objective_bound) / self.scale
        if status == cp_model.UNKNOWN:
            return _Found(bound_s, None, spent, False)
        stages = tuple(
            sum(not (lit if isinstance(lit, int) else solver.boolean_value(lit)) for lit in row)
            for row in self.p
        )
        relayed = frozenset(
            t for t, literal in self.relays.items() if solver.boolean_value(literal)
        )
        return _Found(bound_s, stages, spent, status == cp_model.OPTIMAL, relayed)
