"""The best placement of a LoadProblem: a dynamic program over the ideals that can matter.

    best[J, s] = min over ideals I < J of max(best[I, s less one device], load of J - I)

with s = how many accelerators and CPUs stand before J. Ideals are taken by size, so each pair is
priced once for all s. Against a placement already known, an ideal is dropped when what lies before
it, or after it, is too much for the devices on that side; that leaves few.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from p2bw.compiler.placement.contract import Loads, contract
from p2bw.compiler.placement.ideals import Family, Flags, Floats, make_family
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.loads import Device, LoadProblem, judge_loads
from p2bw.compiler.placement.prices import Leaps, Prices, blocks, crossing
from p2bw.compiler.placement.stop import Stop
from p2bw.contract.errors import InfeasibleError, TimeLimitError

MAX_IDEALS = 60_000
BATCH = 128  # ideals priced at once, at least
DETERMINISTIC_S = 4.0  # of CP-SAT; a second is a few on a slow core

Kind = Literal["accelerator", "cpu"]
State = tuple[int, int]  # accelerators, CPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlacement:
    """Devices in a row and the place of each node on it; no placement is below `bound`."""

    objective: float
    bound: float
    place: tuple[int, ...]  # of each node
    devices: tuple[Device, ...]
    settled_by: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A placement of nodes."""

    busiest: float  # in steps
    place: tuple[int, ...]
    kinds: tuple[Kind, ...]


def solve_loads(
    problem: LoadProblem, devices: int, cpus: int = 0, stop: Stop | None = None
) -> LoadPlacement:
    """The placement on at most so many accelerators and CPUs whose busiest device is least so."""
    stop = stop or Stop()
    loads = contract(problem)
    row = _sweep(loads, make_family(loads, 0), (devices, cpus), np.inf)
    if row is not None:
        loads = contract(_joined(problem, row.busiest / loads.steps, cpus))
    family = make_family(loads, MAX_IDEALS)
    bound = np.inf
    if family.complete:
        settled_by = f"dynamic program over {len(family.members)} ideals"
        try:
            row = (
                _sweep(loads, family, (devices, cpus), row.busiest if row else np.inf, stop) or row
            )
        except _Stopped:
            bound = _least(loads, (devices, cpus))
    else:
        row, bound = _program(loads, (devices, cpus), row, stop)
        settled_by = f"integer program over {len(loads.predecessors)} groups"
    if bound < np.inf and stop() and (row is None or bound < row.busiest):
        if row is None:
            raise stop.error()
        settled_by += f"; stopped by {stop.reason}"
    if row is None:
        if bound < np.inf:
            raise TimeLimitError("no placement found, and none ruled out; offer more memory")
        raise InfeasibleError(_explain(problem, devices))
    objective, used = judge_loads(problem, row.place, row.kinds)
    return LoadPlacement(
        objective=objective,
        bound=min(objective, bound / loads.steps),
        place=row.place,
        devices=used,
        settled_by=settled_by,
    )


def _joined(problem: LoadProblem, upper: float, cpus: int) -> LoadProblem:
    """Without the cuts that cost `upper` alone: nothing better has them.

    A tensor between two CPUs would cost neither of them anything.
    """
    if cpus > 1:
        return problem
    dear = tuple(t.ends for t in problem.transfers if t.cost >= upper)
    return replace(problem, together=problem.together + dear)


def _least(loads: Loads, devices: State) -> float:
    """Steps that the busiest device is busy for at least, by sums alone."""
    time = np.minimum(loads.time, loads.cpu_time) if devices[1] else loads.time
    return max(float(time.max(initial=0)), float(time.sum()) / sum(devices))


def _program(
    loads: Loads, devices: State, row: _Row | None, stop: Stop
) -> tuple[_Row | None, float]:
    """What CP-SAT makes of a placement along the topological orders, and its bound."""
    from p2bw.compiler.placement.additive_cpsat import solve_program

    everything = 1 + int((loads.time + loads.cpu_time).sum()) + sum(c for _, c in loads.cuts)
    upper = row.busiest if row else float(everything)
    found = solve_program(loads, devices, upper, DETERMINISTIC_S, stop)
    if found.stages is not None:
        kinds: tuple[Kind, ...] = tuple("cpu" if cpu else "accelerator" for cpu in found.cpus)
        better = _judge(loads, found.stages, kinds)
        row = better if row is None or better.busiest < row.busiest else row
    return row, found.bound


def _judge(loads: Loads, stages: tuple[int, ...], kinds: tuple[Kind, ...]) -> _Row:
    """The busiest device in steps; devices without groups left out."""
    used = sorted(set(stages))
    stages = tuple(used.index(stage) for stage in stages)
    kinds = tuple(kinds[stage] for stage in used)
    busy = [0] * len(used)
    for v, k in enumerate(stages):
        busy[k] += int((loads.cpu_time if kinds[k] == "cpu" else loads.time)[v])
    for ends, cost in loads.cuts:
        touched = sorted({stages[end] for end in ends})
        if len(touched) > 1:
            for k in touched:
                busy[k] += cost * (kinds[k] == "accelerator")
    return _Row(float(max(busy)), loads.grouping.nodes_to_stages(stages), kinds)


def _explain(problem: LoadProblem, devices: int) -> str:
    """Why nothing fits: on a CPU everything would, so none was offered."""
    for node in problem.nodes:
        if not node.accelerated:
            return f"node {node.name} runs only on a CPU; offer one (--cpus 1)"
    sizes = tuple(replace(node, time=node.size, size=0.0) for node in problem.nodes)
    fullest = solve_loads(replace(problem, nodes=sizes, transfers=(), memory=math.inf), devices)
    return (
        f"no placement fits: the fullest of {devices} devices has to hold "
        f"{fullest.bound:.6g}, and can hold only {problem.memory:.6g}; offer more devices "
        "(--stages) or more memory"
    )


class _Stopped(Exception):
    """A sweep had to end before its end."""


def _sweep(
    loads: Loads, family: Family, devices: State, upper: float, stop: Stop | None = None
) -> _Row | None:
    """The best chain of a family's ideals, if its busiest device is below `upper` steps."""
    open_ = _windows(loads, family.members, devices, upper)
    kept = np.flatnonzero(open_.any(axis=(1, 2)))
    members, open_ = family.members[kept], open_[kept]
    if not len(kept) or members[0].any() or not members[-1].all():
        return None
    best = np.full(open_.shape, np.inf)
    best[0, 0, 0] = 0.0
    came = np.zeros(open_.shape, np.int64)  # twice the ideal before, and 1 if by a CPU
    leaps = Leaps(loads, members)
    for block in blocks(loads, members):
        if block.start:
            for a, c in np.argwhere(open_[block].any(axis=0)).tolist():
                now = best[block, a, c], came[block, a, c]
                if a:
                    leaps.reach(now, best[: block.start, a - 1, c], block, 0, upper)
                if c:
                    leaps.reach(now, best[: block.start, a, c - 1], block, 1, upper)
            best[block][~open_[block] | (best[block] >= upper)] = np.inf
        inner = Prices(loads, members[block])
        _walk(inner, members[block], block.start, (best, came), open_[block], upper, stop)
    return _backtrack(loads, members, best, came)


def _walk(
    prices: Prices,
    members: Flags,
    start: int,
    found: tuple[Floats, Numbers],
    open_: Flags,
    upper: float,
    stop: Stop | None,
) -> None:
    """Reach the ideals of a block, from number `start` on, from each other."""
    best, came = found[0][start:], found[1][start:]
    for levels in _batches(members):
        if stop is not None and stop():
            raise _Stopped
        target = np.arange(levels[0], levels[-1])
        near = prices.time[: levels[-1]] > prices.time[target].min() - upper
        if open_.shape[2] > 1:
            near |= prices.cpu_time[: levels[-1]] > prices.cpu_time[target].min() - upper
        near[: levels[0]] &= np.isfinite(best[: levels[0]]).any(axis=(1, 2))
        source = np.flatnonzero(near)
        steps = prices.steps(source, target)
        for first, last in pairwise(levels):
            rows, columns = source < first, slice(first - levels[0], last - levels[0])
            here = [busy[rows, columns] for busy in steps]
            for a, c in np.argwhere(open_[first:last].any(axis=0)).tolist():
                now = best[first:last, a, c], came[first:last, a, c]
                if a:
                    _relax(now, best[:, a - 1, c], source[rows], here[0], start, 0)
                if c:
                    _relax(now, best[:, a, c - 1], source[rows], here[1], start, 1)
            reached = best[first:last]
            reached[~open_[first:last] | (reached >= upper)] = np.inf


def _batches(members: Flags) -> Iterator[list[int]]:
    """Where each size of ideal starts and the last ends, in batches; the first size is in none."""
    count = members.sum(axis=1)
    starts = [*np.flatnonzero(np.diff(count, prepend=-1)).tolist(), len(members)]
    levels = starts[1:2]
    for start in starts[2:]:
        levels.append(start)
        if start - levels[0] >= BATCH or start == starts[-1]:
            yield levels
            levels = [start]


def _relax(
    now: tuple[Floats, Numbers],
    earlier: Floats,
    source: Numbers,
    steps: Floats,
    start: int,
    by_cpu: int,
) -> None:
    """Reach ideals (views of their best and whence it came) from the sources by one more device."""
    reached = np.isfinite(earlier[source])
    if not reached.any():
        return
    source = source[reached]
    busiest = np.maximum(earlier[source][:, None], steps[reached])
    choice = busiest.argmin(axis=0)
    found = busiest[choice, np.arange(len(choice))]
    better = found < now[0]
    now[0][better] = found[better]
    now[1][better] = 2 * (start + source[choice[better]]) + by_cpu


def _windows(loads: Loads, members: Flags, devices: State, upper: float) -> Flags:
    """Ideal x accelerators x CPUs before it: those that fit below `upper` on both sides.

    A tensor that crosses is paid for on both sides as well, if no CPU takes part.
    """
    used = np.arange(devices[0] + 1)[:, None], np.arange(devices[1] + 1)
    if upper == np.inf:
        return np.ones((len(members), devices[0] + 1, devices[1] + 1), bool)
    # A CPU does as much as `upper` allows of what it is best at.
    apt = loads.time[loads.cpu_time > 0] / loads.cpu_time[loads.cpu_time > 0]
    free = int(loads.time[loads.cpu_time == 0].sum())
    cpu = upper * apt.max(initial=0.0) + free
    room = used[0] * upper + used[1] * cpu
    left = (devices[0] - used[0]) * upper + (devices[1] - used[1]) * cpu
    paid = np.zeros(len(members)) if devices[1] else crossing(loads, members)
    before = members @ loads.time
    after = int(loads.time.sum()) - before
    fits: Flags = (before + paid)[:, None, None] <= room
    fits &= (after + paid)[:, None, None] <= left
    return fits


def _backtrack(loads: Loads, members: Flags, best: Floats, came: Numbers) -> _Row | None:
    ideal = len(members) - 1
    state = np.unravel_index(int(best[ideal].argmin()), best[ideal].shape)
    busiest = float(best[ideal][state])
    if busiest == np.inf:
        return None
    accelerators, cpus = map(int, state)
    stages = np.zeros(members.shape[1], np.int64)
    kinds: list[Kind] = []
    while ideal:
        ideal, by_cpu = divmod(int(came[ideal, accelerators, cpus]), 2)
        accelerators, cpus = accelerators - (1 - by_cpu), cpus - by_cpu
        stages += ~members[ideal]
        kinds.append("cpu" if by_cpu else "accelerator")
    place = loads.grouping.nodes_to_stages((stages - 1).tolist())
    return _Row(busiest, place, tuple(kinds[::-1]))
