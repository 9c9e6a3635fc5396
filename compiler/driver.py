"""compile_model: from a model file to an artifact, phase by phase."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from p2bw import __version__
from p2bw.compiler.artifact import check_destination, check_file, write_artifact, write_file
from p2bw.compiler.describe import describe_stages, opaque_modules, tensor_spec, tied_parameters
from p2bw.compiler.dump import dump
from p2bw.compiler.emit import emit_stages, with_headers
from p2bw.compiler.lower import placement_problem
from p2bw.compiler.measured import Profile, choose_topology, read_profile, update_times
from p2bw.compiler.memory import with_memory
from p2bw.compiler.onnx.source import model_source
from p2bw.compiler.opaque_costs import Declared, declare_costs
from p2bw.compiler.optimizer_state import optimizer_bytes
from p2bw.compiler.options import checked_autocast, checked_recompute, checked_schedule
from p2bw.compiler.placement.batch import solve_batch
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.result import Limits, Placement
from p2bw.compiler.placement.search import Problems, solve
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.plan import ModelSource, Optimality, Plan, Schedule
from p2bw.compiler.problem import PROBLEM, PlacementProblem, interpolate
from p2bw.compiler.program import Program, TensorType
from p2bw.compiler.rules import Rules, check_rules, constraints_of
from p2bw.compiler.schedule import check_schedule
from p2bw.compiler.split import split
from p2bw.compiler.topology import Topology
from p2bw.compiler.trace import trace
from p2bw.compiler.units import data, parse_gap, several
from p2bw.contract.errors import InfeasibleError, ModelError, UsageError
from p2bw.contract.schedule import most_extra, updates_late
from p2bw.modelfile.load import ModelFile, Setting, load_model_file
from p2bw.passes import pipeline, run_passes
from p2bw.passes.annotate_time import annotate_time, use_profile

# A cut between layers is worth more to a reader than a thousandth of the speed, which no model of
# costs foresees.
DEFAULT_GAP = "0.1%"

# Without --microbatch these sizes are searched, up to what fits. Two are traced, the others lie on
# the line through them; the plan is then made from a trace at the size that was chosen.
MICROBATCHES = (1, 2, 4, 8, 16, 32)

_ROUNDS = 8  # of placing again, with more memory set aside each time


@dataclass(frozen=True, slots=True)
class Compiled:
    """What compile_model has made: the plan, where the artifact lies, seconds by phase."""

    plan: Plan
    artifact: Path
    seconds: Mapping[str, float]


@dataclass(slots=True)
class _Compiler:
    """The state of one compilation: the programs traced so far, and the time spent."""

    file: ModelFile
    weights: Path | None  # of a model file that was made from an ONNX file
    topology: Topology
    schedule: Schedule
    microbatches: int | None
    clip_norm: float | None
    rules: Rules
    say: Callable[[str], None]
    dump_folder: Path | None
    declared: tuple[Declared, ...] = ()
    profile: Profile | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    traces: dict[int, Program] = field(default_factory=dict)  # without costs
    programs: dict[int, Program] = field(default_factory=dict)
    problems: dict[int, PlacementProblem] = field(default_factory=dict)
    optimizer: Mapping[TensorType, int] | None = None  # bytes of its state, by type of parameter
    margin: int = 0  # bytes that a stage was seen to need beyond what its blocks add up to

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)

    def program(self, batch_size: int) -> Program:
        """The annotated program at one microbatch size, with the same blocks at every size."""
        if batch_size not in self.programs:
            program = self._traced(batch_size)
            self._dump(program)
            with self.phase("passes"):
                self.say("annotating costs and memory")
                program = run_passes(program, pipeline(self.topology.device), after=self._dump)
                for other in self.programs.values():
                    if other.facts.keys() == program.facts.keys():
                        program = replace(program, blocks=other.blocks)
                        break
                if self.profile is not None:
                    program = use_profile(program, profile=self.profile)
                    self._dump(program)
            self.programs[batch_size] = program
        return self.programs[batch_size]

    def _traced(self, batch_size: int) -> Program:
        if batch_size not in self.traces:
            with self.phase("trace"):
                self.say(f"tracing {self.file.path.name} at microbatch {batch_size}")
                program = declare_costs(trace(self.file, batch_size), self.declared)
                self._tell(program)
            self.traces[batch_size] = program
        return self.traces[batch_size]

    def _tell(self, program: Program) -> None:
        """Say which classes of modules could not be traced, once."""
        found = dict.fromkeys((c.type_name, c.reason) for c in program.opaque.values())
        for kind, reason in found if not self.traces else ():
            self.say(f"{kind} stays one call of your own module, not traced: {reason}")

    def _dump(self, program: Program) -> None:
        """Write the program as it is now, for --dump-passes; one microbatch size is enough."""
        if self.dump_folder is not None and not self.programs:
            self.dump_folder.mkdir(parents=True, exist_ok=True)
            name = f"{len(program.history) - 1:02}_{program.history[-1]}.txt"
            (self.dump_folder / name).write_text(dump(program), encoding="utf-8")

    def problem(self, batch_size: int) -> PlacementProblem:
        if batch_size not in self.problems:
            program = self.program(batch_size)
            with self.phase("passes"):
                if self.optimizer is None:  # its state does not depend on the microbatch
                    self.optimizer = optimizer_bytes(self.file, program.parameters.values())
                problem = placement_problem(
                    program,
                    topology=self.topology,
                    schedule=self.schedule,
                    microbatches=self.microbatches,
                    clip_norm=self.clip_norm,
                    optimizer=self.optimizer,
                    on={
                        kind.name: annotate_time(program, device=kind)
                        for kind in self.topology.kinds[1:]
                    },
                    update_s=update_times(self.profile, program) if self.profile else None,
                )
                constraints = constraints_of(self.rules, program, problem)
                blocks = tuple(
                    b.model_copy(update={"transient_bytes": b.transient_bytes + self.margin})
                    for b in problem.blocks
                )
                self.problems[batch_size] = problem.model_copy(
                    update={"constraints": constraints, "blocks": blocks}
                )
        return self.problems[batch_size]

    def candidates(self) -> Mapping[int, PlacementProblem]:
        """The problem at every microbatch size to search: those of the profile, if there is one."""
        if self.profile is not None:
            return {b: self.problem(b) for b in self.profile.microbatches}
        low, high = self._two_traceable()
        first, second = self.problem(low), self.problem(high)
        if self.programs[low].blocks != self.programs[high].blocks:
            # The graph itself depends on the batch size: there is no line through two problems.
            return {low: first, high: second}
        return {
            b: self.problems.get(b) or interpolate(first, second, b)
            for b in MICROBATCHES
            if b >= low
        }

    def _two_traceable(self) -> tuple[int, int]:
        """The two smallest sizes that the model takes (BatchNorm may refuse a single sample)."""
        try:
            self.program(1)
        except ModelError:
            self.program(2)
            return 2, 4
        self.program(2)
        return 1, 2


def compile_model(
    model: str | Path,
    *,
    factory: str = "model",
    settings: Mapping[str, Setting] | None = None,
    gpus: int | None = None,
    device: str | None = None,
    memory: str | None = None,
    cluster: str | None = None,
    out: str | Path | None = None,
    schedule: str = "2bw",
    depth: int | None = None,
    width: int | None = None,
    microbatch: int | None = None,
    microbatches: int | None = None,
    clip_norm: float | None = None,
    autocast: str | None = None,
    recompute: str = "auto",
    rules: Rules | None = None,
    opaque_costs: Sequence[Declared] = (),
    gap: str = DEFAULT_GAP,
    stop: Stop | None = None,
    dump_passes: str | Path | None = None,
    problem: str | Path | None = None,
    profile: str | Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Compiled:
    """Trace a model file, place it on a topology and write its stages as Python files.

    An ONNX file becomes a model file first, with its weights beside it (docs/onnx.md).
    What is None is searched (depth, width, microbatch), or has the command line's default; `rules`
    (of `parse_rules`) narrow the search down; `opaque_costs` (of `parse_declared`) are what modules
    that cannot be traced cost. The plan is within `gap` of the fastest, as far as
    the search can prove that; `stop` may end it early, and the best plan so far is kept. With
    `problem`, that file gets the placement problem at the microbatch size that was chosen. With
    `profile` (a file of `p2bw profile`) the devices are those that were measured, and times are
    measured ones. Raises the errors of contract/errors.py; nothing is written unless all has gone
    well.
    """
    checked = checked_schedule(schedule, clip_norm)
    policy = checked_recompute(recompute)
    casts = checked_autocast(autocast)
    limits = Limits(gap=parse_gap(gap), stop=stop or Stop())
    for name, value in (("depth", depth), ("width", width), ("microbatch", microbatch),
                        ("microbatches", microbatches)):  # fmt: skip
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give a number from 1 on")
    measured = read_profile(Path(profile)) if profile is not None else None
    topology = choose_topology(measured, gpus, device, memory, cluster)
    rules = rules or Rules()
    check_rules(rules, topology.gpus, depth)
    path = Path(model)
    out = Path(out) if out is not None else Path("build", _default_name(path, factory))
    check_destination(out)
    if problem is not None:
        check_file("--problem", Path(problem))
    begin = time.perf_counter()
    progress(f"loading {path.name}")
    with model_source(path, factory, settings or {}, microbatch) as source:
        file = load_model_file(source.path, factory, dict(source.settings), casts)
        compiler = _Compiler(
            file=file,
            weights=source.weights,
            topology=topology,
            schedule=checked,
            microbatches=microbatches,
            clip_norm=clip_norm,
            rules=rules,
            say=progress,
            dump_folder=Path(dump_passes) if dump_passes is not None else None,
            profile=measured,
            declared=tuple(opaque_costs),
            seconds={"load": round(time.perf_counter() - begin, 3)},
        )
        asked = (rules.depth or depth, width, source.microbatch, policy, limits)
        plan, stages = _fitting_plan(compiler, lambda: _place(compiler, *asked))
        solved = compiler.problem(plan.microbatch)
        with compiler.phase("check"):
            progress("proving the schedule")
            check_schedule(plan, make_instance(solved))
        with compiler.phase("emit"):
            files: dict[str, str | bytes | Path] = {
                "plan.json": plan.to_json(),
                PROBLEM: solved.to_json(),
                **stages,
                **_source(compiler),
            }
            write_artifact(out, files)
            if problem is not None:
                write_file(Path(problem), solved.to_json())
    return Compiled(plan=plan, artifact=out, seconds=compiler.seconds)


@dataclass(frozen=True, slots=True)
class Shared:
    """What plans of one model file have in common: each microbatch size is traced once."""

    file: ModelFile
    weights: Path | None = None  # of a model file that was made from an ONNX file
    traces: dict[int, Program] = field(default_factory=dict)
    programs: dict[str, dict[int, Program]] = field(default_factory=dict)  # by device


def plan_model(
    shared: Shared,
    topology: Topology,
    *,
    schedule: str = "2bw",
    batch: int | None = None,
    microbatch: int | None = None,
    recompute: str = "auto",
    gap: str = DEFAULT_GAP,
    progress: Callable[[str], None] = lambda message: None,
) -> Plan:
    """The plan that `compile_model` would write for the topology.

    With `batch` it is the best one of so many samples per update: how many microbatches of which
    size that are in each replica is searched, too.
    """
    # Times depend on the device, not on how much memory it has.
    kinds = repr([replace(kind, memory_bytes=1) for kind in topology.kinds])
    compiler = _Compiler(
        file=shared.file,
        weights=shared.weights,
        topology=topology,
        schedule=checked_schedule(schedule, None),
        microbatches=None,
        clip_norm=None,
        rules=Rules(),
        say=progress,
        dump_folder=None,
        traces=shared.traces,
        programs=shared.programs.setdefault(kinds, {}),
    )
    policy, limits = checked_recompute(recompute), Limits(gap=parse_gap(gap))
    depth = width = None
    if batch is not None:
        sizes = {microbatch: compiler.problem(microbatch)} if microbatch else compiler.candidates()
        found = solve_batch(sizes, batch, policy, limits, progress)
        depth, width, microbatch = found.depth, found.width, found.microbatch
        compiler.microbatches = found.microbatches_per_update
        compiler.problems.clear()
    asked = (depth, width, microbatch, policy, limits)
    plan, _ = _fitting_plan(compiler, lambda: _place(compiler, *asked))
    check_schedule(plan, make_instance(compiler.problem(plan.microbatch)))
    return plan


def _default_name(path: Path, factory: str) -> str:
    return path.stem if factory == "model" else f"{path.stem}_{factory}"


def _place(
    compiler: _Compiler,
    depth: int | None,
    width: int | None,
    microbatch: int | None,
    recompute: Recompute,
    limits: Limits,
) -> Placement:
    """Search what is not given; judge the winner on a trace at its own microbatch size."""

    def solved(
        problems: Problems,
        b: int | None,
        d: int | None,
        w: int | None,
        limits: Limits,
        start: Placement | None = None,
    ) -> Placement:
        with compiler.phase("solve"), limits.stop:
            compiler.say("placing the stages")
            return solve(
                problems,
                microbatches=None if b is None else (b,),
                depths=None if d is None else (d,),
                widths=None if w is None else (w,),
                recompute=recompute,
                limits=limits,
                progress=lambda p: compiler.say(str(p)),
                start=start,
            )

    if microbatch is not None:
        compiler.problem(microbatch)  # traced before the clock of the search runs
        return solved(compiler.problem, microbatch, depth, width, limits)
    found = solved(compiler.candidates(), None, depth, width, limits)
    if found.microbatch in compiler.problems:
        return found
    exact = compiler.problem(found.microbatch)
    # Once it had to stop, the dynamic program alone competes with what was found.
    stop = limits.stop
    stopped = stop()
    if stopped:
        limits = replace(limits, deterministic_s=0.0, stop=Stop())
    final = solved(
        {found.microbatch: exact},
        None,
        found.depth,
        found.width,
        limits,
        found if stopped else None,
    )
    space = found.search_space
    if stop() and not stopped and final.status != "optimal":
        space += f"; stopped by {stop.reason}"
    bound = max(found.bound, final.bound)
    return replace(
        final,
        bound=bound,
        gap=max(0.0, bound / final.samples_per_s - 1),
        status=found.status if final.status == "optimal" else final.status,
        search_space=space,
    )


def _fitting_plan(
    compiler: _Compiler, place: Callable[[], Placement]
) -> tuple[Plan, dict[str, str]]:
    """A plan whose stages fit as they were counted, not only as the placement adds up blocks.

    What it adds up is close and mostly more. Where it was less, and a stage does not fit, all is
    placed again with what it lacked set aside on every device.
    """
    for _ in range(_ROUNDS):
        placement = place()
        plan, texts = _plan(compiler, placement)
        lacking = [
            stage.memory.total - numbers.total
            for stage, numbers in zip(plan.stages, placement.stages, strict=True)
            if stage.memory.total > stage.memory.limit
        ]
        if not lacking:
            return plan, texts
        compiler.margin += max(lacking)
        compiler.problems.clear()
    raise InfeasibleError(
        f"no placement was found whose stages fit into memory as they were counted: the last one "
        f"lacks {data(max(lacking))}; offer more devices, more memory or a smaller microbatch"
    )


def _plan(compiler: _Compiler, placement: Placement) -> tuple[Plan, dict[str, str]]:
    program = compiler.program(placement.microbatch)
    cut = split(program, placement.stage_of_block, placement.relayed)
    # Memory that is left over lets every stage but the last take on a microbatch early.
    replicated, clipped = placement.width > 1, compiler.clip_norm is not None
    late = updates_late(compiler.schedule, replicated=replicated, clipped=clipped)
    m = placement.microbatches_per_update
    extra = min(1, most_extra(compiler.schedule, placement.depth, m, late))
    plan = Plan(
        p2bw_version=__version__,
        torch_version=torch.__version__.partition("+")[0],
        model=_model_source(compiler, program),
        topology=compiler.topology.to_json(),
        schedule=compiler.schedule,
        depth=placement.depth,
        width=placement.width,
        microbatch=placement.microbatch,
        microbatches_per_update=placement.microbatches_per_update,
        extra_in_flight=extra,
        clip_norm=compiler.clip_norm,
        constraints=compiler.rules.texts,
        period_s=placement.period_s,
        samples_per_s=placement.samples_per_s,
        utilisation=placement.utilisation,
        bytes_per_sample=placement.bytes_per_sample,
        optimality=Optimality(
            status=placement.status,
            objective=placement.samples_per_s,
            bound=placement.bound,
            gap=placement.gap,
            search_space=placement.search_space,
        ),
        inputs=tuple(tensor_spec(name, kind) for name, kind in program.inputs.items()),
        tied=tied_parameters(program, cut),
        stages=describe_stages(program, cut, placement),
        opaque=opaque_modules(program, cut),
        notes=program.notes,
    )
    with compiler.phase("emit"):
        compiler.say(f"writing {several(placement.depth, 'stage')}")
        texts = emit_stages(program, cut)
    with compiler.phase("memory"):
        compiler.say("counting memory")
        plan = with_memory(
            plan, program, cut, texts, compiler.file, compiler.topology.device.on_gpu
        )
    with compiler.phase("emit"):
        return plan, with_headers(texts, program, plan)


def _model_source(compiler: _Compiler, program: Program) -> ModelSource:
    file = compiler.file
    return ModelSource(
        file=file.path.name if compiler.weights else _relative(file.path),
        factory=file.factory,
        settings=dict(file.settings),
        autocast=checked_autocast(file.autocast),
        sha256=file.sha256(),
        name=program.model_name,
    )


def _relative(path: Path) -> str:
    """Relative to the working folder where the file lies below it, else the bare name."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return path.name


def _source(compiler: _Compiler) -> dict[str, bytes | Path]:
    """A copy of the model file, so that an artifact can be moved and still be run."""
    copies: dict[str, bytes | Path] = {f"source/{compiler.file.path.name}": compiler.file.source}
    if compiler.weights is not None:
        copies[f"source/{compiler.weights.name}"] = compiler.weights
    return copies
