"""Candidates: every shape at every microbatch size, with a bound on what it can reach."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from p2bw.compiler.placement.coarsen import Sets, coarsen, merged
from p2bw.compiler.placement.dp import Recompute, StepCosts, least_by_depth, step_costs
from p2bw.compiler.placement.evaluate import LAYOUTS, MIN_PERIOD_S, Shape, ring_bytes
from p2bw.compiler.placement.ideals import (
    MAX_IDEALS,
    Family,
    make_family,
    make_steps,
    no_cuts,
)
from p2bw.compiler.placement.instance import PS, Instance, make_instance
from p2bw.compiler.problem import PlacementProblem
from p2bw.compiler.topology import MAX_GPUS
from p2bw.contract.errors import InfeasibleError, UsageError

DIRECT = 200  # ideals up to which all is solved at once, without a coarse model


MAX_GRID = 128  # devices up to which layouts are tried in which a node holds part of both


@dataclass(frozen=True, slots=True)
class Model:
    """One microbatch size: its instance, and the steps that all its shapes share.

    Where there are many groups, `coarse` has fewer of them, each one of `sets`; the steps of the
    model itself are tabulated only within what a placement of those leaves to be looked at.
    """

    instance: Instance
    costs: StepCosts  # without a shape
    coarse: "Model | None" = None
    sets: Sets = ()

    @property
    def family(self) -> Family:
        return self.costs.steps.family

    @property
    def recompute(self) -> Recompute:
        return self.costs.recompute

    def within(self, longest_s: float) -> "Model":
        """With all steps that a device can hold and is busy with for no longer than that."""
        return replace(self, costs=_costs(self.instance, self.family, self.recompute, longest_s))


@dataclass(slots=True)
class Candidate:
    """One shape at one microbatch size. `bound` sinks, `stages` improves, as the search goes on."""

    model: Model
    shape: Shape
    bound: float  # samples per second
    stages: tuple[int, ...] | None = None
    relayed: frozenset[int] = frozenset()  # edges that were, when `stages` was found
    closed_by: str = ""  # what showed that nothing better is left in it

    def rate(self, busiest_s: float) -> float:
        """Samples per second, if the busiest device or port is busy for so long."""
        instance = self.model.instance
        period_s = max(busiest_s, MIN_PERIOD_S) * instance.bubble(self.shape.depth)
        return self.shape.width * instance.problem.microbatch / period_s

    def seconds(self, rate: float) -> float:
        """The inverse of `rate`."""
        instance = self.model.instance
        samples = self.shape.width * instance.problem.microbatch
        return samples / rate / instance.bubble(self.shape.depth) if rate else float("inf")

    @property
    def order(self) -> tuple[float, ...]:
        """Best bound first; among equals more devices, fewer stages, larger microbatches."""
        shape = self.shape
        return (
            -float(f"{self.bound:.9g}"),
            -shape.depth * shape.width,
            shape.depth,
            -self.model.instance.problem.microbatch,
            LAYOUTS.index(shape.layout),
        )


def make_models(
    problems: Iterable[PlacementProblem], recompute: Recompute, ideals: int = MAX_IDEALS
) -> list[Model]:
    """The models of one structure; their ideals are listed once."""
    models: list[Model] = []
    for problem in problems:
        instance = make_instance(problem)
        if models and models[0].instance.predecessors == instance.predecessors:
            models.append(_model_like(instance, models[0]))
        else:
            models.append(_model(instance, recompute, ideals))
    return models


def _model(instance: Instance, recompute: Recompute, ideals: int) -> Model:
    """A model with all its steps where they are few; otherwise with none, and a coarse model."""
    family = make_family(instance, ideals)
    if not family.complete or len(family.members) > DIRECT:
        sets = coarsen(instance, ideals)
        if len(sets) < instance.size:
            coarse = merged(instance, sets)
            costs = _costs(coarse, make_family(coarse, ideals), recompute)
            if not family.complete:
                family = no_cuts(instance)
            none = _costs(instance, family, recompute, -1.0)
            return Model(instance, none, Model(coarse, costs), sets)
    return Model(instance, _costs(instance, family, recompute))


def _model_like(instance: Instance, known: Model) -> Model:
    """The model of another microbatch size of the same graph."""
    recompute = known.recompute
    if known.coarse is None:
        return Model(instance, _costs(instance, known.family, recompute))
    coarse = merged(instance, known.sets)
    costs = _costs(coarse, known.coarse.family, recompute)
    none = _costs(instance, known.family, recompute, -1.0)
    return Model(instance, none, Model(coarse, costs), known.sets)


def _costs(
    instance: Instance, family: Family, recompute: Recompute, longest_s: float | None = None
) -> StepCosts:
    return step_costs(instance, make_steps(instance, family, longest_s), recompute)


def make_shapes(
    instance: Instance, depths: Sequence[int] | None, widths: Sequence[int] | None
) -> list[Shape]:
    """The shapes to consider: by default every depth, with as many replicas as find room."""
    problem = instance.problem
    gpus = problem.topology.gpus
    _check(problem, depths, widths)
    if depths and min(depths) > instance.size:
        raise InfeasibleError(
            f"{min(depths)} stages asked for, but the model has {instance.size} indivisible "
            f"blocks{_kept_together(problem)}; ask for at most {instance.size}"
        )
    allowed = problem.constraints.max_stages or MAX_GPUS
    if depths and min(depths) > allowed:
        raise InfeasibleError(
            f"{min(depths)} stages asked for, but the constraints allow {allowed} (max_stages)"
        )
    most = min(gpus, instance.size, allowed)
    if problem.schedule == "2bw":
        most = min(most, problem.microbatches or most)
    return [
        shape
        for depth in depths or range(1, most + 1)
        for width in widths or _widths(instance, depth)
        if depth * width <= gpus and depth <= min(instance.size, allowed)
        for shape in _laid_out(problem, depth, width)
    ]


def _kept_together(problem: PlacementProblem) -> str:
    """What the user may not know: the schedule itself keeps blocks in one stage."""
    shared = [p.name for p in problem.parameters if len(p.blocks) > 1]
    if problem.schedule != "stash" or not shared:
        return ""
    return (
        f" (stages that run on different versions can share no parameter, so under stash the "
        f"blocks that use {shared[0]} are one; under 2bw and flush they are not)"
    )


def _widths(instance: Instance, depth: int) -> Iterable[int]:
    """As many replicas as find room; or fewer, where some devices may be better left out.

    A single pipeline also where that keeps fewer gradients, and may fit where several do not.
    """
    most = instance.problem.topology.gpus // depth
    if not instance.problem.topology.uniform:
        return range(1, most + 1)
    alone = most > 1 and instance.gradient_copies() < instance.gradient_copies(most)
    return (1, most) if alone else (most,)


def _laid_out(problem: PlacementProblem, depth: int, width: int) -> Iterator[Shape]:
    """The layouts of a shape: where devices or links differ, all of them at once."""
    topology = problem.topology
    if not topology.uniform:
        yield Shape(depth, width, "any")
        return
    yield Shape(depth, width, "stage-major")
    if depth > 1 and width > 1 and topology.tiers > 1:  # elsewhere it makes no difference
        yield Shape(depth, width, "pipeline-major")
        if topology.gpus <= MAX_GRID:
            yield from _grids(depth, width, topology.levels[0].size)


def _grids(depth: int, width: int, node: int) -> Iterator[Shape]:
    """Nodes that hold some stages of some replicas, and not all of one or the other."""
    for stages in range(2, min(node, depth)):
        replicas = node // stages
        if stages * replicas != node or replicas >= width or depth % stages or width % replicas:
            continue

        def rank(k: int, r: int, a: int = stages, b: int = replicas) -> int:
            return ((k // a * (width // b) + r // b) * a + k % a) * b + r % b

        ranks = tuple(tuple(rank(k, r) for r in range(width)) for k in range(depth))
        yield Shape(depth, width, "listed", ranks)


def _check(
    problem: PlacementProblem, depths: Sequence[int] | None, widths: Sequence[int] | None
) -> None:
    """Refuse what no model could be given."""
    gpus, m = problem.topology.gpus, problem.microbatches
    least, narrow = min(depths or (1,)), min(widths or (1,))
    if least < 1 or narrow < 1 or least * narrow > gpus:
        raise UsageError(f"{least} stages x {narrow} replicas do not fit {gpus} devices")
    if problem.schedule == "2bw" and m is not None and depths and max(depths) > m:
        raise UsageError(
            f"{m} microbatches per update are too few for {max(depths)} stages: PipeDream-2BW "
            f"needs at least one per stage, or a third version of the weights; use "
            f"{max(depths)} microbatches or more, {m} stages or fewer, or the schedule flush"
        )


def least_busy(
    costs: StepCosts, shapes: Iterable[Shape], gaps: bool = False
) -> Callable[[Shape], float]:
    """Seconds that the busiest device of each shape needs at least, by one sweep over the steps for
    the shapes that keep one set of gradients, and one for those that keep two.

    `costs` are those of no particular shape. With `gaps`, stages may be empty.
    """
    instance = costs.instance
    deepest: dict[int, int] = {}
    narrowest: dict[int, int] = {}
    for shape in shapes:
        copies = instance.gradient_copies(shape.width)
        deepest[copies] = max(deepest.get(copies, 0), shape.depth)
        narrowest[copies] = min(narrowest.get(copies, shape.width), shape.width)
    least = {
        copies: least_by_depth(costs.at_width(narrowest[copies]), depth, gaps)
        for copies, depth in deepest.items()
    }
    return lambda shape: least[instance.gradient_copies(shape.width)][shape.depth - 1]


def make_candidates(models: Sequence[Model], shapes: Sequence[Shape]) -> list[Candidate]:
    """All shapes at all microbatch sizes, the most promising first; bound 0: impossible."""
    shares = [_network_shares(models[0].instance, shape) for shape in shapes]
    found = []
    for model in models:
        least = None
        if model.family.complete and model.coarse is None:
            least = least_busy(model.costs, shapes)
        sums = _sums(model)
        for shape, share in zip(shapes, shares, strict=True):
            candidate = Candidate(model, shape, 0.0)
            busiest_s = sums.least_busy(shape, share)
            if least is not None:
                busiest_s = max(busiest_s, least(shape))
            if busiest_s < float("inf"):
                candidate.bound = candidate.rate(busiest_s)
            else:
                candidate.closed_by = "bounds"
            found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.order)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What one microbatch takes in all groups together, on the devices that are best for it."""

    instance: Instance
    work_ps: int
    largest_ps: int  # of one group
    update_ps: int
    gradients: int
    bandwidth: float  # of the fastest device's port

    def least_busy(self, shape: Shape, network: float) -> float:
        """Seconds that the busiest device or port needs, by sums alone."""
        slots = self.instance.slots(shape.depth)
        ring = ring_bytes(self.gradients, shape.width, slots)
        # Where pipelines drain, the update of a stage behind others costs less than its share.
        update_ps = 0.0 if self.instance.drains else self.update_ps / slots
        # Below what is attained, whatever the order of additions.
        return (1 - 1e-12) * max(
            (self.work_ps + update_ps) / shape.depth / PS,
            self.largest_ps / PS,
            ring / shape.depth / self.bandwidth,
            ring * network,
        )


def _sums(model: Model) -> _Sums:
    instance = model.instance
    again = 2 if model.recompute == "always" else 1
    work = (again * instance.forward_ps + instance.backward_ps).min(axis=0)
    states = [tied.state for tied in instance.tied]
    return _Sums(
        instance=instance,
        work_ps=int(work.sum()),
        largest_ps=int(work.max()),
        update_ps=int(instance.update_ps.min(axis=0).sum())
        + sum(min(state.update_ps) for state in states),
        gradients=int(instance.gradients.sum()) + sum(state.gradients for state in states),
        bandwidth=instance.network.fastest,
    )


def _network_shares(instance: Instance, shape: Shape) -> float:
    """Seconds that the busiest port beyond the devices' own needs for a byte in all rings.

    Every gradient goes around its ring; the busiest port has at least the mean load.
    """
    topology = instance.problem.topology
    if shape.layout == "any" or shape.width == 1:
        return 0.0
    place = np.arange(shape.depth * shape.width)
    if shape.ranks:
        ranks = np.array(shape.ranks)
    elif shape.layout == "stage-major":
        ranks = place.reshape(shape.depth, shape.width)
    else:
        ranks = place.reshape(shape.width, shape.depth).T
    share, unit = 0.0, ranks
    for inner, level in pairwise(topology.levels):
        unit = unit // inner.size
        crossings = int((unit != np.roll(unit, 1, axis=1)).sum(axis=1).min())
        ports = len(np.unique(unit))
        share = max(share, crossings / ports / level.bandwidth)
    return share
