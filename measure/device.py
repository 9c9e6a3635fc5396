"""What the device at hand sustains: arithmetic, memory, launches."""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch

from p2bw.compiler.devices import GIB
from p2bw.compiler.measured import DeviceProfile, Matmul
from p2bw.contract.errors import UsageError

_RUNS = 5
_MATMULS = {  # dtypes, and rows of square matrices
    "cpu": ((torch.float32, torch.bfloat16), (256, 512, 1024)),
    "cuda": ((torch.float32, torch.bfloat16, torch.float16), (1024, 4096, 8192)),
}
_COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}  # much more than caches hold


def choose_device(asked: str | None) -> torch.device:
    """--device cpu or cuda; the first GPU where there is one."""
    if asked not in (None, "cpu", "cuda"):
        raise UsageError(f"--device {asked}: give cpu or cuda, whichever is here")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def device_name(device: torch.device) -> str:
    """As the driver calls a GPU, and Linux the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """Of a GPU; of a process on the CPU its share, one process for each core."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(GIB, total // cores())


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def free_bytes(device: torch.device) -> int:
    """What could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kib) * 1024


def measure_device(device: torch.device, threads: int, processes: int) -> DeviceProfile:
    """Everything but the link: that takes two processes."""
    return DeviceProfile(
        name=device_name(device),
        type="cuda" if device.type == "cuda" else "cpu",
        memory_bytes=memory_bytes(device),
        threads=threads,
        processes=processes,
        torch_version=torch.__version__,
        matmuls=tuple(_matmuls(device)),
        bandwidth=_bandwidth(device),
        op_overhead_s=_overhead(device),
    )


def _matmuls(device: torch.device) -> Iterator[Matmul]:
    dtypes, sizes = _MATMULS[device.type]
    for dtype in dtypes:
        for size in sizes:
            a = torch.ones(size, size, dtype=dtype, device=device)
            out = torch.empty_like(a)
            taken_s = seconds(partial(torch.mm, a, a, out=out), device)
            yield Matmul(
                dtype=str(dtype).removeprefix("torch."),
                size=size,
                flops_per_s=2 * size**3 / taken_s,
            )


def _bandwidth(device: torch.device) -> float:
    count = _COPY_BYTES[device.type]
    a = torch.ones(count, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * count / seconds(lambda: b.copy_(a), device)


def _overhead(device: torch.device) -> float:
    a, times = torch.ones(8, device=device), 200

    def launch() -> None:
        for _ in range(times):
            a.add_(1.0)

    return seconds(launch, device) / times


def seconds(call: Callable[[], object], device: torch.device, runs: int = _RUNS) -> float:
    """The median of several runs, after one that warms up."""
    found, now = [], clock(device)
    for _ in range(1 + runs):
        synchronize(device)
        start_s = now()
        call()
        synchronize(device)
        found.append(now() - start_s)
    return max(median(found[1:]), 1e-9)


def clock(device: torch.device) -> Callable[[], float]:
    """What to measure with. A single thread on the CPU has a clock of its own, which stands still
    while another process has its core: a rank will have a core to itself."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads meanwhile, as each rank will."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
