"""Why nothing fits: which limit binds, and by how much."""

from collections.abc import Sequence

from p2bw.compiler import units
from p2bw.compiler.placement.candidates import Model
from p2bw.compiler.placement.dp import least_memory_by_depth
from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.instance import Instance


def why_infeasible(models: Sequence[Model], shapes: Sequence[Shape]) -> str:
    """The limit that binds, for the smallest microbatch in the deepest pipeline."""
    model = models[0]
    depth = max(shape.depth for shape in shapes)
    width = min(shape.width for shape in shapes)
    instance = model.instance
    device = instance.roomiest
    offer = f"{device.name} offers {units.data(device.usable_bytes)}"
    group, alone = _largest_group(instance, depth, width)
    needs = least_memory_by_depth((model.coarse or model).costs, depth, width)
    fullest = min(needs[shape.depth - 1] for shape in shapes)
    least = "at least" if model.family.complete and model.coarse is None else "about"
    at, kept = f"at microbatch {instance.problem.microbatch}", _kept(instance, width)
    if alone > device.usable_bytes:
        fact = f"block {instance.name(group)} needs {units.data(alone)} {at} with {kept}"
    elif fullest > instance.limit:
        fact = (
            f"cut into {_span(shapes)}, the fullest device needs {least} "
            f"{units.data(fullest - instance.reserve)} {at} with {kept}"
        )
    else:
        constraints = "the constraints (pin, together, apart, never_cut) and "
        some = instance.pin or instance.apart or len(instance.groups) < len(instance.problem.blocks)
        return (
            f"no plan fits: {constraints if some else ''}the buffers of tensors that skip stages "
            f"leave no cut into {_span(shapes)} {at}; {offer}"
        )
    return f"no plan fits: {fact}; {offer}"


def _kept(instance: Instance, width: int) -> str:
    versions, copies = instance.versions(1), instance.gradient_copies(width)
    weights = "weights" if versions == 1 else f"{versions} weight versions"
    gradients = "gradients" if copies == 1 else f"{copies} sets of gradients"
    return f"{weights}, {gradients} and optimizer state"


def _span(shapes: Sequence[Shape]) -> str:
    depths = sorted({shape.depth for shape in shapes})
    span = f"{depths[0]} to {depths[-1]}" if len(depths) > 1 else f"{depths[0]}"
    return f"{span} stage{'s' if depths[-1] > 1 else ''}"


def _largest_group(instance: Instance, depth: int, width: int) -> tuple[int, int]:
    """The group that needs most memory alone on the last device, and how much."""
    in_flight = instance.in_flight(depth - 1, depth)
    versions, copies = instance.versions(in_flight, depth), instance.gradient_copies(width)
    total = instance.held(versions, copies) + instance.buffers + instance.transient + instance.stash
    for tied in instance.tied:
        total[list(tied.groups)] += tied.state.bytes(versions, copies)
    group = int(total.argmax())
    return group, int(total[group])
