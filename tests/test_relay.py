"""Tensors that every stage on their way passes on: the code, its gradients, and its training."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from annotated import RealRun, annotated
from corpus import CORPUS, ROOT, Architecture
from safetensors.torch import load_file
from staged import compare, cut, program_of
from test_runtime_compiled import differing
from test_runtime_processes import torchrun

from p2bw.compiler import driver, fitting
from p2bw.compiler.emit import emit_stages
from p2bw.compiler.footprint import footprint
from p2bw.compiler.placement.evaluate import Shape, evaluate
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.relays import relayed_tensors
from p2bw.compiler.placement.result import Placement
from p2bw.compiler.problem import PlacementProblem
from p2bw.compiler.split import StageGraph, split
from p2bw.compiler.verification import TOLERANCE
from p2bw.compiler.verify import verify
from p2bw.contract.errors import InputFileError
from p2bw.contract.job import Job
from p2bw.contract.plan import read_plan
from p2bw.contract.schedule import Pipeline
from p2bw.runtime.local import train_in_threads

pytestmark = pytest.mark.usefixtures("one_thread")

# `stem` is read in every stage, twice.
ECHO = """\
import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.outer = nn.Linear(16, 16)

    def forward(self, x, stem):
        return torch.tanh(self.outer(torch.tanh(self.inner(x + stem)) * stem))


class Echo(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        x = stem = self.stem(x)
        for layer in self.layers:
            x = F.dropout(layer(x, stem), 0.1)
        return self.head(x).square().mean()


def tiny():
    return Echo()


def inputs(batch_size):
    return (torch.randn(batch_size, 16),)
"""

Choice = Callable[[list[int]], list[int]]  # edges that skip stages -> those relayed
Compile = Callable[..., Path]


def with_relays(problem: PlacementProblem, placement: Placement, choice: Choice) -> Placement:
    """The placement with these of its skipping tensors relayed, and the numbers of that."""
    instance = make_instance(problem)
    home = placement.stage_of_block
    stages = [home[problem.blocks[blocks[0]].name] for blocks in instance.groups]
    skipping = [
        i
        for i, edge in enumerate(instance.edges)
        if edge.bytes and max(stages[c] for c in edge.consumers) > stages[edge.producer] + 1
    ]
    chosen = choice(skipping)
    assert chosen, "nothing to relay"
    shape = Shape(placement.depth, placement.width, "listed", placement.devices)
    numbers = evaluate(instance, shape, stages, placement.recompute, chosen)
    assert numbers.feasible
    return replace(
        placement,
        relayed=relayed_tensors(instance, chosen),
        stages=numbers.stages,
        links=numbers.links,
        period_s=numbers.period_s,
    )


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """compiled_with(choice, path, 3): the artifact of a tiny model in 3 stages with these relays.

    The placement is the solver's own; what it would relay is replaced by the choice.
    """
    solve = fitting.solve

    def compile_with(choice: Choice, model: Path, depth: int, **options: Any) -> Path:
        def solved(problems: Any, **given: Any) -> Placement:
            placement = solve(problems, **given)
            return with_relays(problems(placement.microbatch), placement, choice)

        monkeypatch.setattr(fitting, "solve", solved)
        given = {"factory": "tiny", "gpus": depth, "device": "cpu", "microbatch": 2, **options}
        out = tmp_path / f"{model.stem}_{len(list(tmp_path.iterdir()))}"
        return driver.compile_model(model, depth=depth, out=out, **given).artifact

    return compile_with


def every(edges: list[int]) -> list[int]:
    return edges


def every_other(edges: list[int]) -> list[int]:
    return edges[::2]


def hops(artifact: Path) -> dict[str, list[tuple[int, int]]]:
    """From which stage to which each tensor is sent."""
    found: dict[str, list[tuple[int, int]]] = {}
    for stage in read_plan(artifact).stages:
        for send in stage.sends:
            found.setdefault(send.tensor, []).append((stage.index, send.peer))
    return found


@pytest.mark.parametrize("example", CORPUS, ids=lambda example: example.name)
def test_stages_that_relay_compute_what_the_model_computes(example: Architecture) -> None:
    """Every example, cut evenly and raggedly."""
    file, program = program_of(example.path, example.factory, example.batch)
    for depth, seed in ((4, None), (5, 1)):
        stages = cut(program, depth, seed, relayed=True)
        assert all(t.consumer == t.producer + 1 for s in stages for t in s.sends)
        compare(file, program, stages)


CASES = [
    (every, "unet", 3),
    (every, "unet", 4),
    (every_other, "unet", 4),
    (every, "seq2seq", 5),
    (every, "hf_t5", 3),
    (every, "hf_t5", 4),
    (every_other, "hf_t5", 4),
]


@pytest.mark.parametrize(("choice", "name", "depth"), CASES)
def test_verify_of_relays_is_bitwise(
    choice: Choice, name: str, depth: int, compiled_with: Compile
) -> None:
    artifact = compiled_with(choice, ROOT / "examples" / f"{name}.py", depth)
    ways = hops(artifact).values()
    assert any(len(way) > 1 and way[0][1] == way[1][0] for way in ways)
    assert any(b > a + 1 for way in ways for a, b in way) == (choice is every_other)
    result = verify(artifact)
    assert result.problems == ()
    assert result.loss_bitwise
    if name == "hf_t5":  # its embedding: tests/test_verify.py
        assert all(d.reason and d.max_rel <= TOLERANCE for d in result.differences)
        assert result.bitwise >= result.compared - 1
    else:
        assert result.bitwise == result.compared


def test_sums_along_a_relay_are_in_eagers_order(tmp_path: Path, compiled_with: Compile) -> None:
    """Three stages read `stem`, each twice, and two of them pass it on."""
    (tmp_path / "echo.py").write_text(ECHO)
    artifact = compiled_with(every, tmp_path / "echo.py", 4)
    (stem,) = (way for way in hops(artifact).values() if len(way) > 1)
    assert stem == [(0, 1), (1, 2), (2, 3)]
    for stage in (1, 2):
        text = (artifact / "stages" / f"stage_{stage}.py").read_text()
        assert "# stem: passed on to the next stage as received\n" in text
        assert "stem" in text.partition("def forward")[2].partition("# stem")[0]
    result = verify(artifact)
    assert result.ok
    assert result.bitwise == result.compared > 0


TRAINED = [
    ("unet", 3, every, "always"),
    ("unet", 4, every_other, "never"),
    ("seq2seq", 5, every, "never"),
    ("seq2seq", 5, every, "always"),  # an LSTM computed again: without gradients it is another
    ("echo", 4, every, "never"),
    ("echo", 4, every, "always"),
]


@pytest.fixture
def jobs(tmp_path: Path, compiled_with: Compile) -> list[Job]:
    (tmp_path / "echo.py").write_text(ECHO)
    found = []
    for name, depth, choice, recompute in TRAINED:
        path = (tmp_path if name == "echo" else ROOT / "examples") / f"{name}.py"
        artifact = compiled_with(choice, path, depth, recompute=recompute)
        found.append(Job(artifact=artifact, steps=4, microbatches=depth + 1))
    return found


def test_training_equals_the_reference_bitwise(tmp_path: Path, jobs: list[Job]) -> None:
    """As threads of one process, and as processes that send their messages over gloo."""
    listed = [
        {
            "artifact": str(job.artifact),
            "steps": job.steps,
            "schedule": "2bw",
            "microbatches": job.microbatches,
            "out": str(job.artifact),
        }
        for job in jobs
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(listed))
    script = Path(__file__).parent / "many_runs.py"
    ranks = max(read_plan(job.artifact).ranks for job in jobs)
    done = torchrun(ranks, str(script), str(tmp_path / "jobs.json"))
    assert done.returncode == 0, done.stderr
    for case, job in zip(TRAINED, jobs, strict=True):
        trained = train_in_threads(job)
        assert differing(job, trained) == [], case
        assert json.loads((job.artifact / "losses.json").read_text()) == trained.losses, case
        for rank, state in enumerate(trained.states):
            sent = load_file(job.artifact / f"{rank}.safetensors")
            assert sent.keys() == state.keys()
            assert all(torch.equal(sent[name], state[name]) for name in state), case


def test_the_solver_itself_relays_past_a_thin_wire(tmp_path: Path) -> None:
    """From the description of a cluster to trained weights, with nothing replaced."""
    cluster = tmp_path / "chain.toml"
    wires = [("GPU0", "GPU1", "50GB/s"), ("GPU1", "GPU2", "50GB/s"), ("GPU0", "GPU2", "10MB/s")]
    cluster.write_text(
        'device = "v100-16"\ncount = 3\n'
        + "".join(f'[[wires]]\na = "{a}"\nb = "{b}"\nbandwidth = "{w}"\n' for a, b, w in wires)
    )
    made = driver.compile_model(
        ROOT / "examples" / "unet.py",
        factory="tiny",
        cluster=str(cluster),
        gpus=3,
        depth=3,
        microbatch=2,
        out=tmp_path / "unet",
    )
    ways = hops(made.artifact).values()
    assert [(0, 1), (1, 2)] in ways
    assert all(b == a + 1 for way in ways for a, b in way)
    result = verify(made.artifact)
    assert result.ok
    assert result.bitwise == result.compared
    job = Job(artifact=made.artifact, steps=3, microbatches=3)
    assert differing(job, train_in_threads(job)) == []


def test_verify_notices_a_stage_that_changes_what_it_passes_on(compiled_with: Compile) -> None:
    artifact = compiled_with(every, ROOT / "examples" / "unet.py", 3)
    stage = artifact / "stages" / "stage_1.py"
    text = stage.read_text()
    stage.write_text(text.replace("return down_0, ", "return down_0 * 1.001, "))
    assert stage.read_text() != text
    result = verify(artifact)
    assert not result.ok
    assert not result.loss_bitwise


def test_flush_and_two_replicas_train_the_same(compiled_with: Compile) -> None:
    path = ROOT / "examples" / "unet.py"
    for schedule, width in (("flush", 1), ("2bw", 2)):
        artifact = compiled_with(every, path, 3, gpus=3 * width, width=width, schedule=schedule)
        job = Job(artifact=artifact, steps=3, schedule=schedule, microbatches=3)
        assert differing(job, train_in_threads(job)) == []


def test_a_stage_that_relays_reads_well(
    compiled_with: Compile, golden: Callable[[str, str], None]
) -> None:
    artifact = compiled_with(every, ROOT / "examples" / "unet.py", 3)
    golden("relay/stage_1.py", (artifact / "stages" / "stage_1.py").read_text())


@pytest.mark.parametrize("name", ["unet", "hf_t5"])
def test_what_a_relaying_stage_keeps_is_counted(name: str, tmp_path: Path) -> None:
    """Against autograd itself: what it saves, and the leaves that wait for a gradient."""
    (architecture,) = (example for example in CORPUS if example.name == name)
    file, program = annotated(architecture)
    real = RealRun(file, program)
    values, _, _ = real([node.name for node in program.compute_nodes])
    stage_of_block = {b.name: 4 * i // len(program.blocks) for i, b in enumerate(program.blocks)}
    every_tensor = [node.name for node in program.compute_nodes]
    passed_on = unread = 0
    stages = split(program, stage_of_block, every_tensor)
    (tmp_path / "stages").mkdir()
    for file_name, text in emit_stages(program, stages).items():
        (tmp_path / file_name).write_text(text)

    pipe = Pipeline(schedule="flush", depth=4, microbatches=4, batches=1, channels=())

    def stash(graph: StageGraph, recompute: bool) -> int:
        options = {"pipe": pipe, "tied": (), "on_gpu": False}
        held = footprint(program, graph, tmp_path, file, recompute=recompute, **options)
        return held.stash.bytes

    for graph in stages:
        received = {t.tensor: values[t.tensor].detach().clone() for t in graph.receives}
        for t in graph.receives:
            received[t.tensor].requires_grad_(t.gradient)
        leaves = [tensor for tensor in received.values() if tensor.requires_grad]
        _, kept, _ = real(graph.nodes, received, leaves)
        assert stash(graph, recompute=False) == kept
        given = (*received.values(), *(values[name] for name in graph.inputs))
        assert stash(graph, recompute=True) == sum(tensor.nbytes for tensor in given)
        read = {a.name for node in graph.nodes for a in program.node(node).all_input_nodes}
        passed_on += len(graph.passed_on)
        unread += len(set(graph.passed_on) - read)
    assert unread or (name == "hf_t5" and passed_on)


def test_a_plan_whose_relay_loses_the_gradient_is_refused(compiled_with: Compile) -> None:
    artifact = compiled_with(every, ROOT / "examples" / "unet.py", 3)
    plan = json.loads((artifact / "plan.json").read_text())
    first, second, _ = plan["stages"]
    name = next(t["tensor"] for t in second["sends"] if t["tensor"] in second["arguments"])
    for transfer in (*first["sends"], *second["receives"]):
        if transfer["tensor"] == name:
            transfer["gradient"] = False
    (artifact / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputFileError, match=rf"stages\.1 passes {name} on, but with another"):
        read_plan(artifact)
