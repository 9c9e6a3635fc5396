"""A LoadProblem with more ideals than can be listed, as an integer program on CP-SAT.

    p[v,k] = 1 iff group v is on a device <= k        x[v,k] = p[v,k] - p[v,k-1]
    cut[t,k] >= x[u,k] - x[v,k], u and v next to each other in the circle of t's ends
    minimise T >= time[k] + sum of cost * cut[t,k]

Loads are rounded down, so that the optimum is a lower bound.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from p2bw.compiler.placement.contract import Loads
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.stop import Stop, run_solver
from p2bw.compiler.placement.windows import reduction

RESOLUTION = 2**30  # steps from 0 to the upper bound of T
SEED = 1
WORKERS = 8  # interleaved: with their number fixed, every machine gets the same answer


@dataclass(frozen=True, slots=True)
class Found:
    """What the program proved, and the placement of groups and CPUs that it found, if any."""

    bound: float  # in steps of the loads
    stages: tuple[int, ...] | None
    cpus: tuple[bool, ...]  # by device


def solve_program(
    loads: Loads, devices: tuple[int, int], upper: float, limit: float, stop: Stop
) -> Found:
    """The least busiest device, below `upper`, in a limit of deterministic time.

    A bound of infinity: there is nothing below.
    """
    return _Program(loads, devices, upper).minimise(limit, stop)


class _Program:
    """Variables and constraints; a variable that its window fixes is a plain 0 or 1."""

    def __init__(self, loads: Loads, devices: tuple[int, int], upper: float) -> None:
        self.loads = loads
        self.model = cp_model.CpModel()
        self.scale = RESOLUTION / upper if upper else 1.0
        self.depth = sum(devices)
        self.busiest = self.model.new_int_var(0, RESOLUTION - 1, "T")
        self.cpu: list[Any] = [0] * self.depth
        windows = [(0, self.depth - 1)] * len(loads.predecessors)
        if devices[1]:
            self.cpu = [self.model.new_bool_var(f"cpu_{k}") for k in range(self.depth)]
            self.model.add(sum(self.cpu) == devices[1])
        else:
            windows = _windows(loads, self.depth, upper)
        self.possible = all(first <= last for first, last in windows)
        self.p = [
            [
                0 if k < first else 1 if k >= last else self.model.new_bool_var(f"p_{v}_{k}")
                for k in range(self.depth)
            ]
            for v, (first, last) in enumerate(windows)
        ]
        self._order()
        for k in range(self.depth):
            self._device(k)

    def _x(self, v: int, k: int) -> Any:
        return self.p[v][k] - (self.p[v][k - 1] if k else 0)

    def _fixed(self, value: Any) -> bool:
        return isinstance(value, int)

    def _implies(self, a: Any, b: Any) -> None:
        """Literal a <= literal b."""
        if not (self._fixed(a) and a == 0) and not (self._fixed(b) and b == 1):
            self.model.add(a <= b)

    def _order(self) -> None:
        for row in self.p:
            for early, late in pairwise(row):
                self._implies(early, late)
        for u, v in reduction(self.loads.predecessors):
            for k in range(self.depth):
                self._implies(self.p[v][k], self.p[u][k])

    def _device(self, k: int) -> None:
        """Load, memory and kind of device k."""
        loads, cpu = self.loads, self.cpu[k]
        here = [
            v for v, row in enumerate(self.p) if not self._fixed(self._x(v, k)) or self._x(v, k)
        ]
        x = {v: self._x(v, k) for v in here}
        terms = [self._ticks(loads.time[v]) * x[v] for v in here]
        terms += [self._ticks(cost) * self._cut(ends, x) for ends, cost in loads.cuts]
        size = sum(int(loads.size[v]) * literal for v, literal in x.items())
        limits = [self.busiest >= sum(terms)]
        if int(loads.size.sum()) > loads.memory:
            limits.append(size <= loads.memory)
        limits += [literal == 0 for v, literal in x.items() if loads.unaccelerated[v]]
        for limit in limits:
            if isinstance(limit, bool | np.bool_):
                if not limit:
                    self.model.add_bool_or([] if self._fixed(cpu) else [cpu])
                continue
            constraint = self.model.add(limit)
            if not self._fixed(cpu):
                constraint.only_enforce_if(cpu.negated())
        if not self._fixed(cpu):
            busy = sum(self._ticks(loads.cpu_time[v]) * literal for v, literal in x.items())
            self.model.add(self.busiest >= busy).only_enforce_if(cpu)

    def _cut(self, ends: tuple[int, ...], inside: dict[int, Any]) -> Any:
        """1 if some ends are inside and some are not."""
        values = [inside.get(end, 0) for end in ends]
        if all(map(self._fixed, values)):
            return int(0 < sum(values) < len(values))
        cut = self.model.new_bool_var("")
        for one, other in zip(values, values[1:] + values[:1], strict=True):
            self.model.add(cut >= one - other)
        return cut

    def _ticks(self, steps: int) -> int:
        """Loads in whole ticks of the resolution, rounded down."""
        return int(int(steps) * self.scale)

    def minimise(self, limit: float, stop: Stop) -> Found:
        if not self.possible:
            return Found(np.inf, None, ())
        self.model.minimize(self.busiest)
        solver = cp_model.CpSolver()
        solver.parameters.random_seed = SEED
        solver.parameters.num_workers = WORKERS
        solver.parameters.interleave_search = True
        solver.parameters.max_deterministic_time = limit
        solver.parameters.catch_sigint_signal = False
        status = run_solver(solver, self.model, stop)
        assert status != cp_model.MODEL_INVALID, self.model.validate()
        if status == cp_model.INFEASIBLE:
            return Found(np.inf, None, ())
        bound = max(0.0, solver.best_objective_bound) / self.scale
        if status == cp_model.UNKNOWN:
            return Found(bound, None, ())

        def value(literal: Any) -> bool:
            return bool(literal if self._fixed(literal) else solver.boolean_value(literal))

        stages = tuple(sum(not value(literal) for literal in row) for row in self.p)
        return Found(bound, stages, tuple(map(value, self.cpu)))


def _windows(loads: Loads, depth: int, upper: float) -> list[tuple[int, int]]:
    """First and last device of each group: all that must come before it, or after, needs room."""
    above = np.eye(len(loads.predecessors), dtype=bool)
    for v, before in enumerate(loads.predecessors):
        for u in before:
            above[v] |= above[u]

    def needed(work: Numbers) -> list[int]:
        devices = np.ceil(work / upper * (1 - 1e-9)) if upper else np.ones(len(work))
        return [max(1, int(count)) for count in devices]

    first, last = needed(above @ loads.time), needed(above.T @ loads.time)
    return [(early - 1, depth - late) for early, late in zip(first, last, strict=True)]
