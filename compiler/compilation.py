"""Compilation: what a compile knows of its model at each microbatch size, found out when asked."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2bw.compiler.dump import dump
from p2bw.compiler.lower import placement_problem
from p2bw.compiler.measured import Profile, update_times
from p2bw.compiler.opaque_costs import Declared, declare_costs
from p2bw.compiler.optimizer_state import optimizer_bytes
from p2bw.compiler.plan import Schedule
from p2bw.compiler.problem import PlacementProblem, interpolate
from p2bw.compiler.program import Program, TensorType
from p2bw.compiler.rules import Rules, constraints_of
from p2bw.compiler.topology import Topology
from p2bw.compiler.trace import trace
from p2bw.contract.errors import ModelError
from p2bw.modelfile.load import ModelFile
from p2bw.passes import pipeline, run_passes
from p2bw.passes.annotate_time import annotate_time, use_profile

# Without --microbatch these sizes are searched, up to what fits. Two are traced, the others lie on
# the line through them; the plan is then made from a trace at the size that was chosen.
MICROBATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(slots=True)
class Compilation:
    """The state of one compile: the programs traced so far, and the time spent."""

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
    # By block: bytes that stages which had it were seen to need beyond what blocks add up to.
    margins: dict[str, int] = field(default_factory=dict)

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
                    block.model_copy(
                        update={
                            "transient_bytes": block.transient_bytes
                            + self.margins.get(block.name, 0)
                        }
                    )
                    for block in problem.blocks
                )
                self.problems[batch_size] = problem.model_copy(
                    update={"constraints": constraints, "blocks": blocks}
                )
        return self.problems[batch_size]

    def set_aside(self, blocks: Iterable[str], size: int) -> None:
        """So much more memory for every stage that has one of these blocks, from now on."""
        for name in blocks:
            self.margins[name] = self.margins.get(name, 0) + size
        self.problems.clear()

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
