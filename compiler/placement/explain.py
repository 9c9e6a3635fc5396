"""Why nothing fits: which limit binds, by how much, and what would help."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from p2bw.compiler import units
from p2bw.compiler.devices import GIB, MIB
from p2bw.compiler.placement.candidates import Model, make_models
from p2bw.compiler.placement.dp import (
    Recompute,
    feasible_chain,
    least_memory_by_depth,
    step_costs,
)
from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.instance import Instance
from p2bw.compiler.problem import PlacementProblem, interpolate

MAX_DEPTH = 256  # deepest pipeline that is tried as a cure


def explain_infeasible(models: Sequence[Model], shapes: Sequence[Shape]) -> str:
    """The limit that binds, for the smallest microbatch in the deepest pipeline, and cures."""
    model = models[0]
    depth = max(shape.depth for shape in shapes)
    instance = model.instance
    device = instance.problem.topology.device
    offer = f"{device.name} offers {units.data(device.usable_bytes)}"
    group, alone = _largest_group(instance, depth)
    needs = least_memory_by_depth(model.costs, depth)
    fullest = min(needs[shape.depth - 1] for shape in shapes)
    least = "at least" if model.family.complete else "about"
    at = f"at microbatch {instance.problem.microbatch}"
    if alone > device.usable_bytes:
        fact = f"block {instance.name(group)} needs {units.data(alone)} {at} with {_kept(instance)}"
    elif fullest > instance.limit:
        fact = (
            f"cut into {_span(shapes)}, the fullest device needs {least} "
            f"{units.data(fullest - instance.reserve)} {at} with {_kept(instance)}"
        )
    else:
        constraints = "the constraints (pin, together, apart, never_cut) and "
        some = instance.pin or instance.apart or len(instance.groups) < len(instance.problem.blocks)
        return (
            f"no plan fits: {constraints if some else ''}the buffers of tensors that skip stages "
            f"leave no cut into {_span(shapes)} {at}; {offer}{_advice(models, depth)}"
        )
    return f"no plan fits: {fact}; {offer}{_advice(models, depth)}"


def _kept(instance: Instance) -> str:
    versions = instance.versions(1)
    weights = "weights" if versions == 1 else f"{versions} weight versions"
    return f"{weights}, gradients and optimizer state"


def _span(shapes: Sequence[Shape]) -> str:
    depths = sorted({shape.depth for shape in shapes})
    span = f"{depths[0]} to {depths[-1]}" if len(depths) > 1 else f"{depths[0]}"
    return f"{span} stage{'s' if depths[-1] > 1 else ''}"


def _largest_group(instance: Instance, depth: int) -> tuple[int, int]:
    """The group that needs most memory alone on the last device, and how much."""
    in_flight = instance.in_flight(depth - 1, depth)
    versions = instance.versions(in_flight)
    total = versions * instance.weights + instance.gradients + instance.optimizer
    total = total + instance.buffers + instance.transient + instance.stash
    for tied in instance.tied:
        state = tied.state
        for group in tied.groups:
            total[group] += versions * state.weights + state.gradients + state.optimizer
    group = int(total.argmax())
    return group, int(total[group])


def _advice(models: Sequence[Model], depth: int) -> str:
    cures = [cure for cure in _cures(models, depth) if cure]
    return f". What fits: {', or '.join(cures)}" if cures else ""


def _cures(models: Sequence[Model], depth: int) -> Iterator[str]:
    """Changes that were tried and work, each alone."""
    problem, recompute = models[0].instance.problem, models[0].recompute
    if recompute == "never" and _fits(models[0], depth, "auto"):
        yield "--recompute auto"
    sizes = [model.instance.problem for model in models]
    if problem.microbatch > 1 and len(sizes) > 1:
        smaller = _model(interpolate(sizes[0], sizes[1], 1), recompute)
        if _fits(smaller, depth, recompute):
            yield "--microbatch 1"
    memory = _enough_memory(models[0], depth)
    if memory is not None:
        yield f"--memory {memory}"
    deeper = _enough_stages(models[0], depth)
    if deeper is not None:
        yield f"--gpus {deeper} ({deeper} stages)"


def _model(problem: PlacementProblem, recompute: Recompute) -> Model:
    (model,) = make_models([problem], recompute)
    return model


def _fits(model: Model, depth: int, recompute: Recompute) -> bool:
    costs = step_costs(model.instance, model.costs.steps, recompute, Shape(depth, 1))
    return feasible_chain(costs, float("inf"))[1] is not None


def _enough_memory(model: Model, depth: int) -> str | None:
    """A round size of memory with which the same number of stages fits."""
    problem = model.instance.problem
    device = problem.topology.device
    least = least_memory_by_depth(model.costs, depth)[-1]
    if least == float("inf"):
        return None
    share = 1 - device.lost_fraction
    size = (least - model.instance.reserve + device.context_bytes) / share
    unit, name = (GIB, "GiB") if size > 8 * GIB else (MIB, "MiB")
    for more in (1.0, 1.1, 1.25, 1.5, 2.0):
        count = int(size * more) // unit + 1
        topology = replace(problem.topology, device=replace(device, memory_bytes=count * unit))
        larger = _model(problem.model_copy(update={"topology": topology}), model.recompute)
        if _fits(larger, depth, model.recompute):
            return f"{count}{name}"
    return None


def _enough_stages(model: Model, depth: int) -> int | None:
    """The fewest stages, beyond `depth`, that fit."""
    instance = model.instance
    constraints = instance.problem.constraints
    most = min(MAX_DEPTH, instance.size, constraints.max_stages or MAX_DEPTH)
    if instance.problem.schedule == "2bw":
        most = min(most, instance.problem.microbatches or most)
    if most <= depth:
        return None
    needs = least_memory_by_depth(model.costs, most)
    for deeper in range(depth + 1, most + 1):
        if needs[deeper - 1] <= instance.limit and _fits(model, deeper, model.recompute):
            return deeper
    return None
