"""rehearse: the stages run as the real runtime runs them, alone, and the figures are consistent."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from corpus import ROOT
from test_cli import p2bw

from p2bw.compiler.devices import find_device
from p2bw.compiler.driver import compile_model
from p2bw.compiler.plan import read_plan
from p2bw.compiler.simulation.job import StageTimes, planned_times
from p2bw.compiler.simulation.simulate import simulate
from p2bw.contract.errors import UsageError
from p2bw.contract.job import Job
from p2bw.contract.schedule import Kind
from p2bw.measure import rehearsal
from p2bw.measure.alone import Spans, stage_times, train_alone
from p2bw.measure.rehearsal import Pair, rehearse
from p2bw.runtime.prepare import prepare

EXAMPLES = ROOT / "examples"
CPU = torch.device("cpu")


def artifact(folder: Path, name: str = "gpt", **options) -> Path:
    given = {"gpus": 2, "depth": 2, "microbatch": 2, "device": "cpu", **options}
    compile_model(EXAMPLES / f"{name}.py", factory="tiny", out=folder / name, **given)
    return folder / name


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> Path:
    return artifact(tmp_path_factory.mktemp("gpt"))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", {"gpus": 4, "width": 2, "clip_norm": 1.0}),  # tied embeddings, replicas
        slow("gpt", {"schedule": "gpipe", "clip_norm": 1.0, "recompute": "always"}),
        slow("resnet", {"microbatches": 4}),  # buffers
        slow("unet", {"gpus": 3, "depth": 3}),  # tensors that skip stages
        slow("hf_bert", {}),  # masks
    ],
)
def test_every_stage_does_all_of_its_schedule(tmp_path, name, options):
    if name.startswith("hf_"):
        pytest.importorskip("transformers")
    folder = artifact(tmp_path, name, **options)
    prepared = prepare(Job(artifact=folder, steps=3, init="modules"))
    m = prepared.pipeline.microbatches
    for stage in range(prepared.plan.depth):
        spans = Spans()
        train_alone(prepared, stage, CPU, spans)
        assert sorted(spans.seconds[Kind.FORWARD]) == list(range(3 * m))
        assert sorted(spans.seconds[Kind.BACKWARD]) == list(range(3 * m))
        assert sorted(spans.seconds[Kind.UPDATE]) == [0, 1, 2]


def test_the_figures_are_the_plans_and_the_simulation_is_of_the_measured_times(gpt, monkeypatch):
    plan = read_plan(gpt)
    made_up = [StageTimes(0.03, 0.05, 0.02), StageTimes(0.04, 0.08, 0.01)]

    def measured(prepared, plan, stage, device):
        return made_up[stage], 1000 + stage

    monkeypatch.setattr(rehearsal, "_rehearsed", measured)
    found = rehearse(gpt)
    m = plan.microbatches_per_update
    for k, stage in enumerate(found.stages):
        assert stage.stage == k
        planned = planned_times(plan, plan.stages[k])
        assert stage.forward_s == Pair(planned.forward_s, made_up[k].forward_s)
        assert stage.backward_s == Pair(planned.backward_s, made_up[k].backward_s)
        total = made_up[k].forward_s + made_up[k].backward_s + made_up[k].update_s / m
        assert stage.compute_s.measured == pytest.approx(total)
        memory = plan.stages[k].memory
        assert stage.peak_bytes == Pair(memory.total - memory.reserve, 1000 + k)
    assert found.period_s.measured == simulate(plan, times=made_up).period_s
    assert found.period_s.predicted == simulate(plan).period_s
    only = rehearse(gpt, stages=[1])
    assert [stage.stage for stage in only.stages] == [1]
    mixed = [planned_times(plan, plan.stages[0]), made_up[1]]
    assert only.period_s.measured == simulate(plan, times=mixed).period_s


def test_times_are_means_of_a_batch_and_medians_of_batches():
    spans = Spans()
    # Batch 0 warms up; then the first backward of each batch takes less.
    spans.seconds[Kind.FORWARD] = {0: 9.0, 1: 9.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 9.0, 7: 9.0}
    spans.seconds[Kind.BACKWARD] = {0: 9.0, 1: 9.0, 2: 1.0, 3: 3.0, 4: 1.0, 5: 3.0}
    spans.seconds[Kind.UPDATE] = {0: 9.0, 1: 0.5, 2: 0.5}
    spans.seconds[Kind.MERGE] = {0: 9.0, 1: 0.25, 2: 0.25}
    times = stage_times(spans, 2, warm_up=1)
    assert times == StageTimes(forward_s=2.0, backward_s=2.0, update_s=0.75, norm_s=0.0)
    spans.seconds[Kind.NORM] = {0: 9.0, 1: 0.125, 2: 0.125}
    assert stage_times(spans, 2, warm_up=1) == replace(times, norm_s=0.125)


def test_the_norm_is_simulated_once_and_as_it_was_measured(gpt, tmp_path, monkeypatch):
    """It takes place beside the update, and neither in it nor twice."""
    folder = tmp_path / "clipped"
    shutil.copytree(gpt, folder)
    plan = read_plan(gpt).model_copy(update={"clip_norm": 1.0})
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    spans = Spans()
    m = plan.microbatches_per_update
    spans.seconds[Kind.FORWARD] = dict.fromkeys(range(3 * m), 0.01)
    spans.seconds[Kind.BACKWARD] = dict.fromkeys(range(3 * m), 0.02)
    spans.seconds[Kind.UPDATE] = dict.fromkeys(range(3), 0.004)
    spans.seconds[Kind.NORM] = dict.fromkeys(range(3), 0.002)
    times = stage_times(spans, m, warm_up=2)
    monkeypatch.setattr(rehearsal, "_rehearsed", lambda *_: (times, 1000))
    found = rehearse(folder)
    assert found.period_s.measured == pytest.approx(0.03 + 0.006 / m, rel=3e-3)
    for k, stage in enumerate(found.stages):
        assert (stage.update_s.measured, stage.norm_s.measured) == (0.004, 0.002)
        assert stage.compute_s.measured == pytest.approx(0.03 + 0.006 / m)
        one_set = plan.stages[k].memory.gradients // 2
        bandwidth = find_device("cpu").sustained_bandwidth
        assert stage.norm_s.predicted == pytest.approx(one_set / bandwidth, rel=1e-6)


def test_the_peak_holds_what_the_stage_must_have(gpt):
    """At least two versions of the weights, and not twice of what the plan has."""
    plan = read_plan(gpt)
    for stage in rehearse(gpt, microbatches=2).stages:
        memory = plan.stages[stage.stage].memory
        least = memory.weights + memory.optimizer
        assert least < stage.peak_bytes.measured < 2 * (memory.total - memory.reserve)


def test_a_stage_is_rehearsed_without_the_others_in_memory(tmp_path):
    """The other stage has a table of 80 GB."""
    source = tmp_path / "large.py"
    source.write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Wide(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.small = nn.Linear(8, 8)\n"
        "        self.table = nn.Embedding(50_000_000, 400)\n"
        "        self.head = nn.Linear(400, 1)\n"
        "    def forward(self, x):\n"
        "        x = self.small(x)\n"
        "        rows = self.table((x.sum(-1) > 0).long())\n"
        "        return (x.mean() + self.head(rows)).mean()\n\n\n"
        "def model():\n    return Wide()\n\n\n"
        "def inputs(batch_size):\n    return (torch.randn(batch_size, 8),)\n",
        encoding="utf-8",
    )
    folder = tmp_path / "out"
    compile_model(
        source, gpus=2, depth=2, microbatch=2, cluster="dgx-a100", memory="1TiB", out=folder
    )
    plan = read_plan(folder)
    small = min(plan.stages, key=lambda stage: stage.parameters)
    assert small.parameters < 1000
    (found,) = rehearse(folder, stages=[small.index], microbatches=2).stages
    assert found.peak_bytes.measured < 1 << 20


def test_what_makes_no_sense_is_refused(gpt):
    with pytest.raises(UsageError, match="has stages 0 to 1"):
        rehearse(gpt, stages=[2])
    with pytest.raises(UsageError, match="from 1 on"):
        rehearse(gpt, microbatches=0)
    with pytest.raises(UsageError, match="--device tpu"):
        rehearse(gpt, device="tpu")


def test_the_command_prints_a_table(gpt):
    done = p2bw("rehearse", "gpt", "--stages", "0,1", "--microbatches", "2", cwd=gpt.parent)
    assert done.returncode == 0, done.stderr
    for word in ("forward", "backward", "update", "memory", "simulated"):
        assert word in done.stdout
    assert "USDT" not in done.stderr


def test_results_are_plain_data(gpt):
    result = rehearse(gpt, stages=[1], microbatches=2).to_json()
    (stage,) = json.loads(json.dumps(result, allow_nan=False))["stages"]
    assert stage["stage"] == 1
    assert stage["compute_s"]["measured"] > 0
    off = stage["peak_bytes"]["predicted"] / stage["peak_bytes"]["measured"] - 1
    assert stage["peak_bytes"]["error"] == pytest.approx(off)
