"""The best placement of one shape by OR-Tools CP-SAT, and its proof; see program.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.instance import Instance
from p2bw.compiler.placement.program import Model
from p2bw.compiler.placement.relays import Relayed, judge
from p2bw.compiler.placement.stop import Stop, Tell, run_solver
from p2bw.compiler.placement.sums import Sum
from p2bw.compiler.placement.windows import (
    TOLERANCE,
    horizon_s,
    routes_of,
    stage_windows,
)

SEED = 1
WORKERS = 8  # interleaved: with their number fixed, every machine gets the same answer
ALONE = 0.25  # share of the limit that one worker has for itself first
MAX_PAIRS = 60_000  # y variables beyond which a solve would not end
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
    model = _Solver(instance, shape, recompute, windows, routes, min(upper_s, horizon_s(instance)))
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


@dataclass(frozen=True, slots=True)
class _Found:
    bound_s: float
    stages: tuple[int, ...] | None
    spent: float
    settled: bool  # nothing better is left
    relayed: Relayed = frozenset()


class _Solver(Model):
    """The program, asked for better placements within limits."""

    stop = Stop()
    any_will_do = False
    tell: Tell | None = None

    def require_below(self, upper_s: float) -> None:
        """Ask for better than a known period, by more than the tolerance."""
        if upper_s < np.inf:
            self.model.add(self.period <= self._ticks(upper_s * (1 - TOLERANCE)))

    def forbid(self, stages: Sequence[int]) -> None:
        """Exclude one placement."""
        changed = Sum()
        for row, stage in zip(self.p, stages, strict=True):
            for k, literal in enumerate(row):
                if k >= stage:
                    changed.constant += 1
                    changed.add(literal, -1)
                else:
                    changed.add(literal)
        self._at_least(changed, Sum(1))

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
