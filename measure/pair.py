"""Two processes of this machine that talk to each other, as two ranks do."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT_S = 60


def ask_two_processes(module: str, arguments: Sequence[str], backend: str) -> list[str] | None:
    """What each prints that runs a module with its rank, a folder, the backend and `arguments`.

    None if one of them fails: then there is nobody to talk to.
    """
    with tempfile.TemporaryDirectory(prefix="p2bw-pair-") as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(rank), folder, backend, *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=2 * TIMEOUT_S)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            return None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    return None if any(rank.returncode for rank in ranks) else said


@contextmanager
def meeting(arguments: Sequence[str]) -> Iterator[tuple[int, torch.device, Sequence[str]]]:
    """In such a process: its rank, its device, and the arguments; both leave together."""
    rank, folder, backend = int(arguments[0]), Path(arguments[1]), arguments[2]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    yield rank, device, arguments[3:]
    dist.barrier()
    dist.destroy_process_group()
