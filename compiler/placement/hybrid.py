"""The best pipeline of a VariantProblem: how its stages are cut, replicated and sharded, and which
variant each node runs.

Is there a plan whose stages are all busy for T at most? Built from the last stage to the first, a
plan for what lies after an ideal matters by two numbers only: its replicas, which are what the
stages before it have in flight, and its devices; fewer of both is never worse. So ideals are
reached in the order of devices, each with the (devices, replicas) that no other plan for it beats,
and only where the devices of either side can do the work of that side by T. Bisection over T ends
when nothing is below the best plan found.

Loads are whole steps over a number of replicas, and compared exactly.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from p2bw.compiler.placement.ideals import Family, make_family
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.knapsack import StoppedError
from p2bw.compiler.placement.sharding import AMPLE, Tables, tabulate
from p2bw.compiler.placement.staging import Shape, Stager
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.placement.variants import StageCost, VariantProblem, VariantStage, judge_stages
from p2bw.compiler.placement.windows import TOLERANCE
from p2bw.compiler.units import data
from p2bw.contract.errors import InfeasibleError, TimeLimitError

MAX_IDEALS = 60_000
MANY = 2_000  # ideals: too many to try every memory on
ROUGH = 1000  # the memory that an infeasible problem needs is found to one part in so many

Use = tuple[int, int]  # devices, replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridPlacement:
    """Stages in order, with what each costs; no plan is below `bound`."""

    objective: float
    bound: float
    stages: tuple[VariantStage, ...]
    costs: tuple[StageCost, ...]
    settled_by: str


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage between two ideals, and what the stages after it use."""

    shape: Shape
    target: int
    after: Use


@dataclass(frozen=True, slots=True)
class _Plan:
    """Stages, and what the busiest is busy for, in steps."""

    busiest: Fraction
    stages: tuple[VariantStage, ...]


def solve_hybrid(
    problem: VariantProblem, devices: int, *, replicated: bool, stop: Stop | None = None
) -> HybridPlacement:
    """The plan on at most so many devices whose busiest stage is least so.

    A stage has one device; or, where `replicated`, any number of replicas that divides the
    microbatches of a batch, each on as many devices as its nodes have variants for.
    """
    stop = stop or Stop()
    tables = tabulate(problem, devices, replicated=replicated)
    rough = _Search(problem, tables, make_family(tables, 0), stop)
    plan, _ = rough.minimise(None)
    family = make_family(tables, MAX_IDEALS)
    if family.complete:
        settled_by = f"dynamic program over {len(family.members)} ideals"
        plan, bound = _Search(problem, tables, family, stop).minimise(plan)
    else:
        settled_by = f"dynamic program over {len(rough.members)} of very many ideals"
        bound = rough.floor()
    if bound is not None and stop():
        settled_by += f"; stopped by {stop.reason}"
    if plan is None:
        raise stop.error() if stop() else _refusal(problem, tables, family, devices)
    costs = judge_stages(problem, plan.stages)
    objective = max(cost.load for cost in costs)
    return HybridPlacement(
        objective=objective,
        bound=objective if bound is None else min(objective, bound / tables.steps),
        stages=plan.stages,
        costs=costs,
        settled_by=settled_by,
    )


def _refusal(problem: VariantProblem, tables: Tables, family: Family, devices: int) -> Exception:
    """Why there is no plan: how much memory one needs."""
    more = " or more devices (--stages)" if tables.devices == devices else ""
    if not family.complete and tables.room.sum() <= tables.devices * tables.capacity:
        return TimeLimitError("no plan found, and none ruled out; offer more memory (--memory)")
    if len(family.members) > MANY:
        family = make_family(tables, 0)

    def fits(memory: int) -> bool:
        tight = replace(tables, capacity=min(AMPLE, int(memory * tables.units)))
        return _Search(problem, tight, family, Stop()).plan_below(Fraction(AMPLE)) is not None

    low, high = math.floor(problem.memory), math.ceil(AMPLE / tables.units)
    if not fits(high):
        return InfeasibleError(
            f"no plan fits on {devices} devices, however much they can hold: the nodes' variants "
            "need more; offer more devices (--stages)"
        )
    while high - low > max(1, low // ROUGH):
        middle = (low + high) // 2 if low < ROUGH else max(low + 1, math.isqrt(low * high))
        low, high = (low, middle) if fits(middle) else (middle, high)
    return InfeasibleError(
        f"no plan fits: the best one known for {devices} devices needs {high} bytes "
        f"({data(high)}) on one of them, and a device holds {data(problem.memory)}; offer more "
        f"memory (--memory){more}"
    )


class _Search:
    """Plans along the ideals of a family."""

    def __init__(self, problem: VariantProblem, tables: Tables, family: Family, stop: Stop) -> None:
        self.problem, self.tables, self.stop = problem, tables, stop
        self.members = members = family.members
        self.stager = Stager(tables, family, stop)
        crossing = self.stager.started * self.stager.open
        done, held = members @ tables.work, members @ tables.room
        self.before = done + crossing @ tables.sent
        self.after = tables.work.sum() - done + crossing @ tables.received
        self.held = held, tables.room.sum() - held

    def floor(self) -> int:
        """No busiest stage is busy for less."""
        return math.ceil(float(self.tables.work.sum()) / self.tables.devices)

    def minimise(self, best: _Plan | None) -> tuple[_Plan | None, int | None]:
        """The best plan, if it is better than one known, and what none is below.

        Without a bound, the plan is proven to be the best; or there is none, if that is None.
        """
        low = self.floor()
        try:
            best = best or self.plan_below(Fraction(AMPLE))
            while best and (better := self.plan_below(best.busiest)):
                best = better
                while low < best.busiest * (1 - Fraction(TOLERANCE)):
                    middle = (low + math.floor(best.busiest)) // 2
                    better = self.plan_below(Fraction(middle))
                    low, best = (low, better) if better else (middle, best)
        except StoppedError:
            return best, low
        return best, None

    def plan_below(self, limit: Fraction) -> _Plan | None:
        """A plan whose stages are all busy for less, in steps; None: there is none."""
        # Of d replicas together: less than d times the limit.
        counts = range(1, self.tables.devices + 1)
        caps = [0, *(min(AMPLE, math.ceil(d * limit) - 1) for d in counts)]
        settled = self._settle(caps)
        if settled is None:
            return None
        row, use = 0, min(settled[0])
        stages, busiest = [], Fraction(0)
        while row < len(self.members) - 1:
            stage = settled[row][use]
            load, places = self.stager.choose(stage.shape, row, stage.target)
            busiest = max(busiest, Fraction(load, stage.shape.replicas))
            stages.append(self._stage(stage.shape, places))
            row, use = stage.target, stage.after
        return _Plan(busiest, tuple(stages))

    def _stage(self, shape: Shape, places: dict[int, int]) -> VariantStage:
        degree = self.tables.shardings[shape.sharding].degree
        places = dict(sorted((self.tables.order[v], place) for v, place in places.items()))
        nodes = self.problem.nodes
        return VariantStage(
            nodes=tuple(places),
            variants=tuple(nodes[v].variants[degree][place] for v, place in places.items()),
            replicas=shape.replicas,
            degree=degree,
        )

    def _settle(self, caps: list[int]) -> list[dict[Use, _Stage]] | None:
        """By ideal: the uses of plans for what lies after it, each with its first stage.

        None: there is no plan for everything.
        """
        least, most = self._windows(caps)
        last, everything = len(self.members) - 1, (0, 0)
        settled: list[dict[Use, _Stage]] = [{} for _ in self.members]
        reached: dict[Use, dict[int, _Stage]] = {}
        queue: list[Use] = [everything]
        fewest = np.full(len(self.members), AMPLE)  # replicas among those settled
        soon = np.full((2, len(self.members)), AMPLE)  # a use that will be settled
        while queue:
            if self.stop():
                raise StoppedError
            use = heapq.heappop(queue)
            rows = [last] if use == everything else self._accept(use, reached, settled, fewest)
            if 0 in rows:
                return settled
            targets = np.array(rows, np.int64)
            for shape, now in self._shapes(use) if rows else ():
                open_ = (least <= now[0]) & (now[0] <= most) & (now[1] < fewest)
                open_ &= (soon[0] > now[0]) | (soon[1] > now[1])
                sources = np.flatnonzero(open_)
                cap = caps[shape.replicas]
                found = self.stager.feasible(shape, sources, targets, cap)
                if not len(found[0]):
                    continue
                if now not in reached:
                    heapq.heappush(queue, now)
                waiting = reached.setdefault(now, {})
                for source, target in zip(*(ends.tolist() for ends in found), strict=True):
                    waiting[source] = _Stage(shape, target, use)
                better = found[0][(soon[:, found[0]] >= np.array([now]).T).all(axis=0)]
                soon[:, better] = np.array([now]).T
        return None

    def _accept(
        self,
        use: Use,
        reached: dict[Use, dict[int, _Stage]],
        settled: list[dict[Use, _Stage]],
        fewest: Numbers,
    ) -> list[int]:
        """Settle the ideals reached by a use, save those that have a better one."""
        rows = sorted(row for row in reached[use] if use[1] < fewest[row])
        for row in rows:
            settled[row][use] = reached[use][row]
            fewest[row] = use[1]
        del reached[use]
        return rows

    def _shapes(self, after: Use) -> Iterator[tuple[Shape, Use]]:
        """The stages that can come before a use, the smallest first, and the use with each."""
        for sharding, own in enumerate(self.tables.shardings):
            for replicas in self.tables.replicas:
                now = after[0] + replicas * own.degree, after[1] + replicas
                if now[0] > self.tables.devices or now[1] > self.tables.most_replicas:
                    break
                yield Shape(sharding, replicas, -(-now[1] // replicas)), now

    def _windows(self, caps: list[int]) -> tuple[Numbers, Numbers]:
        """The fewest and the most devices that can be after each ideal."""
        held = [np.ceil(part / max(1, self.tables.capacity)) for part in self.held]
        after = np.maximum(np.searchsorted(caps, self.after), held[1])
        before = np.maximum(np.searchsorted(caps, self.before), held[0])
        return after, self.tables.devices - before
