"""How fast two processes of this machine send tensors to each other: `measure_link`.

Run as a module it is one of the two: python -m p2bw.measure.links RANK FOLDER BACKEND
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

_MESSAGE = 1 << 24  # bytes; as large as activations are
_TIMEOUT_S = 60


def measure_link(device: torch.device) -> tuple[float, float, str] | None:
    """Bytes/s one way, the latency of a small message, and the backend; None without a peer.

    GPUs talk over NCCL, of which there must be two; on the CPU processes talk over gloo.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return None
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="p2bw-link-") as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "p2bw.measure.links", str(rank), folder, backend],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        try:
            said = [rank.communicate(timeout=2 * _TIMEOUT_S)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            return None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        return None
    bandwidth, latency_s = json.loads(said[0])
    return bandwidth, latency_s, backend


def main() -> None:
    rank, folder, backend = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
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
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    small = _one_way_s(torch.zeros(8, dtype=torch.uint8, device=device), 50)
    large = _one_way_s(torch.zeros(_MESSAGE, dtype=torch.uint8, device=device), 9)
    if rank == 0:
        print(json.dumps([_MESSAGE / max(large - small, 1e-9), small]))
    dist.destroy_process_group()


def _one_way_s(message: torch.Tensor, times: int) -> float:
    """Half of there and back, the median."""
    found = []
    for _ in range(2 + times):
        start_s = time.perf_counter()
        for sender in range(2):
            if dist.get_rank() == sender:
                dist.send(message, 1 - sender)
            else:
                dist.recv(message, sender)
        if message.is_cuda:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start_s) / 2)
    return median(found[2:])


if __name__ == "__main__":
    main()
