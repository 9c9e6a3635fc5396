"""The same artifact, byte for byte: any run, any hash seed, one core or two, idle or loaded."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from corpus import ROOT

import p2bw

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core"
)

# The placements of the first two need CP-SAT; that of the last one does not.
MODELS = {
    "t5": "hf_t5.py:tiny --set layers=6 --cluster p3.16xlarge --gpus 4 --depth 4 --microbatch 2",
    "unet": "unet.py --cluster p3.16xlarge:2 --depth 16 --microbatch 4",
    "gpt": "gpt.py:tiny --cluster p3.16xlarge --gpus 4",
}
COMMAND = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv.pop(1).split(",")))
from p2bw.__main__ import main
main()
"""


def made(out: Path, name: str, seed: int, cores: int, python: str = sys.executable) -> dict:
    """The files of an artifact, compiled by a process of its own on so many cores."""
    use = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    model, *options = MODELS[name].split()
    arguments = ["compile", ROOT / "examples" / model, *options, "--out", out, "--quiet"]
    subprocess.run(
        [python, "-c", COMMAND, use, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "PYTHONPATH": str(Path(p2bw.__file__).parents[1]),
        },
        check=True,
        timeout=240,
    )
    files = sorted(file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


@contextmanager
def loaded_cores() -> Iterator[None]:
    """Every core busy with something else."""
    beside = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in os.sched_getaffinity(0)
    ]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def settled_by_cpsat(files: dict) -> bool:
    return "CP-SAT" in json.loads(files["plan.json"])["optimality"]["search_space"]


@pytest.mark.slow
def test_another_hash_seed_one_core_and_load_change_nothing(tmp_path: Path) -> None:
    first = made(tmp_path / "first", "unet", seed=1, cores=2)
    with loaded_cores():
        assert made(tmp_path / "second", "unet", seed=2, cores=1) == first


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MODELS)
def test_ten_runs_write_the_same_artifact(name: str, tmp_path: Path) -> None:
    first = made(tmp_path / "0", name, seed=0, cores=2)
    assert settled_by_cpsat(first) == (name != "gpt")
    for run in range(1, 5):
        assert made(tmp_path / str(run), name, seed=run, cores=1 + run % 2) == first
    with loaded_cores():
        for run in range(5, 10):
            assert made(tmp_path / str(run), name, seed=run, cores=1 + run % 2) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_python_3_12_writes_the_same_plan(name: str, tmp_path: Path) -> None:
    python = os.environ.get("P2BW_PYTHON312")
    if python is None:
        pytest.skip("P2BW_PYTHON312 names no Python 3.12 with the dependencies of p2bw")

    def plan(out: str, python: str) -> bytes:
        files = made(tmp_path / out, name, seed=0, cores=2, python=python)
        return re.sub(rb'"torch_version": "[^"]*"', b"", files["plan.json"])

    assert plan("other", python) == plan("own", sys.executable)
