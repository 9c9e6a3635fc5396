"""How fast two processes of this machine send tensors to each other: `measure_link`.

Run as a module it is one of the two.
"""

import json
import sys
import time
from statistics import median

import torch
import torch.distributed as dist

from p2bw.contract.plan import TensorSpec
from p2bw.contract.schedule import Channel, Flow
from p2bw.measure.pair import ask_two_processes, meeting
from p2bw.runtime.transport import DistributedTransport

_MESSAGE = 1 << 24  # bytes; as large as activations are


def measure_link(device: torch.device) -> tuple[float, float, str] | None:
    """Bytes/s one way, the latency of a small message, and the backend; None without a peer.

    Of the runtime's own transport: over NCCL between two GPUs, through shared memory (gloo, where
    there is none) between two processes on the CPU.
    """
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return None
    backend = "nccl" if device.type == "cuda" else "gloo"
    said = ask_two_processes("p2bw.measure.links", (), backend)
    if said is None:
        return None
    bandwidth, latency_s = json.loads(said[0])
    return bandwidth, latency_s, backend


def main() -> None:
    with meeting(sys.argv[1:]) as (rank, device, _):
        small, large = (_one_way_s(device, size, times) for size, times in ((8, 50), (_MESSAGE, 9)))
        if rank == 0:
            print(json.dumps([_MESSAGE / max(large - small, 1e-9), small]))


def _one_way_s(device: torch.device, size: int, times: int) -> float:
    """Half of what a message of some bytes takes there and back, the median."""
    rank, message = dist.get_rank(), torch.zeros(size, dtype=torch.uint8, device=device)
    there = Channel(Flow.ACTIVATION, 0, 1, "x")
    back = Channel(Flow.GRADIENT, 1, 0, "x")
    spec = TensorSpec("x", (size,), torch.uint8)
    specs = {there: spec, back: spec}
    transport = DistributedTransport((there, back), specs, {0: 0, 1: 1}, rank, device, ((0,), (1,)))
    found = []
    for _ in range(2 + times):
        start_s = time.perf_counter()
        for channel in (there, back):
            if channel.source == rank:
                transport.send(channel, message)
            else:
                transport.receive(channel)()
        if message.is_cuda:
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start_s) / 2)
    transport.finish()
    return median(found[2:])


if __name__ == "__main__":
    main()
