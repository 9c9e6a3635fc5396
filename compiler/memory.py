"""The memory of a plan's stages: of each one's own code, run by the runtime on fake tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from p2bw.compiler.footprint import BLOCK, Footprint, footprint, message_sizes
from p2bw.compiler.kinds import stage_kind
from p2bw.compiler.peak import BATCHES, walk
from p2bw.compiler.plan import Memory, Plan, Stage
from p2bw.compiler.program import Program
from p2bw.compiler.split import StageGraph
from p2bw.contract.schedule import Pipeline, make_pipeline
from p2bw.modelfile.load import ModelFile


def with_memory(
    plan: Plan,
    program: Program,
    cut: Sequence[StageGraph],
    texts: Mapping[str, str],
    file: ModelFile,
    on_gpu: bool,
) -> Plan:
    """The plan with what its stages really hold at their peaks, in place of what it has.

    Its `extra_in_flight` becomes 0 if there is no memory for more. `texts` are the stage files.
    """
    stages = _Stages(program, cut, file, on_gpu)
    with TemporaryDirectory() as folder:
        for name, text in texts.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        held = stages.footprints(plan, Path(folder))
    counted = stages.count(plan, held)
    if plan.extra_in_flight and any(s.memory.total > s.memory.limit for s in counted.stages):
        counted = stages.count(plan.model_copy(update={"extra_in_flight": 0}), held)
    return counted


@dataclass(frozen=True, slots=True)
class _Stages:
    program: Program
    cut: Sequence[StageGraph]
    file: ModelFile
    on_gpu: bool

    def footprints(self, plan: Plan, folder: Path) -> list[Footprint]:
        """Of every stage; those that are alike are counted once."""
        pipe, found = _pipeline(plan), dict[str, Footprint]()
        unit = BLOCK if self.on_gpu else 1
        held = []
        for stage, graph in zip(plan.stages, self.cut, strict=True):
            shared = [t for t in plan.tied if stage.index in t.stages and len(t.stages) > 1]
            state = (stage.memory.weights, stage.memory.optimizer)
            kind = f"{stage.recompute} {shared} {state} {stage_kind(self.program, graph)}"
            if kind not in found:
                found[kind] = footprint(
                    self.program,
                    graph,
                    folder,
                    self.file,
                    recompute=stage.recompute,
                    pipe=pipe,
                    tied=plan.tied,
                    on_gpu=self.on_gpu,
                )
            held.append(replace(found[kind], messages=message_sizes(graph, unit)))
        return held

    def count(self, plan: Plan, held: Sequence[Footprint]) -> Plan:
        pipe = _pipeline(plan)
        stages = tuple(
            stage.model_copy(update={"memory": self._memory(stage, pipe, sizes)})
            for stage, sizes in zip(plan.stages, held, strict=True)
        )
        return plan.model_copy(update={"stages": stages})

    def _memory(self, stage: Stage, pipe: Pipeline, held: Footprint) -> Memory:
        """What is neither state, nor stash, nor messages, is transient."""
        found, planned = walk(pipe, stage.index, held), stage.memory
        own = (self.program.node(name) for name in self.cut[stage.index].attributes)
        buffers = sum(
            self.program.facts[node.name].out[0].bytes
            for node in own
            if str(node.target) not in self.program.parameters
        )
        parts = {
            "weights": planned.weights,
            "gradients": planned.gradients,
            "optimizer": planned.optimizer,
            "stash": found.in_flight * held.stash.bytes,
            "buffers": buffers + found.buffers.bytes,
        }
        rest = found.most.blocks - sum(parts.values())
        # A pipeline that drains has most in flight before there are gradients.
        parts["gradients"] += min(0, rest)
        parts |= {"transient": max(0, rest), "reserve": planned.reserve}
        return Memory(**parts, total=sum(parts.values()), limit=planned.limit)


def _pipeline(plan: Plan) -> Pipeline:
    run = plan.for_runtime()
    return make_pipeline(run, batches=BATCHES, clipped=plan.clip_norm is not None)
