"""The links of one machine from what `nvidia-smi topo -m` prints."""

import re
from collections.abc import Callable
from itertools import combinations

from p2bw.compiler.devices import Device
from p2bw.compiler.graphs import named_wires
from p2bw.compiler.topology import Topology

# Bytes/s one way of one NVLink by generation; the most links that a GPU of any has is 18 (H100).
_NVLINK = {"p100": 20e9}
_NVLINK_OF_OTHERS = 25e9
MAX_NVLINKS = 18
# What a x16 slot moves in practice, one way: about 12 of PCIe 3.0's 15.75 GB/s, and so on.
_PCIE = {"a100": 24e9, "a10g": 24e9, "l4": 24e9, "rtx4090": 24e9, "h100": 48e9, "h200": 48e9}
_PCIE_OF_OTHERS = 12e9
_SOCKETS = 16e9  # between two sockets: QPI or UPI

# How nvidia-smi says that two devices meet: in one PCIe switch, over several, in a socket's host
# bridge, in a NUMA node, or across sockets.
_NEAR = ("PIX", "PXB")
_SAME_SOCKET = (*_NEAR, "PHB", "NODE")
_KNOWN = re.compile(r"X|NV\d+|PIX|PXB|PHB|NODE|SYS|SOC")

# DGX-1 with V100s, and p3.16xlarge: a hybrid cube mesh of NVLinks.
# https://docs.nvidia.com/dgx/dgx1-user-guide/ ; NCCL topology in github.com/NVIDIA/nccl/issues/671
CUBE_MESH = """
     GPU0 GPU1 GPU2 GPU3 GPU4 GPU5 GPU6 GPU7 CPU Affinity
GPU0 X    NV1  NV1  NV2  NV2  SYS  SYS  SYS  0-19,40-59
GPU1 NV1  X    NV2  NV1  SYS  NV2  SYS  SYS  0-19,40-59
GPU2 NV1  NV2  X    NV2  SYS  SYS  NV1  SYS  0-19,40-59
GPU3 NV2  NV1  NV2  X    SYS  SYS  SYS  NV1  0-19,40-59
GPU4 NV2  SYS  SYS  SYS  X    NV1  NV1  NV2  20-39,60-79
GPU5 SYS  NV2  SYS  SYS  NV1  X    NV2  NV1  20-39,60-79
GPU6 SYS  SYS  NV1  SYS  NV1  NV2  X    NV2  20-39,60-79
GPU7 SYS  SYS  SYS  NV1  NV2  NV1  NV2  X    20-39,60-79
"""


def read_nvidia_smi(text: str, name: str, device: Device) -> Topology:
    """The links of a machine from what `nvidia-smi topo -m` prints; ValueError says what is wrong.

    NVLinks between two GPUs are a wire; where a GPU's row counts more than any GPU has, they lead
    to an NVSwitch. Besides, every GPU has a PCIe slot, at a switch, at a socket: GPUs that meet at
    one, or that list the same CPUs, share it.
    """
    matrix, affinity = _matrix(text)
    gpus = len(matrix)
    link = _by_name(_NVLINK, device, _NVLINK_OF_OTHERS)
    pcie = _by_name(_PCIE, device, _PCIE_OF_OTHERS)
    counts = [[_nvlinks(entry) for entry in row] for row in matrix]
    wires: list[tuple[str, str, float]] = []
    if gpus > 1 and sum(counts[0]) > MAX_NVLINKS:
        wires += [(f"GPU{rank}", "NVSwitch", max(counts[rank]) * link) for rank in range(gpus)]
    else:
        for a, b in combinations(range(gpus), 2):
            if counts[a][b]:
                wires.append((f"GPU{a}", f"GPU{b}", counts[a][b] * link))
    switch = _joined(matrix, lambda a, b: matrix[a][b] in _NEAR)
    socket = _joined(
        matrix, lambda a, b: matrix[a][b] in _SAME_SOCKET or affinity[a] == affinity[b]
    )
    wires += [(f"GPU{rank}", f"PCIe{switch[rank]}", pcie) for rank in range(gpus)]
    wires += [(f"PCIe{own}", f"socket{socket[own]}", pcie) for own in sorted(set(switch))]
    wires += [(f"socket{own}", "sockets", _SOCKETS) for own in sorted(set(socket)) if any(socket)]
    return named_wires(name, device, gpus, wires)


def _by_name(table: dict[str, float], device: Device, otherwise: float) -> float:
    return next((rate for name, rate in table.items() if device.name.startswith(name)), otherwise)


def _nvlinks(entry: str) -> int:
    return int(entry[2:]) if entry.startswith("NV") else 0


def _matrix(text: str) -> tuple[list[list[str]], list[str]]:
    """The rows and columns of the GPUs, network cards left out, and the CPUs near each GPU."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.split() for line in plain.splitlines()]
    header = next((line for line in lines if line and line[0] == "GPU0" and "X" not in line), None)
    if header is None:
        raise ValueError("no line of column names that starts with GPU0: not `nvidia-smi topo -m`?")
    gpus = sum(re.fullmatch(r"GPU\d+", word) is not None for word in header)
    columns = header.index("CPU") if "CPU" in header else len(header)
    rows = {line[0]: line[1:] for line in lines if line and line is not header}
    matrix, affinity = [], []
    for rank in range(gpus):
        row = rows.get(f"GPU{rank}", [])
        if len(row) < gpus:
            raise ValueError(f"no whole row of GPU{rank}")
        wrong = [entry for entry in row[:gpus] if not _KNOWN.fullmatch(entry)]
        if wrong:
            raise ValueError(f"row of GPU{rank}: {wrong[0]!r} is no kind of link")
        matrix.append(row[:gpus])
        affinity.append(row[columns] if len(row) > columns else f"unknown {rank}")
    return matrix, affinity


def _joined(matrix: list[list[str]], together: Callable[[int, int], bool]) -> list[int]:
    """The first GPU of each GPU's group, if some pairs belong together."""
    group = list(range(len(matrix)))
    for a, b in combinations(group.copy(), 2):
        if together(a, b):
            old, new = max(group[a], group[b]), min(group[a], group[b])
            group = [new if own == old else own for own in group]
    return group
