"""A search that is stopped keeps what it has: the limit, and Ctrl-C to real processes."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from test_placement import chain, topology

from p2bw.compiler.placement import Limits, solve
from p2bw.compiler.placement.additive import solve_loads
from p2bw.compiler.placement.loads import LoadProblem, Node, Transfer
from p2bw.compiler.placement.stop import Interrupted, Stop
from p2bw.compiler.problem import BlockCost, PlacementProblem, TensorCost, read_problem
from p2bw.contract.errors import TimeLimitError

# Fifteen branches of different widths: too many cuts to list, so CP-SAT has to settle it.
WIDE = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(256, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(),
                          nn.Linear(n, 256))
            for n in [1500 + 700 * (7 * i % 15) for i in range(15)]
        )

    def forward(self, x):
        return torch.stack([branch(x) for branch in self.branches]).sum(0).mean()

def model():
    return Wide()

def inputs(batch_size):
    return (torch.randn(batch_size, 256),)
"""


@pytest.fixture
def hard(tmp_path):
    """A random graph of 60 blocks, which CP-SAT works on for a minute."""
    pick = random.Random(1)
    names = [f"b{i}" for i in range(60)]
    tensors = []
    for i in range(59):
        count = min(59 - i, pick.choice([1, 1, 2, 2, 3]))
        tensors.append(
            TensorCost(
                name=f"t{i}",
                producer=names[i],
                consumers=tuple(names[r] for r in sorted(pick.sample(range(i + 1, 60), count))),
                bytes=pick.randrange(200000),
                gradient_bytes=pick.randrange(200000),
                saved=True,
            )
        )
    problem = PlacementProblem(
        microbatch=1,
        blocks=tuple(
            BlockCost(name=name, forward_s=pick.random() / 100, backward_s=pick.random() / 50)
            for name in names
        ),
        tensors=tuple(tensors),
        topology=topology(8, memory=10**9, links=(3e7, 3e7)),
    )
    path = tmp_path / "hard.json"
    path.write_text(problem.to_json())
    return path


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "p2bw", *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore Ctrl-C, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(process, word):
    """Read the process's stderr up to a line with a word."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return
    pytest.fail(f"no {word!r} in {lines}")


def test_ctrl_c_keeps_the_best_plan_and_its_gap(hard, tmp_path):
    process = start("solve", hard, "--stages", 8, "--json", cwd=tmp_path)
    wait_for(process, "CP-SAT")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    out, err = process.communicate(timeout=240)
    assert time.monotonic() - begin < 20
    assert process.returncode == 0, err
    assert "the best plan so far is kept" in err
    found = json.loads(out)
    assert found["status"] == "feasible"
    assert 0 < found["gap"] < 0.2
    assert len(set(found["assignment"].values())) == 8


def test_ctrl_c_during_compile_writes_the_best_plan(tmp_path):
    (tmp_path / "wide.py").write_text(WIDE)
    options = ("--gpus", 6, "--depth", 6, "--microbatch", 4, "--device", "v100-16", "--json")
    process = start("compile", "wide.py", *options, cwd=tmp_path)
    wait_for(process, "CP-SAT")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    plan = json.loads(out)
    assert plan["optimality"]["status"] == "feasible"
    assert plan["optimality"]["search_space"].endswith("stopped by Ctrl-C")
    assert plan["optimality"]["gap"] > 0
    assert (tmp_path / "build" / "wide" / "plan.json").exists()


def test_ctrl_c_before_the_search_ends_at_once(tmp_path):
    (tmp_path / "wide.py").write_text(WIDE)
    process = start("compile", "wide.py", cwd=tmp_path)
    wait_for(process, "tracing")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not (tmp_path / "build").exists()


def test_a_second_ctrl_c_aborts():
    """A search that does not come to its end by itself, and the command line around it."""
    script = (
        "import time\n"
        "from p2bw.app import reporting\n"
        "from p2bw.progress import stopping\n"
        "with reporting(False), stopping(None, lambda text: print(text, flush=True)):\n"
        "    print('searching', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "searching\n"
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again aborts" in process.stdout.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "interrupted" in err


def test_the_limit_keeps_the_best_plan_and_is_named(hard, tmp_path):
    process = start("solve", hard, "--stages", 8, "--limit", 2, cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "stopped by the limit of 2 s" in out.replace("\n", " ")
    assert "gap" in err


def test_the_limit_without_a_plan_exits_5_and_claims_nothing(hard, tmp_path):
    process = start("solve", hard, "--limit", 1e-9, cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (5, "")
    assert "none ruled out" in err
    (tmp_path / "wide.py").write_text(WIDE)
    process = start("compile", "wide.py", "--microbatch", 1, "--limit", 1e-9, cwd=tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 5, err
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf"])
def test_a_limit_that_is_none(limit, hard, tmp_path):
    process = start("solve", hard, "--limit", limit, cwd=tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert "give seconds, more than 0" in err


def test_stopped_before_anything_was_found():
    stop = Stop()
    stop.interrupted = True
    with pytest.raises(Interrupted):
        solve({1: chain([1.0, 1.0])}, limits=Limits(stop=stop))
    with pytest.raises(TimeLimitError, match="the limit of 1e-09 s"):
        solve({1: chain([1.0, 1.0])}, limits=Limits(stop=Stop(1e-9)))


def test_what_is_settled_in_time_does_not_say_that_it_was_stopped():
    stop = Stop()

    def interrupt(progress):
        stop.interrupted = True

    found = solve({1: chain([1.0, 1.0])}, depths=(2,), limits=Limits(stop=stop), progress=interrupt)
    assert found.status == "optimal"
    assert "stopped" not in found.search_space


def test_what_is_left_open_keeps_its_bound():
    stop = Stop()

    def interrupt(progress):
        stop.interrupted = progress.samples_per_s is not None

    problem = chain([1.0, 2.0, 3.0, 4.0, 5.0], bytes=4000, gpus=4)
    free = solve({1: problem}, widths=(1,))
    found = solve({1: problem}, widths=(1,), limits=Limits(stop=stop), progress=interrupt)
    assert found.bound >= free.samples_per_s
    assert found.samples_per_s <= free.samples_per_s
    assert (found.status == "optimal") == ("stopped" not in found.search_space)


def test_a_start_is_kept_unless_something_is_better(hard):
    problem = read_problem(hard)
    quick = solve({1: problem}, depths=(8,), limits=Limits(deterministic_s=0.0))
    good = solve({1: problem}, depths=(8,), limits=Limits(deterministic_s=1.2))
    assert good.samples_per_s > quick.samples_per_s
    again = solve({1: problem}, depths=(8,), limits=Limits(deterministic_s=0.0), start=good)
    assert again.samples_per_s == good.samples_per_s
    assert again.stage_of_block == good.stage_of_block
    worse = solve({1: chain([1.0, 1.0, 4.0], gpus=2)}, depths=(2,), widths=(1,))
    other = chain([1.0, 4.0, 1.0], gpus=2)
    assert solve({1: other}, depths=(2,), widths=(1,), start=worse).samples_per_s == 1 / 15
    full = other.model_copy(update={"topology": topology(2, 23)})
    assert solve({1: full}, depths=(2,), widths=(1,), start=worse).status == "optimal"


def test_the_limit_counts_only_the_search():
    stop = Stop(0.2)
    with stop:
        assert not stop()
    time.sleep(0.3)
    assert not stop()
    with stop:
        assert not stop()
        time.sleep(0.3)
        assert stop()
    assert stop()


def test_a_row_of_devices_keeps_what_it_has_too():
    pick = random.Random(2)
    nodes = tuple(Node(name=f"n{i}", time=pick.random()) for i in range(16))
    order = tuple((i, i + pick.randint(1, 5)) for i in range(11))
    problem = LoadProblem(
        nodes=nodes,
        transfers=tuple(Transfer(ends, pick.random() / 10) for ends in order),
        order=order,
        devices=4,
        unit="s",
    )
    best = solve_loads(problem, 4)
    stop = Stop()
    stop.interrupted = True
    found = solve_loads(problem, 4, stop=stop)
    assert found.settled_by.endswith("stopped by Ctrl-C")
    assert found.bound <= best.objective <= found.objective
