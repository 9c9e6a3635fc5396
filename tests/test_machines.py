"""Runs over two machines: network namespaces with their own addresses, joined by a cable."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from handmade import write_artifact
from processes import alive, children, saved_states, wait_until
from test_runtime import differences

from p2bw.contract.job import Job
from p2bw.runtime.local import Trained

pytestmark = pytest.mark.usefixtures("one_thread")

Torchrun = subprocess.Popen[str]
ADDRESSES = ("10.77.83.1", "10.77.83.2")


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach each other, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` command to make network namespaces with")
    first, second = (f"p2bw-{os.getpid()}-{side}" for side in "ab")
    try:
        for name in (first, second):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        try:
            cable = ["link", "add", "wire", "netns", first, "type", "veth"]
            ip(*cable, "peer", "name", "wire", "netns", second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a veth pair cannot be made here: {error.stderr.strip()}")
        for name, address in zip((first, second), ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield first, second
    finally:
        for name in (first, second):
            ip("netns", "del", name, check=False)


@contextmanager
def torchrun(machines: Sequence[str], backend: str, *arguments: str) -> Iterator[list[Torchrun]]:
    """One torchrun on each machine, with one rank each."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    runs = []
    for number, name in enumerate(machines):
        if backend == "static":
            meet = ["--node-rank", str(number), "--master-addr", ADDRESSES[0]]
        else:  # the machines' common host name leads nowhere, here
            meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400"]
            meet += ["--rdzv-conf", f"is_host={number == 0}", "--local-addr", ADDRESSES[number]]
        within = ["ip", "netns", "exec", name]
        runs.append(
            subprocess.Popen(
                [*within, *line, *meet, "-m", "p2bw.runtime", *arguments],
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.communicate()


@pytest.mark.parametrize("backend", ["c10d", pytest.param("static", marks=pytest.mark.slow)])
def test_two_machines_train_as_one_process(
    tmp_path: Path, machines: tuple[str, str], backend: str
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    saved, result = tmp_path / "saved", tmp_path / "result.json"
    flags = [str(artifact), "--steps", "12", "--checkpoint", str(saved), "--result", str(result)]
    with torchrun(machines, backend, *flags) as runs:
        said = [run.communicate(timeout=240)[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], said
    losses = json.loads(result.read_text())["losses"]
    trained = Trained(losses=losses, states=saved_states(saved / "step-00000012", 2))
    assert differences(Job(artifact=artifact, steps=12), trained) == {}


@pytest.mark.slow
def test_a_cut_cable_ends_the_run_on_both_machines(
    tmp_path: Path, machines: tuple[str, str]
) -> None:
    """Nobody closes a connection then: only the missing sign of life tells."""
    artifact = write_artifact(tmp_path / "a", depth=2)
    metrics = tmp_path / "metrics.jsonl"
    flags = [str(artifact), "--steps", "1000000", "--quiet", "--metrics", str(metrics)]
    with torchrun(machines, "c10d", *flags) as runs:
        wait_until(lambda: metrics.exists() and "loss" in metrics.read_text(), 120)
        ranks = [rank for run in runs for rank in children(run.pid)]
        assert len(ranks) == 2
        ip("-n", machines[0], "link", "set", "wire", "down")
        wait_until(lambda: not any(alive(rank) for rank in ranks), 10)
        for run in runs:  # which would wait for each other
            run.kill()
        said = [run.communicate(timeout=60)[1] for run in runs]
    assert re.search(r"p2bw: rank 0: .*rank 1.* is gone", said[0]), said
    assert re.search(r"p2bw: rank 1: the launcher at 10.77.83.1:\d+ does not answer", said[1])
