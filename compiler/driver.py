"""compile_model: from a model file to an artifact, phase by phase."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2bw.compiler.artifact import check_destination, check_file, write_artifact, write_file
from p2bw.compiler.compilation import Compilation
from p2bw.compiler.fitting import Asked, fitting_plan
from p2bw.compiler.measured import choose_topology, read_profile
from p2bw.compiler.onnx.source import model_source
from p2bw.compiler.opaque_costs import Declared
from p2bw.compiler.options import checked_autocast, checked_recompute, checked_schedule
from p2bw.compiler.placement.batch import solve_batch
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.plan import Plan
from p2bw.compiler.problem import PROBLEM
from p2bw.compiler.program import Program
from p2bw.compiler.rules import Rules, check_rules
from p2bw.compiler.schedule import check_schedule
from p2bw.compiler.topology import Topology
from p2bw.compiler.units import parse_gap
from p2bw.contract.errors import UsageError
from p2bw.modelfile.load import ModelFile, Setting, load_model_file

# A cut between layers is worth more to a reader than a thousandth of the speed, which no model of
# costs foresees.
DEFAULT_GAP = "0.1%"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What compile_model has made: the plan, where the artifact lies, seconds by phase."""

    plan: Plan
    artifact: Path
    seconds: Mapping[str, float]


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
    _check_counts(depth=depth, width=width, microbatch=microbatch, microbatches=microbatches)
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
        compilation = Compilation(
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
        asked = Asked(
            depth=rules.depth or depth,
            width=width,
            microbatch=source.microbatch,
            recompute=policy,
            limits=limits,
        )
        plan, stages = fitting_plan(compilation, asked)
        _write(compilation, plan, stages, out, Path(problem) if problem is not None else None)
    return Compiled(plan=plan, artifact=out, seconds=compilation.seconds)


def _check_counts(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give a number from 1 on")


def _write(
    compilation: Compilation,
    plan: Plan,
    stages: Mapping[str, str],
    out: Path,
    problem: Path | None,
) -> None:
    """Prove the plan's schedule, and write the artifact with all that it was made from."""
    solved = compilation.problem(plan.microbatch)
    with compilation.phase("check"):
        compilation.say("proving the schedule")
        check_schedule(plan, make_instance(solved))
    with compilation.phase("emit"):
        files: dict[str, str | bytes | Path] = {
            "plan.json": plan.to_json(),
            PROBLEM: solved.to_json(),
            **stages,
            **_source(compilation),
        }
        write_artifact(out, files)
        if problem is not None:
            write_file(problem, solved.to_json())


def _source(compilation: Compilation) -> dict[str, bytes | Path]:
    """A copy of the model file, so that an artifact can be moved and still be run."""
    copies: dict[str, bytes | Path] = {
        f"source/{compilation.file.path.name}": compilation.file.source
    }
    if compilation.weights is not None:
        copies[f"source/{compilation.weights.name}"] = compilation.weights
    return copies


def _default_name(path: Path, factory: str) -> str:
    return path.stem if factory == "model" else f"{path.stem}_{factory}"


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
    schedule: str,
    batch: int | None,
    microbatch: int | None,
    recompute: str,
    gap: str,
    progress: Callable[[str], None],
) -> Plan:
    """The plan that `compile_model` would write for the topology.

    With `batch` it is the best one of so many samples per update: how many microbatches of which
    size that are in each replica is searched, too.
    """
    # Times depend on the device, not on how much memory it has.
    kinds = repr([replace(kind, memory_bytes=1) for kind in topology.kinds])
    compilation = Compilation(
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
        given = {microbatch: compilation.problem(microbatch)} if microbatch else None
        found = solve_batch(given or compilation.candidates(), batch, policy, limits, progress)
        depth, width, microbatch = found.depth, found.width, found.microbatch
        compilation.microbatches = found.microbatches_per_update
        compilation.problems.clear()
    asked = Asked(depth=depth, width=width, microbatch=microbatch, recompute=policy, limits=limits)
    plan, _ = fitting_plan(compilation, asked)
    check_schedule(plan, make_instance(compilation.problem(plan.microbatch)))
    return plan
