"""Topologies as graphs of wires: machines that differ, and wires with names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from p2bw.compiler.devices import Device
from p2bw.compiler.topology import Others, Topology, Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: its devices, the port of each, and the machine's own port, in bytes/s."""

    device: Device
    gpus: int
    link: float
    network: float


def star(name: str, nodes: Sequence[Node]) -> Topology:
    """Machines that may differ: their devices meet in a switch each, and these in the network."""
    gpus = sum(node.gpus for node in nodes)
    wires, rank = [], 0
    for i, node in enumerate(nodes):
        switch = gpus + i
        for _ in range(node.gpus):
            wires.append(Wire(a=rank, b=switch, bandwidth=node.link, latency_s=5e-6))
            rank += 1
        if len(nodes) > 1:
            network = gpus + len(nodes)
            wires.append(Wire(a=switch, b=network, bandwidth=node.network, latency_s=2e-5))
    switches = [f"node{i}" for i in range(len(nodes))] + ["network"] * (len(nodes) > 1)
    return _of_devices(
        name, [node.device for node in nodes for _ in range(node.gpus)], wires, switches
    )


def named_wires(
    name: str, device: Device, gpus: int, entries: Iterable[tuple[str, str, float]]
) -> Topology:
    """A graph whose wires join names: "GPU3" is a device, any other name a switch."""
    names = [f"GPU{rank}" for rank in range(gpus)]
    wires = []
    for *ends, bandwidth in entries:
        for end in map(str, ends):
            if end not in names:
                if re.fullmatch(r"GPU\d+", end):
                    raise ValueError(f"{end}: there are only {gpus} devices, GPU0 to GPU{gpus - 1}")
                names.append(end)
        a, b = (names.index(str(end)) for end in ends)
        wires.append(Wire(a=a, b=b, bandwidth=float(bandwidth)))
    return _of_devices(name, [device] * gpus, wires, names[gpus:])


def _of_devices(
    name: str, devices: Sequence[Device], wires: Iterable[Wire], switches: Iterable[str]
) -> Topology:
    runs: list[Others] = []
    for device in devices:
        if runs and runs[-1].device == device:
            runs[-1] = replace(runs[-1], gpus=runs[-1].gpus + 1)
        else:
            runs.append(Others(device=device, gpus=1))
    return Topology(
        name=name,
        device=runs[0].device,
        gpus=len(devices),
        more=tuple(runs[1:]),
        wires=tuple(wires),
        switches=tuple(switches),
    )
