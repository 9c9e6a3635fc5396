"""solve_batch: the best placement of a given number of samples per update."""

from collections.abc import Callable, Mapping

from p2bw.compiler.placement.candidates import make_models
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.levels import search_models
from p2bw.compiler.placement.result import Limits, Placement
from p2bw.compiler.problem import PlacementProblem
from p2bw.compiler.units import several
from p2bw.contract.errors import InfeasibleError


def solve_batch(
    problems: Mapping[int, PlacementProblem],
    batch: int,
    recompute: Recompute,
    limits: Limits,
    progress: Callable[[str], None],
) -> Placement:
    """The fastest of all (microbatch size, width) whose product divides `batch`.

    What is left of the batch is the microbatches of an update: between them, the price of the
    replicas' sum and of a flush is shared out, so that each width and size is a problem of its own.
    """
    gpus = next(iter(problems.values())).topology.gpus
    shapes = [
        (width, size)
        for width in range(1, gpus + 1)
        for size in problems
        if batch % (width * size) == 0
    ]
    best: Placement | None = None
    for width, size in shapes:
        m = batch // (width * size)
        problem = problems[size].model_copy(update={"microbatches": m})
        if best is not None and _most(problem) <= best.samples_per_s:
            continue
        replicas, microbatches = several(width, "replica"), several(m, "microbatch")
        progress(f"placing the stages: {replicas}, {microbatches} of {size}")
        search = search_models(
            make_models([problem], recompute, limits.ideals), None, (width,), limits
        )
        if search.best is None:
            continue
        found = search.placement()
        if best is None or found.samples_per_s > best.samples_per_s:
            best = found
    if best is None:
        raise InfeasibleError(
            f"no plan of {several(batch, 'sample')} per update fits on {several(gpus, 'device')}, "
            f"at any microbatch size or number of replicas; offer more memory or devices, or ask "
            f"for another batch"
        )
    return best


def _most(problem: PlacementProblem) -> float:
    """Samples per second if all devices computed all the time, each as fast as the fastest."""
    work_s = sum(
        min((b.forward_s + b.backward_s, *(t.forward_s + t.backward_s for t in b.on.values())))
        for b in problem.blocks
    )
    return problem.microbatch * problem.topology.gpus / work_s if work_s else float("inf")
