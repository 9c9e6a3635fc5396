"""Clusters from files: TOML, or what nvidia-smi prints of a machine; and machines joined by +."""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, ValidationError

from p2bw.compiler.devices import Device, find_device, parse_bytes
from p2bw.compiler.graphs import Node, named_wires, star
from p2bw.compiler.nvidia_smi import CUBE_MESH, read_nvidia_smi
from p2bw.compiler.plan import Data
from p2bw.compiler.topology import (
    MAX_GPUS,
    Count,
    Level,
    Topology,
    check_topology,
    parse_bandwidth,
    parse_seconds,
    preset_node,
)
from p2bw.contract.errors import InputFileError, UsageError

T = TypeVar("T")


def read_cluster(path: Path, device: str | None) -> Topology:
    """A TOML file, or (.txt) the output of `nvidia-smi topo -m` on a machine with such devices."""
    if path.suffix == ".toml":
        return read_topology(path)
    if device is None:
        raise UsageError(f"--cluster {path}: say with --device which GPUs these are (v100-16 ...)")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        return read_nvidia_smi(text, path.stem, find_device(device))
    except ValueError as error:
        raise InputFileError(f"{path}: {error}") from None


def cube_mesh() -> Topology:
    """A DGX-1: eight V100s in a hybrid cube mesh of NVLinks."""
    return read_nvidia_smi(CUBE_MESH, "dgx-1", find_device("v100-16"))


def join(text: str) -> Topology:
    """Machines joined by +: presets (p3.16xlarge, p4d:2) or so many of a device (8xv100-16)."""
    nodes = [node for part in text.split("+") for node in preset_node(part)]
    topology = star(text, [Node(device=d, gpus=n, link=a, network=b) for d, n, a, b in nodes])
    if topology.gpus > MAX_GPUS:
        raise UsageError(f"--cluster {text}: more than {MAX_GPUS} devices")
    return topology


class _LevelEntry(Data):
    name: str
    size: Count
    bandwidth: str
    latency: str = "0us"


class _NodeEntry(Data):
    device: str
    gpus: Count
    count: Count = 1
    memory: str | None = None
    link: str | None = None
    network: str | None = None


class _WireEntry(Data):
    a: str
    b: str
    bandwidth: str


class _File(Data):
    """A topology file: devices, and levels from the innermost outwards, or nodes, or wires."""

    name: str | None = None
    device: str | None = None
    memory: str | None = None
    count: Annotated[int | None, Field(ge=1, le=MAX_GPUS)] = None
    levels: list[_LevelEntry] = Field(default_factory=list, max_length=8)
    nodes: list[_NodeEntry] = Field(default_factory=list)
    wires: list[_WireEntry] = Field(default_factory=list)


def read_topology(path: Path) -> Topology:
    """A topology from a TOML file; InputFileError names the field that is not valid.

    device = "a100-80"        # a preset's name; memory = "40GiB" overrides its memory
    count = 16                # devices
    [[levels]]                # the innermost first
    name = "node"
    size = 8                  # members of a group of this level
    bandwidth = "300GB/s"     # of each member's port, one way
    latency = "5us"

    or, in place of levels, any links: of devices (GPU0, GPU1 ..) and of switches (other names)

    [[wires]]
    a = "GPU0"
    b = "GPU1"
    bandwidth = "50GB/s"      # each way

    or, in place of all that, machines that differ

    [[nodes]]
    device = "v100-16"
    gpus = 8
    count = 2                 # machines like this; 1 without it
    memory = "12GiB"          # of each device, if not the preset's
    link = "25GB/s"           # of each device's port, if not the preset's
    network = "12.5GB/s"      # of the machine's port; a tenth of a device's without it
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputFileError(f"{path}: not TOML: {error}") from None
    try:
        file = _File.model_validate(entries)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputFileError(f"{path}: {_field(first['loc'])}: {first['msg']}") from None
    if [bool(file.levels), bool(file.wires), bool(file.nodes)].count(True) != 1:
        raise InputFileError(f"{path}: levels: give levels, or wires, or nodes")
    return _of_nodes(path, file) if file.nodes else _of_one_kind(path, file)


def _of_nodes(path: Path, file: _File) -> Topology:
    if file.device or file.count or file.memory:
        raise InputFileError(f"{path}: nodes: each says its own device, gpus and memory")
    nodes = []
    for i, entry in enumerate(file.nodes):
        at = f"nodes[{i}]"
        device = _device(path, entry.device, entry.memory, f"{at}.")
        link, network = device.link, None
        if entry.link is not None:
            link = _parsed(path, f"{at}.link", parse_bandwidth, entry.link)
        if entry.network is not None:
            network = _parsed(path, f"{at}.network", parse_bandwidth, entry.network)
        node = Node(device=device, gpus=entry.gpus, link=link, network=network or link / 10)
        nodes += [node] * entry.count
    kinds = {node.device.name: node.device for node in nodes}
    if any(kinds[node.device.name] != node.device for node in nodes):
        raise InputFileError(f"{path}: nodes: two memories of one kind of device")
    if sum(node.gpus for node in nodes) > MAX_GPUS:
        raise InputFileError(f"{path}: nodes: more than {MAX_GPUS} devices")
    return star(file.name or path.stem, nodes)


def _of_one_kind(path: Path, file: _File) -> Topology:
    for field, value in (("device", file.device), ("count", file.count)):
        if value is None:
            raise InputFileError(f"{path}: {field}: Field required")
    assert file.device is not None
    assert file.count is not None
    device = _device(path, file.device, file.memory, "")
    name = file.name or path.stem
    if file.wires:
        wires = [
            (w.a, w.b, _parsed(path, f"wires[{i}].bandwidth", parse_bandwidth, w.bandwidth))
            for i, w in enumerate(file.wires)
        ]
        try:
            topology = named_wires(name, device, file.count, wires)
            check_topology(topology)
        except ValueError as error:
            raise InputFileError(f"{path}: wires: {error}") from None
        return topology
    levels = tuple(
        Level(
            name=level.name,
            size=level.size,
            bandwidth=_parsed(path, f"levels[{i}].bandwidth", parse_bandwidth, level.bandwidth),
            latency_s=_parsed(path, f"levels[{i}].latency", parse_seconds, level.latency),
        )
        for i, level in enumerate(file.levels)
    )
    room = math.prod(level.size for level in levels)
    if file.count > room:
        raise InputFileError(f"{path}: count: {file.count} devices, but the levels hold {room}")
    return Topology(name=name, device=device, gpus=file.count, levels=levels)


def _device(path: Path, name: str, memory: str | None, at: str) -> Device:
    device = _parsed(path, f"{at}device", find_device, name)
    if memory is None:
        return device
    return _parsed(path, f"{at}memory", lambda text: device.with_memory(parse_bytes(text)), memory)


def _field(location: tuple[int | str, ...]) -> str:
    """('levels', 3, 'size') -> 'levels[3].size'."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:]


def _parsed(path: Path, field: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except UsageError as error:
        raise InputFileError(f"{path}: {field}: {error}") from None
