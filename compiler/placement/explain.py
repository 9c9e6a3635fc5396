"""explain: what limits a placement, what moving a block would cost, what one more would buy."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from p2bw.compiler import units
from p2bw.compiler.placement.changes import with_memory
from p2bw.compiler.placement.cures import MAX_MEMORY
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.evaluate import Evaluation, Shape, evaluate
from p2bw.compiler.placement.feasible import Request
from p2bw.compiler.placement.instance import Instance, make_instance
from p2bw.compiler.placement.marginal import Gain, find_gains
from p2bw.compiler.placement.relays import judge
from p2bw.compiler.placement.result import Limits, Placement
from p2bw.compiler.placement.solver import solve
from p2bw.compiler.placement.stop import Interrupted
from p2bw.compiler.placement.windows import TOLERANCE
from p2bw.contract.errors import MismatchError, TimeLimitError

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placement to explain: which ranks hold which stage, and which stage holds which block."""

    ranks: tuple[tuple[int, ...], ...]  # by stage and replica
    stage_of_block: Mapping[str, int]
    recompute: Recompute
    gap: float  # nothing is faster by more than this share
    constraints: tuple[str, ...] = ()  # of a plan made by hand, explained as if it had none

    @property
    def shape(self) -> Shape:
        return Shape(len(self.ranks), len(self.ranks[0]), "listed", self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A limit without which the placement could be faster."""

    kind: Literal["compute", "link", "memory"]
    what: str  # "compute of stage 5"
    stages: tuple[int, ...]  # of a link: none
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSlack:
    """How much more a stage could do, and hold, for free."""

    compute_s: float
    slack_s: float
    memory: int
    limit: int
    free: int
    recompute: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSlack:
    """What one direction of a link is busy for per microbatch, and how much longer it could be."""

    name: str
    seconds: float
    slack_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one block more or less next to a cut would make of the placement."""

    blocks: str
    source: int
    target: int
    period_s: float
    change: float  # of the period, relative
    memory: tuple[int, int]  # of the source and of the target
    problems: tuple[str, ...]  # why it is not possible; empty: it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All that `p2bw explain` says of a placement. Rates are samples per second."""

    depth: int
    width: int
    microbatch: int
    schedule: str
    recompute: Recompute
    gap: float  # nothing has more samples per second by more than this share; 0: proven optimal
    period_s: float
    samples_per_s: float
    binding: tuple[Binding, ...]
    stages: tuple[StageSlack, ...]
    links: tuple[LinkSlack, ...]
    moves: tuple[Move, ...]
    best_samples_per_s: float  # of the shapes that the gains were searched in
    best_shape: tuple[int, int]  # stages, replicas
    gains: tuple[Gain, ...]
    stopped: str  # what ended the explanation early, if anything did
    best_cuts: tuple[str, ...] = ()  # modules that the best's stages end with, if it is better
    constraints: tuple[str, ...] = ()  # of the plan, which its best and its moves do not have

    def to_json(self) -> dict[str, Any]:
        return {"feasible": True, **asdict(self)}


def place(request: Request, limits: Limits, say: Say = lambda message: None) -> Placed:
    """The best placement, to explain it; NoPlanError if there is none."""
    found = _solved(request, limits, say)
    return Placed(
        ranks=found.devices,
        stage_of_block=found.stage_of_block,
        recompute=request.recompute,
        gap=found.gap,
    )


def explain(
    request: Request, placed: Placed, limits: Limits, say: Say = lambda message: None
) -> Explanation:
    """Explain a placement of the request's problem.

    Gains are those of the best placement that the request allows, so of others too.
    """
    problem, shape = request.problem, placed.shape
    instance = make_instance(problem)
    stages = _stage_of_group(instance, placed.stage_of_block)
    now = _judged(instance, shape, stages, placed.recompute)
    if not now.feasible:
        raise MismatchError(f"the plan is none of its problem: {'; '.join(now.problems)}")
    rate = shape.width * problem.microbatch / now.period_s
    binding = _busiest(now)
    gains: tuple[Gain, ...] = ()
    stopped = ""
    best, best_shape = rate, (shape.depth, shape.width)
    cuts: tuple[str, ...] = ()
    try:
        say("solving again without limits on memory")
        binding += _memory(request, placed, instance, rate, limits)
        base = _solved(request, limits)
        if base.samples_per_s > rate * (1 + TOLERANCE):
            best, best_shape = base.samples_per_s, (base.depth, base.width)
            cuts = tuple(_cuts(base))
        gains = tuple(find_gains(request, best, limits, say))
    except (TimeLimitError, Interrupted):
        stopped = "a search that found nothing"
    return Explanation(
        depth=shape.depth,
        width=shape.width,
        microbatch=problem.microbatch,
        schedule=problem.schedule,
        recompute=placed.recompute,
        gap=placed.gap,
        period_s=now.period_s,
        samples_per_s=rate,
        binding=tuple(binding),
        stages=tuple(_stage_slacks(now)),
        links=tuple(
            LinkSlack(
                name=link.name, seconds=link.seconds, slack_s=max(0.0, now.busiest_s - link.seconds)
            )
            for link in now.links
        ),
        moves=tuple(_moves(instance, shape, stages, placed.recompute, now)),
        best_samples_per_s=best,
        best_shape=best_shape,
        gains=gains,
        stopped=limits.stop.reason if limits.stop() else stopped,
        best_cuts=cuts,
        constraints=placed.constraints,
    )


def _cuts(placement: Placement) -> Iterator[str]:
    """Per stage but the last, the module of its last block in the program's order."""
    for k in range(placement.depth - 1):
        last = [name for name, stage in placement.stage_of_block.items() if stage == k][-1:]
        yield last[0].partition("#")[0] if last else ""


def _solved(request: Request, limits: Limits, say: Say = lambda message: None) -> Placement:
    return solve(
        {problem.microbatch: problem for problem in request.problems},
        depths=request.depths,
        widths=request.widths,
        recompute=request.recompute,
        limits=limits,
        progress=lambda progress: say(str(progress)),
    )


def _stage_of_group(instance: Instance, stage_of_block: Mapping[str, int]) -> tuple[int, ...]:
    names = [block.name for block in instance.problem.blocks]
    if set(names) != set(stage_of_block):
        raise MismatchError("the plan and the problem do not have the same blocks; compile again")
    found = []
    for group in range(instance.size):
        homes = {stage_of_block[names[block]] for block in instance.groups[group]}
        if len(homes) > 1:
            raise MismatchError(f"the plan cuts {instance.name(group)}, which the problem forbids")
        found.append(homes.pop())
    return tuple(found)


def _judged(
    instance: Instance, shape: Shape, stages: tuple[int, ...], recompute: Recompute
) -> Evaluation:
    """Its numbers; where a stage fits neither way, those of the way that needs less memory."""
    judged = judge(instance, shape, stages, recompute)
    found = judged.evaluation
    over = [stage.total > stage.limit for stage in found.stages]
    if recompute == "auto" and any(over):
        other = evaluate(instance, shape, stages, over, judged.relayed)
        again = [
            chosen or b.total < a.total
            for chosen, a, b in zip(judged.recompute, found.stages, other.stages, strict=True)
        ]
        found = evaluate(instance, shape, stages, again, judged.relayed)
    return found


def _busiest(now: Evaluation) -> list[Binding]:
    """The devices and links that set the period."""
    enough = now.busiest_s * (1 - TOLERANCE)
    found = [
        Binding(
            kind="compute",
            what=f"compute of stage {k}",
            stages=(k,),
            why=f"busy for {units.seconds(stage.busy_s)} per microbatch",
        )
        for k, stage in enumerate(now.stages)
        if stage.busy_s >= enough
    ]
    return found + [
        Binding(
            kind="link",
            what=f"link {link.name}",
            stages=(),
            why=f"busy for {units.seconds(link.seconds)} per microbatch",
        )
        for link in now.links
        if link.seconds >= enough
    ]


def _memory(
    request: Request, placed: Placed, instance: Instance, rate: float, limits: Limits
) -> list[Binding]:
    """The stages whose memory keeps a pipeline of this shape from being faster."""
    shape, topology = placed.shape, request.problem.topology
    same = Request(request.problems, (shape.depth,), (shape.width,), placed.recompute, {})
    if placed.gap or placed.constraints:  # what is faster anyway is no merit of memory
        rate = max(rate, _solved(same, limits).samples_per_s)
    for device in topology.kinds:
        topology = with_memory(topology, device, MAX_MEMORY)
    free = _solved(same.changed(topology=topology), limits)
    if free.samples_per_s <= rate * (1 + TOLERANCE):
        return []
    there = Shape(free.depth, free.width, "listed", free.devices)
    stages = _stage_of_group(instance, free.stage_of_block)
    sent = [i for i, edge in enumerate(instance.edges) if set(edge.names) <= set(free.relayed)]
    needs = evaluate(instance, there, stages, free.recompute, sent).stages
    over = [k for k, stage in enumerate(needs) if stage.total > stage.limit]
    most = units.data(max(needs[k].total for k in over))
    return [
        Binding(
            kind="memory",
            what=f"memory of stage{'s' if len(over) > 1 else ''} {units.ranges(over)}",
            stages=tuple(over),
            why=f"without limits on memory {units.percent(free.samples_per_s / rate - 1)} more "
            f"samples/s (up to {most} there)",
        )
    ]


def _stage_slacks(now: Evaluation) -> Iterator[StageSlack]:
    for stage in now.stages:
        yield StageSlack(
            compute_s=stage.compute_s,
            slack_s=max(0.0, now.busiest_s - stage.busy_s),
            memory=stage.total,
            limit=stage.limit,
            free=stage.limit - stage.total,
            recompute=stage.recompute_s > 0,
        )


def _moves(
    instance: Instance,
    shape: Shape,
    stages: tuple[int, ...],
    recompute: Recompute,
    now: Evaluation,
) -> Iterator[Move]:
    """Every block that could go one stage on or back by itself, in the order of the stages."""
    readers: list[list[int]] = [[] for _ in stages]
    for group, found in enumerate(instance.predecessors):
        for before in found:
            readers[before].append(group)
    for source in range(shape.depth):
        own = [group for group, stage in enumerate(stages) if stage == source]
        for target, neighbours in ((source - 1, instance.predecessors), (source + 1, readers)):
            if not 0 <= target < shape.depth:
                continue
            for group in own:
                if all(stages[other] != source for other in neighbours[group]):
                    moved = (*stages[:group], target, *stages[group + 1 :])
                    after = _judged(instance, shape, moved, recompute)
                    yield Move(
                        blocks=instance.name(group),
                        source=source,
                        target=target,
                        period_s=after.period_s,
                        change=after.period_s / now.period_s - 1,
                        memory=(after.stages[source].total, after.stages[target].total),
                        problems=tuple(map(_readable, after.problems)),
                    )


def _readable(problem: str) -> str:
    """'stage 3 needs 34359738368 bytes of 17179869184' with GiB."""
    words = problem.split(" ")
    return " ".join(
        units.data(int(word)) if word.isdigit() and int(word) > 1023 else word for word in words
    ).replace(" bytes of ", " of ")
