"""solve: the best placement over depth, width, microbatch size, recomputation and layout."""

from collections.abc import Callable, Iterable, Mapping

from p2bw.compiler.placement.candidates import make_models
from p2bw.compiler.placement.cures import infeasible
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.feasible import Request
from p2bw.compiler.placement.infeasible import why_infeasible
from p2bw.compiler.placement.levels import search_models
from p2bw.compiler.placement.result import Limits, Placement, Progress
from p2bw.compiler.placement.search import OnProgress
from p2bw.compiler.problem import PlacementProblem
from p2bw.contract.errors import InfeasibleError, TimeLimitError

MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)

Problems = Mapping[int, PlacementProblem] | Callable[[int], PlacementProblem]


def solve(
    problems: Problems,
    *,
    depths: Iterable[int] | None = None,
    widths: Iterable[int] | None = None,
    microbatches: Iterable[int] | None = None,
    recompute: Recompute = "auto",
    limits: Limits | None = None,
    progress: OnProgress | None = None,
    start: Placement | None = None,
) -> Placement:
    """The placement with the most samples per second, and how near to the best it is proven to be.

    `problems` gives the problem at each microbatch size; without `microbatches`, all of a mapping's
    or the powers of two. Without `depths`, every depth; without `widths`, as many replicas as the
    devices allow. `start`, a placement of the same blocks, is taken if nothing better is found.
    InfeasibleError if nothing fits; TimeLimitError if that could not be settled.
    """
    limits = limits or Limits()
    if microbatches is None:
        microbatches = problems if isinstance(problems, Mapping) else MICROBATCHES
    get = problems.__getitem__ if isinstance(problems, Mapping) else problems
    chosen = [get(size) for size in sorted(set(microbatches))]
    depths, widths = _distinct(depths), _distinct(widths)
    try:
        models = make_models(chosen, recompute, limits.ideals)
        search = search_models(models, depths, widths, limits, progress)
    except InfeasibleError as error:
        reason = str(error)
    else:
        if start is not None:
            search.offer_start(start)
        if search.best is not None:
            return search.placement()
        if search.open():
            if limits.stop():
                raise limits.stop.error()
            raise TimeLimitError(
                f"no placement found within {limits.deterministic_s:g} deterministic seconds, and "
                "none ruled out; raise the limit, fix --depth, or offer more memory"
            )
        reason = why_infeasible(models, [candidate.shape for candidate in search.candidates])
    if progress is not None:
        progress(Progress(phase="cures", done=0, total=0, samples_per_s=None, bound=0.0))
    request = Request(tuple(chosen), depths, widths, recompute, problems)
    raise infeasible(reason, request, limits)


def _distinct(values: Iterable[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(sorted(set(values)))


def solve_fixed(
    problem: PlacementProblem,
    depth: int,
    width: int = 1,
    *,
    limits: Limits | None = None,
) -> Placement:
    """The best placement of one shape at the problem's own microbatch size."""
    return solve(
        {problem.microbatch: problem},
        depths=(depth,),
        widths=(width,),
        limits=limits,
    )
