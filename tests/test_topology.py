"""Topologies: options, cluster presets, TOML files, JSON."""

import json

import pytest

from p2bw.compiler import topology as module
from p2bw.compiler.cluster_files import read_topology
from p2bw.compiler.devices import GIB, find_device
from p2bw.compiler.links import Network
from p2bw.compiler.topology import (
    CLUSTERS,
    Topology,
    make_topology,
    parse_bandwidth,
    parse_seconds,
)
from p2bw.contract.errors import InputFileError, UsageError


@pytest.fixture(autouse=True)
def no_local_gpu(monkeypatch):
    monkeypatch.setattr(module, "local_device", lambda: None)


def test_without_options_one_documented_server():
    topology = make_topology()
    assert (topology.name, topology.gpus) == ("p3.16xlarge", 8)
    assert topology.device == find_device("v100-16")
    assert len(topology.levels) == 1


def test_gpus_memory_and_device():
    topology = make_topology(16, device="a100-80", memory="40GiB")
    assert topology.gpus == len(topology.devices) == 16
    assert topology.device.memory_bytes == 40 * GIB
    assert [level.size for level in topology.levels] == [8, 2]


def test_local_gpus_are_the_default(monkeypatch):
    monkeypatch.setattr(module, "local_device", lambda: find_device("h100"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert make_topology().gpus == 4
    assert make_topology().device == find_device("h100")
    assert [level.size for level in make_topology(16).levels] == [4, 4]
    assert make_topology(cluster="p4d").device == find_device("a100-40")


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_links_nodes_slower_than_gpus(name):
    topology = make_topology(cluster=f"{name}:4")
    node, network = topology.levels
    assert topology.gpus == 4 * node.size
    assert network.bandwidth / node.size < node.bandwidth <= topology.device.link
    again = Topology.from_json(json.loads(json.dumps(topology.to_json())))
    assert again == topology


def test_a_rank_belongs_to_a_unit_of_each_level():
    topology = make_topology(cluster="dgx-2:2")
    assert [topology.unit(rank, 0) for rank in (0, 15, 16)] == [0, 15, 16]
    assert [topology.unit(rank, 1) for rank in (0, 15, 16)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": -1}, "--gpus -1"),
        ({"gpus": 10**9}, "from 1 to"),
        ({"cluster": "p4d:2", "gpus": 17}, "p4d has 16"),
        ({"cluster": "p4d:0"}, "no number of nodes"),
        ({"cluster": "p4d:x"}, "no number of nodes"),
        ({"cluster": "nowhere"}, "known: p3.16xlarge"),
        ({"device": "tpu"}, "unknown device"),
        ({"memory": "nan"}, "no size of a memory"),
        ({"cluster": "missing.toml"}, "No such file"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        make_topology(**options)


FILE = """
device = "a100-80"
count = 16
memory = "40GiB"
[[levels]]
name = "node"
size = 8
bandwidth = "300GB/s"
latency = "5us"
[[levels]]
name = "network"
size = 2
bandwidth = "200Gb/s"
"""


def test_topology_file(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(FILE)
    topology = make_topology(12, cluster=str(path))
    assert (topology.name, topology.gpus) == ("lab", 12)
    assert topology.device.memory_bytes == 40 * GIB
    assert topology.levels[1].bandwidth == 25e9
    assert topology.levels[0].latency_s == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"300GB/s"', '"-1GB/s"', r"levels\[0\].bandwidth: '-1GB/s'"),
        ('"300GB/s"', '"nanGB/s"', r"levels\[0\].bandwidth"),
        ('"300GB/s"', "300", r"levels\[0\].bandwidth"),
        ('"5us"', '"5"', r"levels\[0\].latency"),
        ("size = 2", "size = 0", r"levels\[1\].size"),
        ("size = 2", "size = 1", "count: 16 devices, but the levels hold 8"),
        ("count = 16", "count = 1.5", "count"),
        ("count = 16", "count = true", "count"),
        ("count = 16", "gpus = 16", "gpus"),
        ("count = 16", "", "count"),
        ('"a100-80"', '"abacus"', "device: unknown device 'abacus'"),
        ('"40GiB"', '"1MiB"', "memory: 1 MiB of memory is less"),
        ("[[levels]]", "[[", "not TOML"),
    ],
)
def test_topology_file_is_refused_by_field(tmp_path, old, new, message):
    path = tmp_path / "lab.toml"
    path.write_text(FILE.replace(old, new, 1))
    with pytest.raises(InputFileError, match=message):
        read_topology(path)


def test_rates_and_times():
    assert parse_bandwidth("300GB/s") == 300e9
    assert parse_bandwidth("25 Gb/s") == 3.125e9
    assert parse_seconds("1.5ms") == pytest.approx(1.5e-3)
    for text in ("300", "infGB/s", "0GB/s", "300GB"):
        with pytest.raises(UsageError):
            parse_bandwidth(text)
    for text in ("5", "-5us", "nanus", "1e9s"):
        with pytest.raises(UsageError):
            parse_seconds(text)


def test_machines_that_differ_are_joined():
    mixed = make_topology(cluster="8xv100-16+4xa100-40")
    assert mixed.gpus == 12
    assert [kind.name for kind in mixed.kinds] == ["v100-16", "a100-40"]
    assert mixed.summary == "8 x v100-16 + 4 x a100-40"
    network = Network(mixed)
    # Out of the device, out of its machine, into the other machine, into the other device.
    names = [network.name(port) for port in network.route(0, 8)]
    assert names == ["GPU0 to node0", "node0 to network", "network to node1", "node1 to GPU8"]
    assert [network.bandwidth(port) for port in network.route(0, 8)] == [150e9, 15e9, 30e9, 300e9]
    assert network.route(8, 0) == tuple((a, b, 1 - c) for a, b, c in reversed(network.route(0, 8)))
    assert make_topology(gpus=9, cluster="8xv100-16+4xa100-40").devices[8].name == "a100-40"
    assert make_topology(cluster="p3.16xlarge:2+p4d").gpus == 24


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ("8xv100-16+abacus", "unknown cluster 'abacus'"),
        ("8xabacus", "unknown device 'abacus'"),
        ("0xv100-16", "from 1 to"),
    ],
)
def test_joined_machines_are_refused(cluster, message):
    with pytest.raises(UsageError, match=message):
        make_topology(cluster=cluster)


def test_a_mixed_cluster_says_itself_what_its_devices_are():
    with pytest.raises(UsageError, match="--memory"):
        make_topology(cluster="8xv100-16+4xa100-40", memory="4GiB")


NODES = """
[[nodes]]
device = "v100-16"
gpus = 8
link = "25GB/s"
network = "12.5GB/s"
[[nodes]]
device = "a100-40"
gpus = 4
count = 2
memory = "30GiB"
"""

WIRES = """
device = "a100-40"
count = 3
[[wires]]
a = "GPU0"
b = "GPU1"
bandwidth = "50GB/s"
[[wires]]
a = "GPU1"
b = "switch"
bandwidth = "12GB/s"
[[wires]]
a = "GPU2"
b = "switch"
bandwidth = "12GB/s"
"""


def test_nodes_in_a_file(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(NODES)
    lab = make_topology(cluster=str(path))
    assert lab.gpus == 16
    assert lab.devices[15].memory_bytes == 30 * 2**30
    assert [wire.bandwidth for wire in lab.wires if wire.a == 16] == [12.5e9]


def test_wires_in_a_file(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(WIRES)
    with pytest.raises(InputFileError, match="no way from GPU0 to GPU2"):  # GPU1 forwards nothing
        make_topology(cluster=str(path))
    path.write_text(WIRES + '[[wires]]\na = "GPU0"\nb = "switch"\nbandwidth = "10GB/s"\n')
    lab = make_topology(cluster=str(path))
    network = Network(lab)
    assert [network.name(port) for port in network.route(1, 0)] == ["GPU1 to GPU0"]
    assert [network.name(port) for port in network.route(2, 0)] == [
        "GPU2 to switch",
        "switch to GPU0",
    ]
    path.write_text(WIRES + '[[wires]]\na = "GPU7"\nb = "switch"\nbandwidth = "10GB/s"\n')
    with pytest.raises(InputFileError, match="GPU7: there are only 3 devices"):
        make_topology(cluster=str(path))


SMI = """
\tGPU0\tGPU1\tGPU2\tGPU3\tmlx5_0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV2\tSYS\tSYS\tPIX\t0-9\t0
GPU1\tNV2\t X \tSYS\tSYS\tPIX\t0-9\t0
GPU2\tSYS\tSYS\t X \tPIX\tSYS\t10-19\t1
GPU3\tSYS\tSYS\tPIX\t X \tSYS\t10-19\t1
mlx5_0\tPIX\tPIX\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
"""


def test_what_nvidia_smi_prints(tmp_path):
    path = tmp_path / "topo.txt"
    path.write_text(SMI)
    with pytest.raises(UsageError, match="--device"):
        make_topology(cluster=str(path))
    lab = make_topology(cluster=str(path), device="v100-16")
    network = Network(lab)
    assert network.bandwidth(network.route(0, 1)[0]) == 50e9  # two NVLinks of 25 GB/s
    assert [network.name(port) for port in network.route(2, 3)] == [
        "GPU2 to PCIe2",
        "PCIe2 to GPU3",
    ]
    across = [network.name(port) for port in network.route(0, 2)]
    assert across[2:4] == ["socket0 to sockets", "sockets to socket2"]
    path.write_text(SMI.replace("NV2", "NVX"))
    with pytest.raises(InputFileError, match="row of GPU0: 'NVX' is no kind of link"):
        make_topology(cluster=str(path), device="v100-16")
    path.write_text("nothing")
    with pytest.raises(InputFileError, match="starts with GPU0"):
        make_topology(cluster=str(path), device="v100-16")


def test_nvlinks_that_no_gpu_has_lead_to_a_switch(tmp_path):
    rows = ["GPU0 GPU1 GPU2 GPU3"]
    rows += [f"GPU{a} " + " ".join("X" if a == b else "NV12" for b in range(4)) for a in range(4)]
    path = tmp_path / "topo.txt"
    path.write_text("\n".join(rows))
    lab = make_topology(cluster=str(path), device="a100-40")
    names = [Network(lab).name(port) for port in Network(lab).route(0, 3)]
    assert names == ["GPU0 to NVSwitch", "NVSwitch to GPU3"]
    assert Network(lab).bandwidth(Network(lab).route(0, 3)[0]) == 300e9


def test_a_dgx1_is_a_cube_mesh():
    mesh = make_topology(cluster="dgx-1")
    network = Network(mesh)
    assert mesh.gpus == 8
    for rank in range(8):
        nvlinks = [
            wire for wire in mesh.wires if rank in (wire.a, wire.b) and max(wire.a, wire.b) < 8
        ]
        assert sum(wire.bandwidth for wire in nvlinks) == 150e9  # six links each
    assert len(network.route(0, 4)) == 1
    assert len(network.route(0, 5)) > 2  # over PCIe and the sockets: GPUs do not forward


def test_a_mixed_topology_goes_through_json():
    for cluster in ("dgx-1", "8xv100-16+4xa100-40"):
        topology = make_topology(cluster=cluster)
        assert Topology.from_json(json.loads(json.dumps(topology.to_json()))) == topology
