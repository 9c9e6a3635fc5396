"""compile under every schedule: what a stage holds is what the schedule's proof finds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from corpus import ROOT
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler import schedule as schedule_module
from p2bw.compiler.devices import DEVICES
from p2bw.compiler.driver import Compiled, compile_model
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.problem import PROBLEM, read_problem
from p2bw.compiler.rules import parse_rules
from p2bw.compiler.schedule import check_schedule
from p2bw.compiler.simulation.simulate import simulate
from p2bw.contract.errors import InfeasibleError, UsageError
from p2bw.contract.plan import read_plan

SCHEDULES = ("2bw", "flush", "gpipe", "stash")
DEPTH, M = 3, 4
CUTS = ("hidden.0", "hidden.2")


def compile_example(out: Path, example: str = "mlp", **options: object) -> Compiled:
    given = {"gpus": DEPTH, "depth": DEPTH, "width": 1, "microbatch": 2, "device": "cpu"}
    return compile_model(
        ROOT / "examples" / f"{example}.py", factory="tiny", out=out, **{**given, **options}
    )


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    """Cut alike: where pipelines drain, other cuts are the best."""
    folder, cuts = tmp_path_factory.mktemp("schedules"), parse_rules(cut_after=CUTS)
    return {
        name: compile_example(folder / name, schedule=name, microbatches=M, rules=cuts)
        for name in SCHEDULES
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_plan_holds_what_its_schedule_needs(name: str, plans: dict[str, Compiled]) -> None:
    plan, one = plans[name].plan, plans["flush"].plan
    of_flush = [4, 3, 1]  # with the early one
    in_flight = {"gpipe": [M] * DEPTH, "stash": [3, 2, 1]}.get(name, of_flush)
    versions = {"2bw": [2] * DEPTH, "stash": [2, 2, 1]}.get(name, [1] * DEPTH)
    assert [s.blocks for s in plan.stages] == [s.blocks for s in one.stages]
    for stage, flush, flying, alive in zip(
        plan.stages, one.stages, in_flight, versions, strict=True
    ):
        assert stage.memory.weights == alive * flush.memory.weights
        assert stage.memory.gradients == flush.memory.gradients
        kept = flush.memory.stash // of_flush[flush.index]
        assert stage.memory.stash == flying * kept
    batches_s = []
    for k, seconds in enumerate(stage.compute_s for stage in plan.stages):
        work_s, update_s = seconds.forward + seconds.backward, M * seconds.update
        if name in ("2bw", "stash"):
            batches_s.append(M * work_s + update_s)
        else:  # the stages before hide some of the time in which a later one updates
            slots = M + DEPTH - 1
            batches_s.append(max(slots * work_s, (slots - k) * work_s + update_s))
    assert plan.period_s == pytest.approx(max(batches_s) / M)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_of_a_plan_is_shown(
    name: str, plans: dict[str, Compiled], golden: Callable[[str, str], None]
) -> None:
    artifact = str(plans[name].artifact)
    shown = CliRunner().invoke(app, ["show", artifact, "--schedule"])
    assert shown.exit_code == 0
    golden(f"schedules/{name}.txt", shown.stdout)
    data = json.loads(CliRunner().invoke(app, ["show", artifact, "--schedule", "--json"]).stdout)
    assert data["schedule"] == name
    assert [
        f"{k}: {' '.join(row)}" for k, row in enumerate(data["stages"])
    ] == shown.stdout.splitlines()


@pytest.mark.parametrize("name", ["2bw", "flush"])
def test_a_microbatch_is_taken_on_early_where_there_is_memory_and_time(
    name: str, tmp_path: Path, plans: dict[str, Compiled]
) -> None:
    roomy = plans[name].plan
    assert roomy.extra_in_flight == 1
    first = roomy.stages[0].memory
    own, share = first.total - first.reserve, DEVICES["cpu"].lost_fraction
    just = round((own + DEVICES["cpu"].context_bytes) / (1 - share))
    for memory, extra in ((just + 10, 1), (just - 10, 0)):
        out = tmp_path / str(extra)
        cuts = parse_rules(cut_after=CUTS)
        plan = compile_example(
            out, schedule=name, microbatches=M, memory=f"{memory}B", rules=cuts
        ).plan
        assert plan.extra_in_flight == extra
        assert [s.blocks for s in plan.stages] == [s.blocks for s in roomy.stages]
        assert max(stage.memory.total for stage in plan.stages) <= memory


def test_a_microbatch_can_be_taken_on_early(tmp_path: Path, plans: dict[str, Compiled]) -> None:
    # Of m = d, a version is made just in time, or late if other ranks have to add their part; a
    # batch that drains has no more.
    for number, (options, extra) in enumerate(
        [({}, 1), ({"clip_norm": 1.0}, 0), ({"schedule": "flush"}, 0)]
    ):
        plan = compile_example(tmp_path / str(number), microbatches=DEPTH, **options).plan
        assert plan.extra_in_flight == extra
    assert all(plans[name].plan.extra_in_flight == 0 for name in ("gpipe", "stash"))


@pytest.mark.parametrize(
    ("bandwidth", "extra", "waited_for"),
    [("1GB/s", 1, False), ("200MB/s", 1, True), ("100MB/s", 0, True)],
)
def test_no_microbatch_is_early_if_the_sum_over_replicas_would_be_later_than_it_is_worth(
    bandwidth: str, extra: int, waited_for: bool, tmp_path: Path
) -> None:
    cluster = tmp_path / "slow.toml"
    cluster.write_text(
        f'device = "cpu"\ncount = 4\n[[levels]]\nname = "node"\nsize = 4\n'
        f'bandwidth = "{bandwidth}"\n'
    )
    plan = compile_example(
        tmp_path / "out", gpus=4, depth=2, width=2, microbatches=6, cluster=str(cluster)
    ).plan
    assert plan.extra_in_flight == extra
    none, one = (
        simulate(plan.model_copy(update={"extra_in_flight": extra})).period_s for extra in (0, 1)
    )
    assert (one < none) == bool(extra)
    assert (one > 1.01 * plan.period_s) == waited_for


def test_compile_proves_the_schedule(
    plans: dict[str, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that held one microbatch more than the memory was planned for is noticed."""
    compiled = plans["2bw"]
    instance = make_instance(read_problem(compiled.artifact / PROBLEM))
    check_schedule(compiled.plan, instance)
    proof = schedule_module.check

    def one_more(*given: object) -> object:
        found = proof(*given)
        return replace(found, stash=(found.stash[0] + 1, *found.stash[1:]))

    monkeypatch.setattr(schedule_module, "check", one_more)
    with pytest.raises(AssertionError, match="stage 0: 5 microbatches in flight, planned 4"):
        check_schedule(compiled.plan, instance)


def test_a_second_set_of_gradients_is_planned_for(tmp_path: Path) -> None:
    plain = compile_example(tmp_path / "plain").plan
    clipped = compile_example(tmp_path / "clipped", clip_norm=1.5)
    flush = compile_example(tmp_path / "flush", clip_norm=1.5, schedule="flush").plan
    wide = compile_example(tmp_path / "wide", gpus=6, width=2).plan
    sizes = [s.memory.gradients for s in plain.stages]
    assert [s.memory.gradients for s in clipped.plan.stages] == [2 * size for size in sizes]
    assert [s.memory.gradients for s in flush.stages] == sizes
    assert [s.memory.gradients for s in wide.stages] == [2 * size for size in sizes]
    assert clipped.plan.clip_norm == read_plan(clipped.artifact).clip_norm == 1.5
    assert read_problem(clipped.artifact / PROBLEM).clip_norm == 1.5
    assert plain.clip_norm is None
    assert read_plan(tmp_path / "plain").clip_norm is None


MIXED = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(8, 16, bias=False), nn.Linear(16, 16, bias=False).bfloat16(),
            nn.Linear(16, 4, bias=False),
        )
        self[0].weight.requires_grad_(False)

    def forward(self, x):
        return self[2](self[1](self[0](x).bfloat16()).float())

def model():
    return Net()

def inputs(batch_size):
    return (torch.randn(batch_size, 8),)

def targets(batch_size):
    return (torch.randint(4, (batch_size,)),)

def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)
"""


def test_masters_and_frozen_weights_are_counted_as_they_are_held(tmp_path: Path) -> None:
    """AdamW keeps 8 bytes for each element; of 16 bits, also the master's 4."""
    (tmp_path / "mixed.py").write_text(MIXED)
    plan = compile_model(
        tmp_path / "mixed.py", gpus=1, depth=1, microbatch=1, device="cpu", out=tmp_path / "out"
    ).plan
    memory = plan.stages[0].memory
    frozen, half, full = 8 * 16, 16 * 16, 16 * 4
    assert memory.weights == 4 * frozen + 2 * (2 * half + 4 * full)
    assert memory.gradients == 2 * half + 4 * full
    assert memory.optimizer == (8 + 4) * half + 8 * full


def test_under_stash_shared_parameters_stay_in_one_stage(tmp_path: Path) -> None:
    """examples/gpt.py ties its first embedding to its head: all between is one stage."""
    with pytest.raises(InfeasibleError, match=r"blocks that use wte.weight are one; under 2bw"):
        compile_example(tmp_path / "gpt", "gpt", schedule="stash", gpus=8, depth=8)
    plan = compile_example(tmp_path / "gpt", "gpt", schedule="stash", depth=None, width=None).plan
    assert (plan.depth, plan.width) == (1, DEPTH)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    def refused(match: str, **options: object) -> None:
        with pytest.raises(UsageError, match=match):
            compile_example(tmp_path / "a", **options)

    refused("the schedules are 2bw, flush, gpipe, stash", schedule="zb")
    refused(
        "under stash .* no norm .* use --schedule 2bw or flush", schedule="stash", clip_norm=1.0
    )
    refused("--clip-norm 0: give a number above 0", clip_norm=0.0)
    refused("--clip-norm nan: give a number above 0", clip_norm=float("nan"))
    refused("use 3 microbatches or more, 2 stages or fewer, or the schedule flush", microbatches=2)
    assert compile_example(tmp_path / "b", microbatches=2, schedule="flush").plan.depth == DEPTH
