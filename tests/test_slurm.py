"""The Slurm batch script: its text, and a run of it where stand-ins play Slurm's commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from handmade import write_artifact
from processes import wait_until

from p2bw.contract.errors import UsageError
from p2bw.launch import run
from p2bw.slurm import node_size

SRUN = """\
#!{python}
import os, subprocess, sys
command = sys.argv[2:]
nodes = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(i)}}) for i in (0, 1)]
open({folder!r} + "/step", "w").write(" ".join(str(node.pid) for node in nodes))
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCANCEL = """\
#!{python}
import os, signal, sys
assert sys.argv[1:] == ["--signal=USR1", "7"], sys.argv
def signal_all(pid):
    os.kill(pid, signal.SIGUSR1)
    for child in open(f"/proc/{{pid}}/task/{{pid}}/children").read().split():
        signal_all(int(child))
for pid in open({folder!r} + "/step").read().split():
    signal_all(int(pid))
"""
SCONTROL = """\
#!{python}
import sys
if sys.argv[1:] == ["show", "hostnames", "two nodes"]:
    print("127.0.0.1\\nelsewhere")
elif sys.argv[1:] == ["requeue", "7"]:
    open({folder!r} + "/requeued", "w")
else:
    sys.exit(f"unknown: {{sys.argv}}")
"""


def on_two_nodes(artifact: Path) -> Path:
    plan = json.loads((artifact / "plan.json").read_text())
    plan["topology"] = {"levels": [{"name": "node", "size": 1}, {"name": "network", "size": 2}]}
    (artifact / "plan.json").write_text(json.dumps(plan))
    return artifact


def test_the_script_is_one(tmp_path: Path) -> None:
    artifact = on_two_nodes(write_artifact(tmp_path / "an artifact", depth=2))
    script = tmp_path / "job.sh"
    assert run(artifact, steps=7, slurm=script, checkpoint_every=3, max_restarts=2) == {
        "script": str(script)
    }
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --gpus-per-node=1\n" in text
    assert f"--checkpoint '{artifact}/checkpoints' \\\n" in text
    assert "--resume last &\n" in text
    assert "--max-restarts=2 " in text
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(script)], check=True)


def test_weights_cannot_be_saved_from_here(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    with pytest.raises(UsageError, match="p2bw export"):
        run(artifact, steps=1, slurm=tmp_path / "job.sh", save=tmp_path / "out")


@pytest.mark.parametrize(
    ("levels", "size"),
    [
        ([], None),
        ([("node", 8)], 8),
        ([("node", 8), ("network", 4)], 8),
        ([("pair", 2), ("node", 4), ("rack", 3), ("network", 2)], 8),
        ([("island", 4), ("network", 2)], 4),
    ],
)
def test_a_node_is_as_large_as_the_topology_says(
    levels: list[tuple[str, int]], size: int | None
) -> None:
    given = [{"name": name, "size": count} for name, count in levels]
    assert node_size({"topology": {"levels": given}}) == size


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_time_is_up_goes_on_when_it_is_requeued(tmp_path: Path) -> None:
    artifact = on_two_nodes(write_artifact(tmp_path / "a", depth=2))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (commands / name).write_text(text.format(python=sys.executable, folder=str(tmp_path)))
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "two nodes",
    }
    script, metrics = tmp_path / "job.sh", artifact / "metrics.jsonl"

    def submit(steps: int) -> subprocess.Popen[str]:
        run(artifact, steps=steps, slurm=script, device="cpu", max_restarts=1)
        return subprocess.Popen(
            ["bash", str(script)], env=environment, stderr=subprocess.PIPE, text=True
        )

    with submit(steps=1_000_000) as job:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, 150)
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=150)[1]
    assert job.returncode != 0
    assert (tmp_path / "requeued").exists(), said
    assert said.count("stopped by SIGUSR1 after step") == 1
    (saved,) = (artifact / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    with submit(steps=step + 2) as job:
        said = job.communicate(timeout=150)[1]
    assert job.returncode == 0, said
    assert f"going on from {saved}, after step {step}" in said
    assert len(metrics.read_text().splitlines()) == step + 2
