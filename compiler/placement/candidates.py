"""Candidates: every shape at every microbatch size, with a bound on what it can reach."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2bw.compiler.placement.dp import Recompute, StepCosts, least_by_depth, step_costs
from p2bw.compiler.placement.evaluate import LAYOUTS, MIN_PERIOD_S, Layout, Shape, ring_bytes
from p2bw.compiler.placement.ideals import MAX_IDEALS, Family, make_family, make_steps
from p2bw.compiler.placement.instance import PS, Instance, make_instance
from p2bw.compiler.problem import PlacementProblem
from p2bw.runtime.errors import InfeasibleError, UsageError


@dataclass(frozen=True, slots=True)
class Model:
    """One microbatch size: its instance, and the steps that all its shapes share."""

    instance: Instance
    costs: StepCosts  # without a shape

    @property
    def family(self) -> Family:
        return self.costs.steps.family

    @property
    def recompute(self) -> Recompute:
        return self.costs.recompute


@dataclass(slots=True)
class Candidate:
    """One shape at one microbatch size. `bound` sinks, `stages` improves, as the search goes on."""

    model: Model
    shape: Shape
    bound: float  # samples per second
    stages: tuple[int, ...] | None = None
    laid_out: Shape | None = None  # where `stages` are, if the shape leaves that open
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
    def placed(self) -> Shape:
        return self.laid_out or self.shape

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
            family = models[0].family
        else:
            family = make_family(instance, ideals)
        costs = step_costs(instance, make_steps(instance, family), recompute)
        models.append(Model(instance, costs))
    return models


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
            f"blocks; ask for at most {instance.size}"
        )
    most = min(gpus, instance.size, problem.constraints.max_stages or gpus)
    if problem.schedule == "2bw":
        most = min(most, problem.microbatches or most)
    return [
        Shape(depth, width, layout)
        for depth in depths or range(1, most + 1)
        for width in widths or _widths(problem, depth)
        if depth * width <= gpus and depth <= instance.size
        for layout in _layouts(problem, depth, width)
    ]


def _widths(problem: PlacementProblem, depth: int) -> Iterable[int]:
    """As many replicas as find room; or fewer, where some devices may be better left out."""
    most = problem.topology.gpus // depth
    return (most,) if problem.topology.uniform else range(1, most + 1)


def _layouts(problem: PlacementProblem, depth: int, width: int) -> Sequence[Layout]:
    if not problem.topology.uniform:
        return ("any",)
    # Where it makes no difference, only the first.
    return LAYOUTS[: 1 + (depth > 1 and width > 1 and problem.topology.tiers > 1)]


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
            f"needs at least one per stage; ask for {max(depths)} or more"
        )


def make_candidates(models: Sequence[Model], shapes: Sequence[Shape]) -> list[Candidate]:
    """All shapes at all microbatch sizes, the most promising first; bound 0: impossible."""
    deepest = max((shape.depth for shape in shapes), default=0)
    found = []
    for model in models:
        least = [0.0] * deepest
        if model.family.complete:
            least = least_by_depth(model.costs, deepest)
        for shape in shapes:
            candidate = Candidate(model, shape, 0.0)
            busiest_s = max(least[shape.depth - 1], _least_busy(model, shape))
            if busiest_s < float("inf"):
                candidate.bound = candidate.rate(busiest_s)
            else:
                candidate.closed_by = "bounds"
            found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.order)


def _least_busy(model: Model, shape: Shape) -> float:
    """Seconds that the busiest device or port needs, by sums alone."""
    instance, topology = model.instance, model.instance.problem.topology
    m = instance.problem.microbatches_at(shape.depth)
    again = 2 if model.recompute == "always" else 1
    work = (again * instance.forward_ps + instance.backward_ps).min(axis=0)
    states = [tied.state for tied in instance.tied]
    update_ps = int(instance.update_ps.min(axis=0).sum())
    update_ps += sum(min(state.update_ps) for state in states)
    gradients = int(instance.gradients.sum()) + sum(state.gradients for state in states)
    ring = ring_bytes(gradients, shape.width, m)
    fastest = max(map(instance.network.device_bandwidth, range(topology.gpus)))
    bounds = [
        (int(work.sum()) + update_ps / m) / shape.depth / PS,
        int(work.max()) / PS,
        ring / shape.depth / fastest,
    ]
    for level in range(1, topology.tiers if shape.layout != "any" else 0):
        # Every gradient goes around its ring; the busiest port has at least the mean load.
        ports = {topology.unit(rank, level) for rank in range(shape.depth * shape.width)}
        crossings = min(_ring_crossings(model, shape, level, k) for k in range(shape.depth))
        bounds.append(crossings * ring / len(ports) / topology.levels[level].bandwidth)
    # Below what is attained, whatever the order of additions.
    return max(bounds) * (1 - 1e-12)


def _ring_crossings(model: Model, shape: Shape, level: int, k: int) -> int:
    topology = model.instance.problem.topology
    units = [topology.unit(shape.rank(k, r), level) for r in range(shape.width)]
    return sum(unit != units[r - 1] for r, unit in enumerate(units))
