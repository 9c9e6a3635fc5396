"""The command line as a user meets it: real processes, exit codes, one clear message, no file."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2bw.compiler.driver import compile_model

EXAMPLES = Path(__file__).parent.parent / "examples"

GOOD = """
import torch
from torch import nn

def model(width=8):
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4))

def inputs(batch_size):
    return (torch.randn(batch_size, 8),)

def targets(batch_size):
    return (torch.randint(0, 4, (batch_size,)),)

def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)
"""


def p2bw(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-m", "p2bw", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


BAD = {
    "no such file": (None, (), 2, "no such file"),
    "a syntax error": ("def model(:\n    pass\n", (), 3, "model.py:1"),
    "an exception": ("import torch\nboom = 1 / 0\n", (), 3, "model.py:2"),
    "no model": (GOOD.replace("def model", "def build"), (), 3, "build"),
    "wrong inputs": (GOOD.replace("(batch_size, 8)", "(batch_size, 7)"), (), 3, "input: f32[1, 7]"),
    "control flow on data": (
        GOOD.replace("nn.Sequential(", "Choosy(")
        + "\nclass Choosy(nn.Sequential):\n"
        + "    def forward(self, x):\n"
        + "        x = super().forward(x)\n"
        + "        if x.sum() > 0:\n"
        + "            return -x\n"
        + "        return x\n",
        (),
        3,
        "model.py:20",
    ),
    "no GPU": (GOOD, ("--gpus", "0"), 2, "--gpus 0"),
    "memory that is no number": (GOOD, ("--memory", "nan"), 2, "nan"),
    "a device nobody knows": (GOOD, ("--device", "abacus"), 2, "abacus"),
    "a setting the factory has not": (GOOD, ("--set", "depth=3"), 3, "depth"),
    "no device is large enough": (
        GOOD.replace("width=8", "width=8, large=40000").replace(
            "nn.ReLU()", "nn.Linear(8, large), nn.Linear(large, large), nn.Linear(large, 8)"
        ),
        ("--gpus", "4", "--device", "v100-16", "--microbatch", "1"),
        4,
        "GiB",
    ),
    "fewer microbatches than stages": (
        GOOD,
        ("--gpus", "2", "--depth", "2", "--microbatches", "1"),
        2,
        "microbatches",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_its_exit_code_and_no_file(case: str, tmp_path: Path) -> None:
    text, options, code, needle = BAD[case]
    if text is not None:
        (tmp_path / "model.py").write_text(text)
    before = {p.name for p in tmp_path.iterdir()}
    done = p2bw("compile", "model.py", *options, "--quiet", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert needle in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize(
    "arguments",
    [("compile",), ("compile", "model.py", "--gpus", "many"), ("fly",), ("run", "build/x")],
)
def test_usage_errors_exit_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert p2bw(*arguments, cwd=tmp_path).returncode == 2


def test_compile_show_and_verify_speak_json_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    options = ("--gpus", "2", "--depth", "2", "--microbatch", "3", "--dump-passes", "d", "--json")
    done = p2bw("compile", "model.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert compiled["depth"] == 2
    assert compiled["artifact"] == "build/model"
    assert {"load", "trace", "passes", "solve", "emit"} <= compiled["seconds"].keys()
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "00_trace.txt",
        "01_annotate_autograd.txt",
        "02_annotate_cost.txt",
        "03_annotate_time.txt",
        "04_group_blocks.txt",
    ]
    artifact = tmp_path / "build" / "model"
    assert {p.name for p in artifact.iterdir()} == {"plan.json", "problem.json", "stages", "source"}
    assert sorted(p.name for p in (artifact / "stages").iterdir()) == ["stage_0.py", "stage_1.py"]

    shown = json.loads(p2bw("show", "build/model", "--json", cwd=tmp_path).stdout)
    assert shown == json.loads((artifact / "plan.json").read_text())
    assert shown.items() <= compiled.items()

    code = p2bw("show", "build/model", "--stage", "1", cwd=tmp_path).stdout
    assert code == (artifact / "stages" / "stage_1.py").read_text()

    verified = json.loads(p2bw("verify", "build/model", "--json", cwd=tmp_path).stdout)
    assert verified["ok"] is True
    assert verified["loss_bitwise"] is True
    assert verified["gradients"] == {"compared": 4, "bitwise": 4, "max_rel": 0.0}

    table = p2bw("show", "build/model", cwd=tmp_path).stdout
    assert "proven optimal" in table


def test_a_failed_compile_leaves_the_old_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    assert p2bw("compile", "model.py", "--gpus", "1", "--quiet", cwd=tmp_path).returncode == 0
    plan = (tmp_path / "build" / "model" / "plan.json").read_bytes()
    (tmp_path / "model.py").write_text("import torch\n1 / 0\n")
    assert p2bw("compile", "model.py", "--gpus", "1", "--quiet", cwd=tmp_path).returncode == 3
    assert (tmp_path / "build" / "model" / "plan.json").read_bytes() == plan


def test_an_edited_stage_is_what_verify_runs(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    assert p2bw("compile", "model.py", "--gpus", "1", "--quiet", cwd=tmp_path).returncode == 0
    stage = tmp_path / "build" / "model" / "stages" / "stage_0.py"
    text = stage.read_text()
    assert "return " in text
    head, _, tail = text.rpartition("return ")
    stage.write_text(f"{head}return 2 * {tail}")
    done = p2bw("verify", "build/model", cwd=tmp_path)
    assert done.returncode == 7
    assert "the loss is" in done.stdout


def test_options_come_from_p2bw_toml_too(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(GOOD)
    (tmp_path / "p2bw.toml").write_text("[compile]\ngpus = 2\nset = ['width=8']\n")
    done = p2bw("compile", "model.py", "--depth", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["depth"] == 2
    (tmp_path / "p2bw.toml").write_text("[compile]\ngpu = 2\n")
    done = p2bw("compile", "model.py", cwd=tmp_path)
    assert done.returncode == 6
    assert "gpu" in done.stderr


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"schema": 2}', "not json"])
def test_a_damaged_plan_is_an_invalid_file(damage: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(damage)
    for command in ("show", "verify"):
        done = p2bw(command, ".", cwd=tmp_path)
        assert done.returncode == 6, done.stderr
        assert "plan.json" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_artifact_keeps_the_file_that_was_compiled(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(GOOD)

    def edit(message: str) -> None:
        if message.startswith("placing"):
            path.write_text(GOOD + "\n# saved again while it was being compiled\n")

    made = compile_model(
        path, gpus=1, microbatch=2, cluster="p3.16xlarge", out=tmp_path / "out", progress=edit
    )
    copy = (made.artifact / "source" / "model.py").read_bytes()
    assert copy.decode() == GOOD
    assert hashlib.sha256(copy).hexdigest() == made.plan.model.sha256
