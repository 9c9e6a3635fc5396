"""solve_profile: the best placement of a ProfileProblem, with a bound.

All ideals where they can be listed. Where they are too many, those of minimum cuts and then all
around the cuts of the best placement so far, again and again; the bound is that of the positions.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from p2bw.compiler.placement.contract import Flow, contract_profile
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.lattice import Lattice, all_ideals, reaching, some_ideals
from p2bw.compiler.placement.profile import ProfileProblem, ReplicatedStage, judge_profile
from p2bw.compiler.placement.replicated import Row, Search, columns, minimise
from p2bw.compiler.placement.stop import Stop
from p2bw.contract.errors import InfeasibleError, TimeLimitError

MAX_IDEALS = 300_000
MAX_CELLS = 60_000_000  # ideals x columns: bytes x 4
FEW = 3_000  # ideals, that need no placement to start with
LOCAL = 30_000  # ideals around the cuts of a placement
ROUNDS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePlacement:
    """A stage for each operator; no placement has a period below `bound`. In seconds."""

    objective: float
    bound: float
    place: tuple[int, ...]
    stages: tuple[ReplicatedStage, ...]
    settled_by: str


def solve_profile(
    problem: ProfileProblem, workers: int, most: int, stop: Stop | None = None
) -> ProfilePlacement:
    """The placement on at most so many workers, `most` to a stage, that has the least period.

    And of those, one on the fewest workers.
    """
    stop = stop or Stop()
    most = min(most, workers)
    flow = contract_profile(problem, workers)
    cells = columns(workers, most).shape[1]
    lattice = all_ideals(flow.predecessors, min(MAX_IDEALS, MAX_CELLS // cells))
    low = max(1, -(-int(flow.time.sum()) // workers))
    row = None
    settled_by = "minimum cuts and all ideals around the best"
    if lattice is None or len(lattice.members) > FEW:
        row, low = _approach(problem, flow, (workers, most), low, lattice is not None, stop)
    if lattice is not None and not stop():
        row, low = minimise(Search(flow, lattice, workers, most), low, row, stop)
        settled_by = f"dynamic program over {len(lattice.members)} ideals"
    if stop() and (row is None or low < row.period):
        if row is None:
            raise stop.error()
        settled_by += f"; stopped by {stop.reason}"
    if row is None:
        if lattice is None and not _too_little(flow, workers):
            raise TimeLimitError("no placement found, and none ruled out; offer more memory")
        raise InfeasibleError(_explain(problem, flow, lattice, workers, most))
    objective, stages = judge_profile(problem, row.place, row.replicas)
    return ProfilePlacement(
        objective=objective,
        bound=objective if low >= row.period else min(objective, (low - 1) / flow.steps),
        place=row.place,
        stages=stages,
        settled_by=settled_by,
    )


def _approach(
    problem: ProfileProblem, flow: Flow, pool: tuple[int, int], low: int, listed: bool, stop: Stop
) -> tuple[Row | None, int]:
    """A good placement, and a period below which none is; `low` where all ideals are listed."""
    from p2bw.compiler.placement.positions import Positions

    groups = len(flow.time)
    order = some_ideals(accumulate(1 << v for v in range(groups)), groups)
    row, _ = minimise(Search(flow, order, *pool), low, None, Stop())  # at once: not stopped
    if stop():
        return row, low
    positions = Positions(flow)
    family = some_ideals(positions.family(), groups)
    row, _ = minimise(Search(flow, family, *pool), low, row, stop)
    for _ in range(ROUNDS):
        better = _refine(problem, flow, pool, low, row, stop) if row and not stop() else None
        if better is None or row is None or better.period == row.period:
            break
        row = better
    if listed or stop():
        return row, low
    high = row.period if row else int(flow.time.sum())
    return row, positions.bound(low, high, *pool)


def _refine(
    problem: ProfileProblem, flow: Flow, pool: tuple[int, int], low: int, row: Row, stop: Stop
) -> Row | None:
    """The best placement that differs from this one only in what is near its cuts."""
    stage = [row.place[own[0]] for own in flow.grouping.groups]
    away = _away(flow, np.array(stage), len(row.replicas))
    reach = int(flow.time.sum())
    while reach:
        cores: list[list[int]] = [[] for _ in row.replicas]
        for own, k, far in zip(flow.grouping.groups, stage, (away > reach).tolist(), strict=True):
            if far:
                cores[k] += own
        near = contract_profile(problem, pool[0], [tuple(core) for core in cores if core])
        lattice = all_ideals(near.predecessors, LOCAL)
        if lattice is not None:
            return minimise(Search(near, lattice, *pool), low, row, stop)[0]
        reach //= 2
    return None


def _away(flow: Flow, stage: Numbers, stages: int) -> Numbers:
    """Time that moves to the other side of a cut with each group; of the cut that is nearest."""
    above = reaching(flow.predecessors)
    result = np.full(len(stage), np.iinfo(np.int64).max)
    for k in range(1, stages):
        before = stage < k
        back = above[before].T @ flow.time[before]
        forth = above[:, ~before] @ flow.time[~before]
        np.minimum(result, np.where(before, back, forth), out=result)
    return result


def _too_little(flow: Flow, workers: int) -> bool:
    """Each operator is somewhere, for one minibatch at least."""
    held = max(int(flow.size.max()), -(-int(flow.size.sum()) // workers))
    return flow.memory is not None and held > flow.memory


def _explain(
    problem: ProfileProblem, flow: Flow, lattice: Lattice | None, workers: int, most: int
) -> str:
    """How much memory is enough, to a hundredth; the least that is, where ideals are few."""
    if lattice is None or len(lattice.members) > FEW:
        from p2bw.compiler.placement.positions import Positions

        lattice = some_ideals(Positions(flow).family(), len(flow.time))
    low, high = flow.memory or 0, workers * int(flow.size.sum())
    while high > low * 1.01 + 1:
        memory = (low + high) // 2
        search = Search(replace(flow, memory=memory), lattice, workers, most)
        if search.row(search.longest):
            high = memory
        else:
            low = memory
    return (
        f"no placement on {workers} workers fits into {problem.memory:.6g} bytes each; "
        f"{high} would be enough; offer more memory (--memory) or more workers (--stages)"
    )
