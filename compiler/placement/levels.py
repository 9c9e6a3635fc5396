"""search_models: a search of all shapes; of many blocks on a coarse graph first.

The coarse graph is solved, the fine one is bounded, and looked at again where the gap is too wide.
A placement of the coarse groups is one of the fine groups too. What it attains leaves few steps of
the fine graph to be considered: those that keep no device busy for longer. Over those, a dynamic
program bounds all depths, and solves what is still open. Where the fine graph has too many ideals
to list, it is bounded without some of its groups (skeleton.py), and the coarse groups are taken
apart around the cuts of the best placement, again and again while that helps.
"""

from collections.abc import Sequence
from dataclasses import replace

from p2bw.compiler.placement.candidates import (
    Candidate,
    Model,
    least_busy,
    make_candidates,
    make_shapes,
)
from p2bw.compiler.placement.coarsen import (
    far_by_edges,
    far_in_order,
    finer_edges,
    finer_stages,
    merged,
    taken_apart,
    work_ps,
)
from p2bw.compiler.placement.dp import step_costs
from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.ideals import make_family, make_steps
from p2bw.compiler.placement.instance import Numbers
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.placement.search import OnProgress, Search, judge_candidate
from p2bw.compiler.placement.skeleton import skeleton

COARSE_SHARE = 0.25  # of CP-SAT's time, for the coarse graph if nothing else finds a placement
ROUNDS = 8  # of taking apart, at most
HALVINGS = 8  # of how far around the cuts, at most


def search_models(
    models: Sequence[Model],
    depths: Sequence[int] | None,
    widths: Sequence[int] | None,
    limits: Limits,
    progress: OnProgress | None = None,
) -> Search:
    """The search of all shapes at all microbatch sizes: what it found, and what it left open."""
    shapes = make_shapes(models[0].instance, depths, widths)
    if models[0].coarse is not None:
        search = _search_levels(models, shapes, limits, progress)
    else:
        # Few steps are searched to the end at no cost; the gap is for what may take long.
        search = Search(make_candidates(models, shapes), replace(limits, gap=0.0), progress)
        search.dynamic_program()
        search.allow(limits.gap)
    search.integer_program(limits.deterministic_s - search.spent)
    return search


def _search_levels(
    models: Sequence[Model],
    shapes: Sequence[Shape],
    limits: Limits,
    progress: OnProgress | None,
) -> Search:
    """A search of models with coarse ones, as far as it goes without CP-SAT on the fine graphs."""
    search = Search(make_candidates(models, shapes), limits, progress)
    coarse = _coarse(models, shapes, replace(limits, gap=0.0))
    search.spent += coarse.spent
    if coarse.best is not None:
        _adopt(search, models, coarse.best)
        if limits.any_will_do:
            return search
    for model in models:
        _tighten(search, model)
    if models[0].family.complete:
        search.dynamic_program()
    elif search.best is not None:
        _refine(search, models, limits)
    return search


def _coarse(models: Sequence[Model], shapes: Sequence[Shape], limits: Limits) -> Search:
    """The best placement of the coarse groups."""
    coarse = [model.coarse for model in models if model.coarse is not None]
    some = [shape for shape in shapes if shape.depth <= coarse[0].instance.size]
    search = Search(make_candidates(coarse, some), limits, None)
    search.dynamic_program()
    if search.best is None:
        search.integer_program(limits.deterministic_s * COARSE_SHARE)
    return search


def _adopt(search: Search, models: Sequence[Model], best: Candidate) -> None:
    """Offer a placement of coarser groups to a search of the fine ones."""
    assert best.stages is not None
    size = best.model.instance.problem.microbatch
    (model,) = (model for model in models if model.instance.problem.microbatch == size)
    stages = finer_stages(model.instance, best.model.instance, best.stages)
    relayed = finer_edges(
        model.instance, best.model.instance, judge_candidate(best, best.stages).relayed
    )
    for candidate in search.candidates:
        if candidate.model.instance is model.instance and candidate.shape == best.shape:
            break
    else:
        candidate = Candidate(model, best.shape, 0.0)
    candidate.relayed = relayed
    search.offer(candidate, stages)


def _tighten(search: Search, model: Model) -> None:
    """Bound all open shapes of a model by one sweep over the steps that are short enough."""
    still = [candidate for candidate in search.open() if candidate.model is model]
    if not still or search.stop():
        return
    longest_s = max(map(search.longest_s, still))
    shapes = [candidate.shape for candidate in still]
    if model.family.complete:
        model = model.within(longest_s)
        least = least_busy(model.costs, shapes)
    else:
        bare = skeleton(model.instance)
        steps = make_steps(bare, make_family(bare), longest_s)
        least = least_busy(step_costs(bare, steps, model.recompute), shapes, gaps=True)
    for candidate in still:
        candidate.model = model
        # A chain that is not within those steps has a longer one.
        busiest_s = min(least(candidate.shape), longest_s)
        bound = candidate.rate(busiest_s) if busiest_s < float("inf") else 0.0
        candidate.bound = min(candidate.bound, bound)


def _refine(search: Search, models: Sequence[Model], limits: Limits) -> None:
    """Move the cuts of the best placement on finer groups around them, while that helps."""
    for _ in range(ROUNDS):
        rate = search.rate
        for far in (far_by_edges, far_in_order):
            best = search.best
            if not search.open() or search.stop() or best is None or best.stages is None:
                return
            far_ps = far(best.model.instance, best.stages)
            model = _finer(best, far_ps, search.longest_s(best), limits.ideals)
            if model is not None:
                finer = Search(make_candidates([model], [best.shape]), limits, None)
                finer.rate = search.rate
                finer.dynamic_program()
                if finer.best is not None:
                    _adopt(search, models, finer.best)
        if search.rate == rate:
            return


def _finer(best: Candidate, far_ps: Numbers, longest_s: float, ideals: int) -> Model | None:
    """A model of the best's coarse sets, taken apart as far around its cuts as can be solved."""
    instance, sets = best.model.instance, best.model.sets
    reach = float(work_ps(instance).sum()) / best.shape.depth / 2
    for _ in range(HALVINGS):
        some = taken_apart(sets, far_ps, reach)
        if len(some) == len(sets):
            return None
        mixed = merged(instance, some)
        family = make_family(mixed, ideals)
        if family.complete:
            steps = make_steps(mixed, family, longest_s)
            return Model(mixed, step_costs(mixed, steps, best.model.recompute))
        reach /= 2
    return None
