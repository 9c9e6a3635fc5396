"""p2bw explain: every statement on problems that can be worked out by hand."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from corpus import ROOT
from test_placement import chain, topology, weighty

from p2bw.compiler.driver import compile_model
from p2bw.compiler.explanation import explain_file
from p2bw.compiler.placement import solve
from p2bw.compiler.placement.changes import with_memory
from p2bw.compiler.placement.explain import explain, place
from p2bw.compiler.placement.feasible import Request
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.problem import TensorCost, Times
from p2bw.compiler.rules import parse_rules
from p2bw.compiler.topology import Others, Wire
from p2bw.contract.errors import InputFileError, MismatchError, UsageError

MODEL = """
import torch
from torch import nn

def model():
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

def inputs(batch_size):
    return (torch.randn(batch_size, 64),)

def targets(batch_size):
    return (torch.randn(batch_size, 64),)

def loss(outputs, wanted):
    return nn.functional.mse_loss(outputs, wanted)
"""


def explained(problem, depth=None, width=None, limits=None):
    request = Request((problem,), depth and (depth,), width and (width,), "auto", {})
    limits = limits or Limits()
    return explain(request, place(request, Limits()), limits)


def p2bw(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "p2bw", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_busiest_stage_binds_and_the_other_has_slack():
    # Stages of 3 + 6 and 9 + 6 seconds.
    found = explained(chain([1.0, 2.0, 3.0, 2.0]), 2, 1)
    assert [(limit.kind, limit.stages) for limit in found.binding] == [("compute", (1,))]
    assert "15.0 s" in found.binding[0].why
    assert [(s.compute_s, s.slack_s) for s in found.stages] == [(9.0, 6.0), (15.0, 0.0)]
    # Stage 0 keeps 10 bytes of each of two blocks for two microbatches, and sends 1 byte and
    # receives its gradient; stage 1 keeps 20 and the input for one, and has the same buffers.
    assert [(s.memory, s.free) for s in found.stages] == [(42, 10**6 - 42), (23, 10**6 - 23)]
    assert found.samples_per_s == pytest.approx(1 / 15)
    assert found.gap == 0


def test_only_blocks_next_to_a_cut_move_and_their_price_is_exact():
    found = explained(chain([1.0, 2.0, 3.0, 2.0]), 2, 1)
    moves = {(m.blocks, m.source, m.target): m for m in found.moves}
    assert set(moves) == {("b1", 0, 1), ("b2", 1, 0)}
    assert moves["b1", 0, 1].period_s == 21.0
    assert moves["b1", 0, 1].change == pytest.approx(0.4)
    assert moves["b1", 0, 1].memory == (2 * 10 + 2, 3 * 10 + 1 + 2)
    assert moves["b2", 1, 0].period_s == 18.0
    assert moves["b2", 1, 0].problems == ()


def test_a_block_with_readers_in_its_stage_does_not_go_on():
    skip = TensorCost(
        name="s", producer="b0", consumers=("b2",), bytes=1, gradient_bytes=1, saved=False
    )
    base = chain([1.0, 1.0, 1.0, 1.0])
    found = explained(base.model_copy(update={"tensors": (*base.tensors, skip)}), 2, 1)
    assert {(m.blocks, m.source, m.target) for m in found.moves} == {("b1", 0, 1), ("b2", 1, 0)}


def test_a_move_that_is_not_possible_says_why():
    found = explained(chain([1.0, 1.0]), 2, 1)
    assert [move.problems for move in found.moves] == [
        ("stage 0 has no blocks",),
        ("stage 1 has no blocks",),
    ]


def heavy_start():
    """b0 and b1 hold 200 bytes each and do not fit one device of 300."""
    return weighty([40, 40, 1, 1], memory=300)


def test_memory_binds_where_the_plan_would_be_faster_without_its_limit():
    found = explained(heavy_start(), 2, 1)
    assert found.period_s == 9.0  # b0 alone, though two and two would take 6 seconds
    memory = [limit for limit in found.binding if limit.kind == "memory"]
    assert [limit.stages for limit in memory] == [(0,)]
    assert memory[0].what == "memory of stage 0"
    assert "50.0 % more" in memory[0].why
    move = next(m for m in found.moves if m.blocks == "b1")
    # Weights twice, gradients and optimizer state of both, the stash, the buffers; stage 0 would
    # recompute, as that is nearer to fitting.
    assert move.memory == (2 * 5 + 2 * 10 + 1 + 2, 2 * 200 + 2 * 10 + 2)
    assert move.problems == ("stage 0 needs 422 of 300",)
    assert move.period_s == 8.0
    gains = {gain.what: gain for gain in found.gains}
    more = gains["1 GiB more memory on each toy"]
    assert more.status == "optimal"
    assert (more.samples_per_s, more.gain) == pytest.approx((1 / 6, 1 / 6 - 1 / 9))


def test_a_stage_that_fits_neither_way_is_told_of_the_way_that_needs_less():
    # Stage 0 has to recompute its three blocks, stage 1 has not; neither can take a fourth.
    found = explained(chain([1.0] * 6, memory=34), 2, 1)
    assert [(s.recompute, s.memory) for s in found.stages] == [(True, 32), (False, 33)]
    problems = {move.target: move.problems for move in found.moves}
    assert problems == {1: ("stage 1 needs 43 of 34",), 0: ("stage 0 needs 42 of 34",)}


def test_the_table_of_many_limits_has_100_columns(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(weighty([40, 40, 1, 1] * 6, memory=300, gpus=12).to_json())
    done = p2bw("explain", path, "--depth", 12, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memory of stages" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_memory_does_not_bind_where_it_only_holds_what_is_slower():
    found = explained(chain([1.0, 2.0, 3.0, 2.0]), 2, 1)
    assert all(limit.kind != "memory" for limit in found.binding)


def test_a_link_binds_and_more_bandwidth_is_worth_it():
    # 10 000 bytes at 1 000 per second each way; the blocks take 3 seconds each.
    found = explained(chain([1.0, 1.0], bytes=10_000), 2, 1)
    assert [limit.what for limit in found.binding] == [f"link {link.name}" for link in found.links]
    assert {link.seconds for link in found.links} == {10.0}
    assert [stage.slack_s for stage in found.stages] == [7.0, 7.0]
    gains = {gain.what: gain.gain for gain in found.gains}
    assert gains == pytest.approx(
        {
            "1 GiB more memory on each toy": 0.0,
            "1 GB/s more than 1e-06 on each port of level node": 1 / 3 - 1 / 10,
            "1 toy more": 0.0,
        }
    )


def test_one_more_device_takes_one_more_replica():
    found = explained(chain([1.0, 1.0, 1.0]))  # two replicas of one stage of 9 seconds
    assert (found.depth, found.width) == (1, 2)
    gain = next(gain for gain in found.gains if gain.what == "1 toy more")
    assert (gain.samples_per_s, gain.gain) == pytest.approx((3 / 9, 1 / 9))


def test_every_gain_is_that_of_solving_the_changed_problem():
    problem = weighty([40, 40, 1, 1, 20], memory=400, gpus=3, bytes=20)
    found = explained(problem)
    larger = with_memory(problem.topology, problem.topology.device, 300 + 2**30)
    again = solve({1: problem.model_copy(update={"topology": larger})})
    assert found.gains[0].samples_per_s == again.samples_per_s
    assert again.samples_per_s > found.samples_per_s


def test_devices_that_differ_are_explained_too():
    small = replace(topology(1, 120).device, name="tiny")
    times = {"tiny": Times(forward_s=2.0, backward_s=4.0)}
    problem = chain([1.0] * 4, gpus=3)
    problem = problem.model_copy(
        update={
            "blocks": tuple(b.model_copy(update={"on": times}) for b in problem.blocks),
            "topology": replace(problem.topology, more=(Others(device=small, gpus=1),)),
        }
    )
    found = explained(problem, 2, 1)
    assert {stage.limit for stage in found.stages} == {10**6}  # the slow one is left out
    assert [gain.what for gain in found.gains] == [
        "1 GiB more memory on each toy",
        "1 GiB more memory on each tiny",
        "1 GB/s more than 1e-06 on each port of level node",
        "1 toy more",
    ]
    assert all(gain.gain >= 0 for gain in found.gains)


def test_links_that_are_wires_are_widened_by_their_speed():
    wires = tuple(
        Wire(a=a, b=b, bandwidth=1e3 * (a + 1)) for a, b in itertools.combinations(range(3), 2)
    )
    problem = chain([1.0, 1.0, 1.0], bytes=50_000)
    devices = replace(topology(3), levels=(), wires=wires)
    found = explained(problem.model_copy(update={"topology": devices}), 3, 1)
    assert [gain.what for gain in found.gains[1:]] == [
        "1 GB/s more on each link of 2e-06 GB/s",
        "1 GB/s more on each link of 1e-06 GB/s",
    ]
    assert "link GPU" in found.binding[0].what


def test_another_shape_that_is_better_is_named_and_compared_with():
    request = Request((chain([1.0, 1.0]),), None, None, "auto", {})
    straight = place(replace(request, depths=(2,), widths=(1,)), Limits())
    slow = replace(straight, stage_of_block={"b0": 0, "b1": 1}, gap=0.5)
    base = chain([1.0, 3.0])
    found = explain(replace(request, problems=(base,)), slow, Limits())
    assert found.samples_per_s == pytest.approx(1 / 9)
    assert found.best_shape == (1, 2)
    assert found.best_samples_per_s == pytest.approx(2 / 12)


def test_who_stops_gets_what_needs_no_solving():
    stop = Stop()
    stop.interrupted = True
    found = explained(heavy_start(), 2, 1, Limits(stop=stop))
    assert found.stopped == "Ctrl-C"
    assert found.gains == ()
    assert found.binding[0].kind == "compute"
    assert len(found.moves) == 2


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    (folder / "model.py").write_text(MODEL)
    options = {"gpus": 2, "depth": 2, "microbatch": 2, "cluster": "p3.16xlarge"}
    made = compile_model(folder / "model.py", out=folder / "out", **options)
    again = compile_model(folder / "model.py", out=folder / "again", **options)
    for name in ("plan.json", "problem.json"):
        assert (made.artifact / name).read_bytes() == (again.artifact / name).read_bytes()
    return made


def test_an_artifact_is_explained_without_torch(artifact):
    script = (
        "import sys; from pathlib import Path; from p2bw.compiler.explanation import explain_file;"
        "found = explain_file(Path(sys.argv[1])); assert 'torch' not in sys.modules;"
        "print(found.samples_per_s)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, artifact.artifact], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == artifact.plan.samples_per_s


def test_cuts_made_by_hand_are_compared_with_the_best(tmp_path):
    made = compile_model(
        ROOT / "examples" / "gpt.py",
        factory="tiny",
        device="cpu",
        gpus=2,
        microbatch=2,
        rules=parse_rules(cut_after=["h.0.ln_1"]),
        out=tmp_path / "gpt",
    )
    free = compile_model(
        ROOT / "examples" / "gpt.py",
        factory="tiny",
        device="cpu",
        gpus=2,
        depth=2,
        microbatch=2,
        gap="0",
        out=tmp_path / "free",
    )
    found = explain_file(made.artifact)
    assert found.constraints == ("cut-after h.0.ln_1",)
    assert found.samples_per_s == pytest.approx(made.plan.samples_per_s)
    assert found.best_samples_per_s == pytest.approx(free.plan.samples_per_s)
    assert found.best_samples_per_s > 1.2 * found.samples_per_s
    assert found.best_shape == (2, 1)
    assert free.plan.stages[0].blocks[-1].partition("#")[0] in found.best_cuts[0]
    assert [limit.what for limit in found.binding] == ["compute of stage 1"]
    assert min(move.change for move in found.moves) < 0
    printed = p2bw("explain", str(made.artifact), cwd=tmp_path).stdout
    assert "cut by hand" in printed
    assert "by hand     cut-after h.0.ln_1: the best 2 stages do" in printed
    again = explain_file(free.artifact)
    assert not again.constraints


def test_the_command_prints_a_table_of_100_columns_or_json(artifact, tmp_path):
    done = p2bw("explain", artifact.artifact, "--depth", 2, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["feasible"] is True
    assert found["samples_per_s"] == artifact.plan.samples_per_s
    assert {"binding", "stages", "links", "moves", "gains"} <= found.keys()
    assert [stage["limit"] for stage in found["stages"]] == [16 * 2**30] * 2
    table = p2bw("explain", artifact.artifact, cwd=tmp_path)
    assert "binds       " in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 100
    assert p2bw("explain", artifact.artifact, "--quiet", cwd=tmp_path).stdout == ""


def test_a_problem_that_has_no_plan_exits_4_and_names_what_helps(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(weighty([40] * 6, memory=500).to_json())
    done = p2bw("explain", path, "--json", cwd=tmp_path)
    assert done.returncode == 4
    assert "--memory 633B" in done.stderr
    found = json.loads(done.stdout)
    assert found["feasible"] is False
    assert {"kind": "devices", "text": "--gpus 3", "amount": 3, "smallest": True} in found["cures"]


def test_compile_names_what_helps_and_writes_nothing(tmp_path):
    (tmp_path / "model.py").write_text(MODEL.replace("64", "8000"))
    options = ("--gpus", 2, "--device", "v100-16", "--memory", "2500MiB", "--microbatch", 4)
    done = p2bw("compile", "model.py", *options, cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert not (tmp_path / "build").exists()
    text = next(line for line in done.stderr.splitlines() if "--memory" in line)
    cured = [*options[:-3], text.split()[1], *options[-2:]]
    assert p2bw("compile", "model.py", *cured, "--quiet", cwd=tmp_path).returncode == 0


def test_a_plan_that_is_none_of_its_problem_is_refused(artifact, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "plan.json").write_bytes((artifact.artifact / "plan.json").read_bytes())
    with pytest.raises(InputFileError, match=r"no problem\.json; compile the model again"):
        explain_file(folder)
    (folder / "problem.json").write_text(chain([1.0, 1.0]).to_json())
    with pytest.raises(MismatchError, match="same blocks"):
        explain_file(folder)
    problem = json.loads((artifact.artifact / "problem.json").read_text())
    problem["topology"]["device"]["memory_bytes"] = 520 * 2**20
    (folder / "problem.json").write_text(json.dumps(problem))
    with pytest.raises(MismatchError, match="none of its problem"):
        explain_file(folder)


def test_what_cannot_be_asked_for(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(chain([1.0, 1.0]).to_json())
    with pytest.raises(UsageError, match="--depth 0"):
        explain_file(path, depth=0)
    with pytest.raises(UsageError, match="--recompute often"):
        explain_file(path, recompute="often")
    graph = tmp_path / "graph.txt"
    graph.write_text(
        "node1 -- a -- forward_compute_time=1.0, backward_compute_time=2.0, "
        "activation_size=1.0, parameter_size=1.0\n"
    )
    with pytest.raises(UsageError, match="no PlacementProblem"):
        explain_file(graph)
