"""Topology: how many devices of which kind there are, and the links between them."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter

from p2bw.compiler.devices import Device, Positive, find_device, local_device, parse_bytes
from p2bw.contract.errors import UsageError

DEFAULT_CLUSTER = "p3.16xlarge"  # PipeDream-2BW's own servers: 8 x V100-16 each
DEFAULT_GPUS = 8
MAX_GPUS = 4096

Count = Annotated[int, Field(ge=1)]
Vertex = Annotated[int, Field(ge=0)]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of a tree of links: groups of `size` units, each with a port of its own.

    A unit of level 0 is a device; a unit of level i is a whole group of level i-1, whose members
    share its port. A port carries `bandwidth` bytes/s each way at the same time.
    """

    name: str
    size: Count
    bandwidth: Positive
    latency_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A link between two vertices, `bandwidth` bytes/s each way at the same time."""

    a: Vertex
    b: Vertex
    bandwidth: Positive
    latency_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """So many devices of another kind."""

    device: Device
    gpus: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """`gpus` devices and what joins them.

    Ranks 0 .. gpus-1 are `device`s, but for the last ones: those are `more`, in order. What joins
    them is a tree of `levels`, whose groups the ranks fill in order; or else a graph of `wires`
    between vertices: the ranks, and then the `switches`.
    """

    name: str
    device: Device
    gpus: Count
    levels: tuple[Level, ...] = ()
    more: tuple[Others, ...] = ()
    wires: tuple[Wire, ...] = ()
    switches: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[Device, ...]:
        """The device of each rank."""
        others = tuple(device for run in self.more for device in (run.device,) * run.gpus)
        return (self.device,) * (self.gpus - len(others)) + others

    @property
    def kinds(self) -> tuple[Device, ...]:
        """The different devices, in the order of the ranks."""
        found: list[Device] = []
        for device in (self.device, *(run.device for run in self.more)):
            if device not in found:
                found.append(device)
        return tuple(found)

    @property
    def uniform(self) -> bool:
        """All devices are of one kind, in a tree of levels."""
        return not self.wires and len(self.kinds) == 1

    @property
    def tiers(self) -> int:
        """How many levels there are."""
        return len(self.levels)

    @property
    def summary(self) -> str:
        """'8 x v100-16 + 4 x a100-40', for people."""
        count = Counter(device.name for device in self.devices)
        return " + ".join(f"{number} x {name}" for name, number in count.items())

    def vertex(self, number: int) -> str:
        """The name of a vertex of the graph of wires."""
        return f"GPU{number}" if number < self.gpus else self.switches[number - self.gpus]

    def unit(self, rank: int, level: int) -> int:
        """Number of the unit of a level that a rank belongs to."""
        for below in self.levels[:level]:
            rank //= below.size
        return rank

    def to_json(self) -> dict[str, Any]:
        """Plain data for plan.json."""
        data: dict[str, Any] = _TOPOLOGY.dump_python(self, mode="json")
        data["device"] = _common(data["device"])
        data["more"] = [run | {"device": _common(run["device"])} for run in data["more"]]
        return _common(data)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Topology":
        """The inverse of to_json; pydantic's ValidationError for what is no topology."""
        return _TOPOLOGY.validate_python(data)


_TOPOLOGY = TypeAdapter(Topology)
_RARE = ("more", "wires", "switches", "runtime_s")  # left out of plans where empty


def _common(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _RARE or value}


def check_topology(topology: Topology) -> None:
    """ValueError if a topology contradicts itself."""
    gpus, vertices = topology.gpus, topology.gpus + len(topology.switches)
    if sum(run.gpus for run in topology.more) >= gpus:
        raise ValueError("topology.more has as many devices as topology.gpus")
    names = [device.name for device in topology.kinds]
    if len(set(names)) < len(names):
        raise ValueError(f"topology: two different kinds of device of one name in {names}")
    if bool(topology.levels) == bool(topology.wires):
        raise ValueError("topology: give levels or wires")
    if topology.levels and gpus > math.prod(level.size for level in topology.levels):
        raise ValueError(f"topology: {gpus} devices do not fit its levels")
    for i, wire in enumerate(topology.wires):
        if max(wire.a, wire.b) >= vertices or wire.a == wire.b:
            raise ValueError(f"topology.wires[{i}] joins no two of {vertices} vertices")
    if topology.wires:
        from p2bw.compiler.links import Network

        network = Network(topology)
        for rank in range(1, gpus):
            if not network.reaches(0, rank):
                raise ValueError(f"topology: no way from GPU0 to GPU{rank} that only switches pass")


def _node(size: int, gb_s: float) -> Level:
    return Level(name="node", size=size, bandwidth=gb_s * 1e9, latency_s=5e-6)


def _network(gb_s: float) -> Level:
    return Level(name="network", size=MAX_GPUS, bandwidth=gb_s * 1e9, latency_s=2e-5)


# name: device, link inside a node (GB/s one way per GPU), network (GB/s one way per node).
# V100 cube mesh: a pipeline neighbour is one or two NVLinks of 25 GB/s away, so 25 is what every
# pair of neighbours has (NCCL topology in github.com/NVIDIA/nccl/issues/671). NVSwitch: all pairs
# at the full port. Networks: data sheets' Gb/s / 8.
_CLUSTERS: dict[str, tuple[str, Level, Level]] = {
    # 25 Gb/s Ethernet. https://aws.amazon.com/ec2/instance-types/p3/
    "p3.16xlarge": ("v100-16", _node(8, 25), _network(3.125)),
    # 100 Gb/s.
    "p3dn.24xlarge": ("v100-32", _node(8, 25), _network(12.5)),
    # 4 x EDR InfiniBand.
    "dgx-1": ("v100-16", _node(8, 25), _network(50)),
    # NVSwitch, 6 links; 8 x 100 Gb/s. https://github.com/NVIDIA/nccl-tests/issues/78
    "dgx-2": ("v100-32", _node(16, 150), _network(100)),
    # NVSwitch, 12 links; 8 x HDR200. https://github.com/NVIDIA/nccl/issues/1505
    "dgx-a100": ("a100-80", _node(8, 300), _network(200)),
    # NVSwitch, 18 links; 8 x NDR400.
    # https://github.com/stas00/ml-engineering/blob/master/network/README.md
    "dgx-h100": ("h100", _node(8, 450), _network(400)),
    # EFA, 4 x 100 Gb/s. https://aws.amazon.com/ec2/instance-types/p4/
    "p4d": ("a100-40", _node(8, 300), _network(50)),
    "p4de": ("a100-80", _node(8, 300), _network(50)),
    # EFA v2, 32 x 100 Gb/s. https://aws.amazon.com/ec2/instance-types/p5/
    "p5": ("h100", _node(8, 450), _network(400)),
    # 8 x HDR200. https://learn.microsoft.com/azure/virtual-machines/nda100-v4-series
    "nd-a100-v4": ("a100-40", _node(8, 300), _network(200)),
    "ndm-a100-v4": ("a100-80", _node(8, 300), _network(200)),
}
CLUSTERS = tuple(_CLUSTERS)


def make_topology(
    gpus: int | None = None,
    device: str | None = None,
    memory: str | None = None,
    cluster: str | None = None,
) -> Topology:
    """The topology that the command line's options describe.

    With none of them: the local GPUs when there are some, else one p3.16xlarge. A device without a
    cluster stands in nodes of 8 with its own link and a network of a tenth of that per node.
    """
    if gpus is not None and not 1 <= gpus <= MAX_GPUS:
        raise UsageError(f"--gpus {gpus}: give a number from 1 to {MAX_GPUS}")
    if cluster is not None:
        topology = _from_cluster(cluster, gpus, device)
    elif device is not None:
        topology = _of_device(find_device(device), gpus or DEFAULT_GPUS)
    else:
        topology = _local(gpus) or _from_cluster(DEFAULT_CLUSTER, gpus or DEFAULT_GPUS, None)
    if topology.more and (device or memory):
        option = "--device" if device else "--memory"
        raise UsageError(f"{option}: {topology.name} says itself what its devices are")
    kind = find_device(device) if device is not None else topology.device
    if memory is not None:
        kind = kind.with_memory(parse_bytes(memory))
    return replace(topology, device=kind)


def _of_device(device: Device, gpus: int) -> Topology:
    levels = (_node(8, device.link / 1e9), _network(device.link / 1e10))
    return Topology(name=device.name, device=device, gpus=gpus, levels=_fit(levels, gpus))


def _local(gpus: int | None) -> Topology | None:
    device = local_device()
    if device is None:
        return None
    import torch

    # A plan for more GPUs than this machine has is for several machines like it.
    here = torch.cuda.device_count()
    levels = (_node(here, device.link / 1e9), _network(device.link / 1e10))
    count = gpus or here
    return Topology(name="local", device=device, gpus=count, levels=_fit(levels, count))


def _from_cluster(text: str, gpus: int | None, device: str | None) -> Topology:
    """NAME, NAME:nodes, COUNTxDEVICE, several of these joined by +, or the path of a file."""
    from p2bw.compiler import cluster_files

    if text.endswith((".toml", ".txt")):
        return _limit(cluster_files.read_cluster(Path(text), device), gpus)
    if "+" in text or re.match(r"\d+x", text):
        return _limit(cluster_files.join(text), gpus)
    name, _, nodes = text.partition(":")
    if name.lower() == "dgx-1" and nodes in ("", "1"):
        return _limit(cluster_files.cube_mesh(), gpus)
    if name.lower() not in _CLUSTERS:
        raise UsageError(
            f"unknown cluster {name!r}; known: {', '.join(CLUSTERS)}, nodes like 8xv100-16 joined "
            "by +, or the path of a .toml file or of nvidia-smi's (.txt)"
        )
    device, node, network = _CLUSTERS[name.lower()]
    if not nodes:
        count = gpus or node.size
    elif re.fullmatch(r"[1-9][0-9]{0,3}", nodes) and int(nodes) * node.size <= MAX_GPUS:
        count = int(nodes) * node.size
    else:
        raise UsageError(
            f"--cluster {text}: {nodes!r} is no number of nodes from 1 to {MAX_GPUS // node.size}"
        )
    topology = Topology(
        name=name.lower(),
        device=find_device(device),
        gpus=count,
        levels=_fit((node, network), count),
    )
    return _limit(topology, gpus)


def _fit(levels: tuple[Level, ...], gpus: int) -> tuple[Level, ...]:
    """The levels that so many GPUs need, the last one as large as it must be."""
    node, network = levels
    if gpus <= node.size:
        return (node,)
    return (node, replace(network, size=-(-gpus // node.size)))


def preset_node(text: str) -> list[tuple[Device, int, float, float]]:
    """Machines of a kind, for a mixed cluster: device, how many, bytes/s of its port and of theirs.

    NAME, NAME:nodes, or COUNTxDEVICE: one machine with a device's own links.
    """
    count, by, name = text.partition("x")
    if by and count.isascii() and count.isdecimal():
        device, number = find_device(name), int(count)
        if not 1 <= number <= MAX_GPUS:
            raise UsageError(f"--cluster {text}: give a number of devices from 1 to {MAX_GPUS}")
        return [(device, number, device.link, device.link / 10)]
    topology = _from_cluster(text, None, None)
    node, network = _CLUSTERS[topology.name][1:]
    machine = (topology.device, node.size, node.bandwidth, network.bandwidth)
    return [machine] * (topology.gpus // node.size)


def _limit(topology: Topology, gpus: int | None) -> Topology:
    if gpus is None or gpus == topology.gpus:
        return topology
    if gpus > topology.gpus:
        raise UsageError(
            f"--gpus {gpus}: {topology.name} has {topology.gpus}; name more nodes or ask for fewer"
        )
    return take(topology, gpus)


def take(topology: Topology, gpus: int) -> Topology:
    """Only the first devices."""
    more: list[Others] = []
    first = topology.gpus - sum(run.gpus for run in topology.more)
    left = gpus - first
    for run in topology.more:
        if left > 0:
            more.append(replace(run, gpus=min(run.gpus, left)))
            left -= run.gpus
    number = {vertex: vertex for vertex in range(gpus)}
    number |= {topology.gpus + i: gpus + i for i in range(len(topology.switches))}
    wires = tuple(
        replace(wire, a=number[wire.a], b=number[wire.b])
        for wire in topology.wires
        if wire.a in number and wire.b in number
    )
    return replace(topology, gpus=gpus, more=tuple(more), wires=wires)


_PER_S = {f"{p}{u}": 1000**i / n for i, p in enumerate("KMGT", 1) for u, n in (("B", 1), ("b", 8))}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_bandwidth(text: str) -> float:
    """'300GB/s' (bytes) or '25Gb/s' (bits), one way, in bytes per second."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT][bB])/s\s*", text, re.ASCII)
    rate = float(match[1]) * _PER_S[match[2]] if match else 0.0
    if not 0 < rate < 1e15:
        raise UsageError(f"{text!r} is no bandwidth; write it like 300GB/s or 25Gb/s, one way")
    return rate


def parse_seconds(text: str) -> float:
    """'5us', '1.5ms' or '20ns' in seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us|ns)\s*", text, re.ASCII)
    if not match or not float(match[1]) * _SECONDS[match[2]] < 3600:
        raise UsageError(f"{text!r} is no latency; write it like 5us or 1.5ms")
    return float(match[1]) * _SECONDS[match[2]]
