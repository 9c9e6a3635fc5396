"""Artifacts of the compiler, trained by the runtime, against the original program's graph."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import ROOT
from reference import Reference
from torch import Tensor, fx, nn

from p2bw.compiler.driver import compile_model
from p2bw.compiler.program import Program
from p2bw.compiler.rules import parse_rules
from p2bw.compiler.topology import make_topology
from p2bw.compiler.trace import trace
from p2bw.compiler.verify import verify
from p2bw.contract.job import Job
from p2bw.contract.plan import Plan, read_plan
from p2bw.contract.stages import find_model_file
from p2bw.modelfile.load import flatten_microbatch
from p2bw.passes import pipeline, run_passes
from p2bw.runtime.local import Trained, train_in_threads

pytestmark = pytest.mark.usefixtures("one_thread")


class Whole(nn.Module):
    """The user's model run by the program's flat graph, node by node.

    A parameter that is tied across stages has a leaf for each of them: the pipeline sums each
    stage's gradients over the batch before it adds them up.
    """

    def __init__(self, model: nn.Module, program: Program, plan: Plan, artifact: Path) -> None:
        super().__init__()
        self.model = model
        self.program = program
        stages = json.loads((artifact / "plan.json").read_text())["stages"]
        stage_of_block = {name: stage["index"] for stage in stages for name in stage["blocks"]}
        assert program.blocks is not None
        self.stage = {n: stage_of_block[b.name] for b in program.blocks for n in b.nodes}
        self.tied: list[list[str]] = []
        self.copies: dict[tuple[str, int], str] = {}
        for tied in plan.tied:
            value = model.get_parameter(tied.names[0])
            for stage in tied.stages if len(tied.stages) > 1 else ():
                own = value if stage == tied.stages[0] else nn.Parameter(value.detach().clone())
                self.copies[tied.names[0], stage] = f"copy{len(self.copies)}"
                self.register_parameter(self.copies[tied.names[0], stage], own)
            self.tied.append([self.copies[k] for k in self.copies if k[0] == tied.names[0]])
        self.tied = [names for names in self.tied if names]

    def forward(self, inputs: tuple[Tensor, ...], enter: Callable[[int], None]) -> Tensor:
        tensors = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
            **self.program.constants,
        }
        feed = iter(inputs)
        values: dict[fx.Node, Any] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = tensors[str(node.target)]
            elif node.op == "call_function":
                stage = self.stage[node.name]
                enter(stage)
                arguments, keywords = fx.node.map_arg(
                    (node.args, node.kwargs),
                    lambda n: self.value(n, stage, values),  # noqa: B023
                )
                with self.program.entering(node):
                    values[node] = node.target(*arguments, **keywords)
        return values[self.program.loss]

    def value(self, node: fx.Node, stage: int, values: dict[fx.Node, Any]) -> Any:
        copy = self.copies.get((str(node.target), stage)) if node.op == "get_attr" else None
        return self.get_parameter(copy) if copy else values[node]


def reference(job: Job) -> tuple[list[float], dict[str, Tensor]]:
    plan = read_plan(job.artifact)
    file = find_model_file(job.artifact)
    program = run_passes(
        trace(file, plan.microbatch), pipeline(make_topology(gpus=2, device="cpu").device)
    )
    torch.manual_seed(job.seed)
    whole = Whole(file.model(), program, plan, job.artifact)
    optimizer = file.optimizer((n, p) for n, p in whole.named_parameters() if p.requires_grad)

    def step(model: nn.Module, item: Any, enter: Callable[[int], None]) -> Tensor:
        loss: Tensor = model(flatten_microbatch(*item), enter)
        return loss

    loop = Reference(
        model=whole,
        step=step,
        items=file.data(plan.microbatch, job.seed),
        optimizer=optimizer,
        scheduler=file.scheduler(optimizer),
        depth=plan.depth,
        width=plan.width,
        microbatches=job.microbatches or plan.microbatches_per_update,
        seed=job.seed,
        delay=0 if job.schedule == "flush" else 1,
        tied=whole.tied,
        clip_norm=job.clip_norm,
    )
    return loop.train(job.steps), whole.model.state_dict()


def differing(job: Job, trained: Trained) -> list[str]:
    losses, state = reference(job)
    found = [] if losses == trained.losses else ["losses"]
    for rank, rank_state in enumerate(trained.states):
        if rank % read_plan(job.artifact).width == 0:  # running statistics are replica 0's
            found += [n for n, tensor in rank_state.items() if not torch.equal(tensor, state[n])]
    assert {name for rank_state in trained.states for name in rank_state} <= state.keys()
    return found


def compile_example(out: Path, example: str, *, gpus: int, depth: int, **options: Any) -> Path:
    name, _, factory = example.partition(":")
    compiled = compile_model(
        ROOT / "examples" / f"{name}.py",
        factory=factory,
        gpus=gpus,
        device="cpu",
        depth=depth,
        out=out,
        microbatch=2,
        **options,
    )
    return compiled.artifact


@pytest.mark.parametrize(
    ("example", "depth", "width", "schedule", "recompute"),
    [
        ("gpt:tiny", 2, 1, "2bw", "never"),
        ("gpt:tiny", 3, 1, "2bw", "always"),
        ("gpt:tiny", 2, 2, "2bw", "never"),
        ("gpt:tiny", 2, 1, "flush", "never"),
        ("unet:tiny", 3, 1, "2bw", "never"),
        ("resnet:tiny", 2, 1, "2bw", "always"),
    ],
)
def test_training_an_example_equals_the_reference_bitwise(
    tmp_path: Path, example: str, depth: int, width: int, schedule: str, recompute: str
) -> None:
    artifact = compile_example(
        tmp_path / "a", example, gpus=depth * width, depth=depth, width=width, recompute=recompute
    )
    job = Job(artifact=artifact, steps=4, schedule=schedule, microbatches=3)
    assert differing(job, train_in_threads(job)) == []


TRANSPOSED = """
import torch
from torch import nn


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x):
        return x + self.bias


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = Shift()
        self.mix = nn.Linear(48, 64)

    def forward(self, x):
        return self.mix(self.shift(x).transpose(1, 2)).tanh()  # whose gradient is transposed too


def model():
    return Model()


def inputs(batch_size):
    return (torch.randn(batch_size, 48, 64),)


def targets(batch_size):
    return (torch.randn(batch_size, 64, 64),)


def loss(outputs, wanted):
    return (outputs - wanted).square().mean()
"""


def test_gradients_have_the_layout_that_they_have_in_the_whole_model(tmp_path: Path) -> None:
    """The sum for the bias goes along it: of a gradient laid out otherwise it has other bits."""
    (tmp_path / "transposed.py").write_text(TRANSPOSED)
    artifact = compile_model(
        tmp_path / "transposed.py",
        **{"gpus": 2, "depth": 2, "microbatch": 4, "device": "cpu", "out": tmp_path / "a"},
        rules=parse_rules(cut_after=["shift"]),
    ).artifact
    found = verify(artifact)
    assert found.problems == ()
    assert found.bitwise == found.compared == 3
    job = Job(artifact=Path(artifact), steps=4, microbatches=3)
    assert differing(job, train_in_threads(job)) == []
