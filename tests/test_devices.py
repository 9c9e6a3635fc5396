"""Device presets, sizes of memory, descriptions of local GPUs."""

from types import SimpleNamespace

import pytest
import torch

from p2bw.compiler.devices import DEVICES, GIB, describe_gpu, find_device, parse_bytes
from p2bw.contract.errors import UsageError


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_presets_are_dense_peaks_with_sources(device):
    assert device.sources
    half = device.flops["float16"]
    assert device.flops["float32"] <= half <= 30 * device.flops["float32"]
    assert half <= 4 * device.flops.get("tf32", half)
    assert half == device.flops.get("bfloat16", half)
    assert 0.7 * device.memory_bytes < device.usable_bytes < device.memory_bytes
    assert device.link <= device.bandwidth


def test_a_dtype_that_the_hardware_lacks_runs_at_the_rate_of_float32():
    v100 = find_device("V100-16")
    assert v100.sustained_flops("bfloat16") == v100.sustained_flops(torch.float32)
    assert v100.sustained_flops(torch.float16) > 7 * v100.sustained_flops("float32")
    assert v100.sustained_flops("float64") < v100.sustained_flops("float32")
    a100 = find_device("a100-80")
    assert a100.sustained_flops("float32") == pytest.approx(19.5e12 * a100.matmul_fraction)
    assert a100.sustained_bandwidth < a100.bandwidth


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UsageError, match=r"v100-16.*h100"):
        find_device("tpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * GIB),
        ("16GB", 16 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("7 b", 7),
        ("5mib", 5 << 20),
    ],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "nan", "inf", "0GiB", "-1GiB", "16GG", "16", "1e3GiB", "GiB", "0.1B", "9999TiB", "1_0GB"],
)
def test_parse_bytes_refuses(text):
    with pytest.raises(UsageError, match="12GiB"):
        parse_bytes(text)


def test_memory_below_the_reserve_is_refused():
    with pytest.raises(UsageError, match="64 MiB of memory is less than"):
        find_device("h100").with_memory(64 << 20)


def properties(name, memory, **more):
    return SimpleNamespace(name=name, total_memory=memory, **more)


@pytest.mark.parametrize(
    ("name", "memory_gib", "preset"),
    [
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA L4", 22.0, "l4"),
        ("AMD Instinct MI300X", 191.7, "mi300x"),
    ],
)
def test_a_local_gpu_is_recognised_and_keeps_its_own_memory(name, memory_gib, preset):
    device = describe_gpu(properties(name, int(memory_gib * GIB)))
    assert device.name == preset
    assert device.memory_bytes == int(memory_gib * GIB)


def test_an_unknown_gpu_is_described_by_its_clocks():
    device = describe_gpu(
        properties(
            "NVIDIA RTX A6000",
            48 * GIB,
            multi_processor_count=84,
            clock_rate=1_800_000,
            memory_clock_rate=8_001_000,
            memory_bus_width=384,
            major=8,
        )
    )
    assert device.flops["float32"] == pytest.approx(38.7e12, rel=0.01)
    assert device.bandwidth == pytest.approx(768e9, rel=0.01)
    assert device.flops["bfloat16"] == pytest.approx(155e12, rel=0.01)  # dense
