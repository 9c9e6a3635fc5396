"""explain_file: the explanation of an artifact, or of the best placement of a problem file."""

from collections.abc import Callable
from pathlib import Path

from p2bw.compiler.options import checked_recompute
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.explain import Explanation, Placed, explain, place
from p2bw.compiler.placement.feasible import Request
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.relays import judge
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.plan import Plan, read_plan
from p2bw.compiler.problem import Constraints, PlacementProblem, problem_of
from p2bw.compiler.readers import read_any
from p2bw.contract.errors import UsageError


def explain_file(
    path: Path,
    *,
    depth: int | None = None,
    width: int | None = None,
    recompute: str | None = None,
    stop: Stop | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Explanation:
    """Explain the plan of an artifact, or the best placement of a PlacementProblem.

    `depth`, `width` and `recompute` narrow down what is solved; an artifact's plan is explained as
    it is, one cut by hand (`--cut-after`) against the best with as many stages. NoPlanError says
    what would help where nothing fits.
    """
    for name, value in (("depth", depth), ("width", width)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give a number from 1 on")
    policy = checked_recompute(recompute or "auto")
    plan = read_plan(path) if path.is_dir() else None
    problem = _problem(path)
    if plan is not None and recompute is None:
        policy = _policy(plan, problem)
    if plan is not None and _by_hand(plan):
        # With its constraints there is no other plan to compare it with.
        problem = problem.model_copy(update={"constraints": Constraints()})
        depth, width = depth or plan.depth, width or plan.width
    request = Request(
        (problem,),
        None if depth is None else (depth,),
        None if width is None else (width,),
        policy,
        {},
    )
    with stop or Stop() as stop:
        limits = Limits(stop=stop)
        placed = place(request, limits, progress) if plan is None else _placed(plan, policy)
        return explain(request, placed, limits, progress)


def _problem(path: Path) -> PlacementProblem:
    if path.is_dir():
        return problem_of(path)
    problem = read_any(path)
    if not isinstance(problem, PlacementProblem):
        raise UsageError(f"{path} is no PlacementProblem; only those and artifacts are explained")
    return problem


def _policy(plan: Plan, problem: PlacementProblem) -> Recompute:
    """What the plan was made with, as far as its stages tell."""
    chosen = tuple(stage.recompute for stage in plan.stages)
    placed = _placed(plan, "auto")
    instance = make_instance(problem)
    home = {block.name: placed.stage_of_block.get(block.name, 0) for block in problem.blocks}
    stages = [home[problem.blocks[blocks[0]].name] for blocks in instance.groups]
    if chosen == judge(instance, placed.shape, stages, "auto").recompute:
        return "auto"
    return "always" if all(chosen) else "never"


def _placed(plan: Plan, recompute: Recompute) -> Placed:
    return Placed(
        ranks=tuple(stage.devices for stage in plan.stages),
        stage_of_block={name: stage.index for stage in plan.stages for name in stage.blocks},
        recompute=recompute,
        gap=plan.optimality.gap,
        constraints=plan.constraints if _by_hand(plan) else (),
    )


def _by_hand(plan: Plan) -> bool:
    """Whether the user has said where all of the cuts are."""
    return any(text.startswith("cut-after ") for text in plan.constraints)
