"""Topologies: options, cluster presets, TOML files, JSON."""

import json

import pytest

from p2bw.compiler import topology as module
from p2bw.compiler.devices import GIB, find_device
from p2bw.compiler.topology import (
    CLUSTERS,
    Topology,
    make_topology,
    parse_bandwidth,
    parse_seconds,
    read_topology,
)
from p2bw.runtime.errors import InputFileError, UsageError


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


def test_a_pair_of_ranks_passes_the_ports_up_to_their_common_group():
    topology = make_topology(cluster="dgx-2:2")
    assert [topology.crossed(0, peer) for peer in (0, 1, 15, 16, 31)] == [0, 1, 1, 2, 2]
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
        ("count = 16", "gpus = 16", "count"),
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
