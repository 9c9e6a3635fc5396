"""Devices: memory, peak rates and what of them a training step sustains."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from p2bw.contract.errors import UsageError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]

MIB = 2**20
GIB = 2**30

_ML_ENG = "https://github.com/stas00/ml-engineering/blob/master/compute/accelerator/README.md"
_ML_ENG_NET = "https://github.com/stas00/ml-engineering/blob/master/network/README.md"
_NVLINK = "https://www.nvidia.com/en-us/data-center/nvlink/"
_TORCH = "https://github.com/pytorch/pytorch/blob/main/torch/_inductor/analysis/device_info.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator. Rates are dense peaks (no sparsity), per second; `link` is one way.

    `flops` maps "float32" (true fp32, no TF32), "tf32", "bfloat16" and "float16" to FLOP/s; a
    dtype that the hardware lacks is absent.
    """

    name: str
    memory_bytes: Annotated[int, Field(gt=0)]
    flops: Mapping[str, Positive]
    bandwidth: Positive  # bytes/s of the device's own memory
    link: Positive  # bytes/s one way of its GPU-to-GPU port (PCIe where there is no other)
    # Big matrix products reach about 0.8 of the peak and whole training steps 0.45 to 0.58
    # (ml-engineering, on A100 and H200); streaming kernels about 0.8 of the memory bandwidth.
    matmul_fraction: Fraction = 0.55
    bandwidth_fraction: Fraction = 0.8
    op_overhead_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-6  # one kernel launch
    # What the runtime takes of a core for each microbatch, where that core computes, too. It then
    # also copies the messages that it sends, at the rate of `link`.
    runtime_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    # CUDA context, NCCL's buffers and cuBLAS workspaces; then what the caching allocator loses.
    context_bytes: Annotated[int, Field(ge=0)] = 512 * MIB
    lost_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    sources: tuple[str, ...] = ()

    def sustained_flops(self, dtype: Any) -> float:
        """FLOP/s of matrix products in a dtype, given by name ("bfloat16") or as a torch.dtype."""
        return self.matmul_fraction * self._peak(str(dtype).removeprefix("torch."))

    def _peak(self, dtype: str) -> float:
        if dtype == "float64":
            return self.flops.get("float64", self.flops["float32"] / 2)
        # Without hardware for it, torch computes a short float (bf16 on a V100) in fp32.
        return self.flops.get(dtype, self.flops["float32"])

    @property
    def on_gpu(self) -> bool:
        """Whether torch runs a GPU's kernels on it, and allocates by its caching allocator."""
        return "cpu" not in self.name.lower()

    @property
    def sustained_bandwidth(self) -> float:
        """Bytes/s that a streaming kernel sees."""
        return self.bandwidth_fraction * self.bandwidth

    @property
    def reserve_bytes(self) -> int:
        """Memory that the framework takes for itself."""
        return self.context_bytes + round(self.lost_fraction * self.memory_bytes)

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - self.reserve_bytes

    def with_memory(self, memory_bytes: int) -> "Device":
        """The same device with another memory; UsageError if the reserve alone fills it."""
        device = replace(self, memory_bytes=memory_bytes)
        if device.usable_bytes <= 0:
            raise UsageError(
                f"{memory_bytes / MIB:.0f} MiB of memory is less than the "
                f"{device.reserve_bytes / MIB:.0f} MiB that the framework keeps on a {self.name}"
            )
        return device


def _gpu(
    name: str,
    memory_gib: float,
    *,
    half: float,
    fp32: float,
    memory_gb_s: float,
    link_gb_s: float,
    sources: tuple[str, ...],
    tf32: float | None = None,
    bf16: bool = True,
    **extra: Any,
) -> Device:
    """A preset from a data sheet's units: TFLOP/s, GiB, GB/s one way."""
    tera = {"float32": fp32, "float16": half}
    if tf32 is not None:
        tera["tf32"] = tf32
    if bf16:
        tera["bfloat16"] = half
    return Device(
        name=name,
        memory_bytes=round(memory_gib * GIB),
        flops={dtype: rate * 1e12 for dtype, rate in tera.items()},
        bandwidth=memory_gb_s * 1e9,
        link=link_gb_s * 1e9,
        sources=sources,
        **extra,
    )


_V100 = "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf"
_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_RTX4090 = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_L4 = "https://www.nvidia.com/en-us/data-center/l4/"
_APPLE = "https://www.apple.com/newsroom/2023/06/apple-introduces-m2-ultra/"

_PRESETS = (
    # SXM2: 125 TFLOP/s fp16 tensor cores, no bf16, no TF32; NVLink 2: 6 links x 25 GB/s.
    _gpu(
        "v100-16",
        16,
        half=125,
        fp32=15.7,
        bf16=False,
        memory_gb_s=900,
        link_gb_s=150,
        sources=(_V100, _NVLINK),
    ),
    _gpu(
        "v100-32",
        32,
        half=125,
        fp32=15.7,
        bf16=False,
        memory_gb_s=900,
        link_gb_s=150,
        sources=(_V100, _NVLINK),
    ),
    # SXM4, NVLink 3: 12 links x 25 GB/s.
    _gpu(
        "a100-40",
        40,
        half=312,
        tf32=156,
        fp32=19.5,
        memory_gb_s=1555,
        link_gb_s=300,
        sources=(_A100, _ML_ENG),
    ),
    _gpu(
        "a100-80",
        80,
        half=312,
        tf32=156,
        fp32=19.5,
        memory_gb_s=2039,
        link_gb_s=300,
        sources=(_A100, _ML_ENG, _TORCH),
    ),
    # SXM5, NVLink 4: 18 links x 25 GB/s. Data sheets print twice these rates, with sparsity.
    _gpu(
        "h100",
        80,
        half=989,
        tf32=494.5,
        fp32=67,
        memory_gb_s=3350,
        link_gb_s=450,
        sources=(_ML_ENG, _TORCH),
    ),
    _gpu(
        "h200",
        141e9 / GIB,
        half=989,
        tf32=494.5,
        fp32=67,
        memory_gb_s=4800,
        link_gb_s=450,
        sources=(_ML_ENG,),
    ),
    # NVLink 5: 18 links x 50 GB/s; 180 of the 192 GB are offered on HGX boards.
    _gpu(
        "b200",
        180e9 / GIB,
        half=2250,
        tf32=1125,
        fp32=80,
        memory_gb_s=8000,
        link_gb_s=900,
        sources=(_ML_ENG,),
    ),
    # xGMI: 7 links x 64 GB/s, one to each peer; a pipeline neighbour gets one of them.
    _gpu(
        "mi300x",
        192,
        half=1307.4,
        tf32=653.7,
        fp32=163.4,
        memory_gb_s=5300,
        link_gb_s=64,
        sources=(_TORCH, _ML_ENG_NET),
    ),
    # fp32 accumulation; PCIe 4 x16 without peer access, so that data goes through the host.
    _gpu(
        "rtx4090",
        24,
        half=165.2,
        tf32=82.6,
        fp32=82.6,
        memory_gb_s=1008,
        link_gb_s=12,
        sources=(_RTX4090,),
    ),
    # PCIe 4 x16: 31 GB/s.
    _gpu(
        "l4",
        24,
        half=121,
        tf32=60,
        fp32=30.3,
        memory_gb_s=300,
        link_gb_s=31,
        sources=(_L4, _ML_ENG_NET),
    ),
    _gpu(
        "l40s",
        48,
        half=362,
        tf32=183,
        fp32=91.6,
        memory_gb_s=864,
        link_gb_s=31,
        sources=(_ML_ENG, _ML_ENG_NET),
    ),
    # 192 GB of unified memory, of which Metal offers a process about 75 % by default. One device:
    # its link is its own memory.
    _gpu(
        "m2-ultra",
        192,
        half=27.2,
        fp32=27.2,
        bf16=False,
        memory_gb_s=800,
        link_gb_s=400,
        lost_fraction=0.25,
        sources=(_APPLE,),
    ),
    # One core of a present-day server for processes on one host that talk over gloo: AVX2 at
    # 3 GHz has 96 GFLOP/s, memory gives a core about 10 GB/s, gloo on loopback about 2 GB/s.
    # Nothing here is a data sheet's; `memory` is a share of a host and meant to be overridden.
    _gpu(
        "cpu",
        16,
        half=0.096,
        fp32=0.096,
        memory_gb_s=10,
        link_gb_s=2,
        bf16=False,
        op_overhead_s=1e-5,
        context_bytes=256 * MIB,
        sources=("generic, see the comment in compiler/devices.py",),
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({device.name: device for device in _PRESETS})


def find_device(name: str) -> Device:
    """A preset by name."""
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise UsageError(f"unknown device {name!r}; known: {', '.join(DEVICES)}") from None


_BYTES = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int:
    """'12GiB', '16GB' or '1.5TiB' in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", text, re.IGNORECASE | re.ASCII)
    size = round(float(match[1]) * _BYTES[match[2].upper()]) if match else 0
    if not 0 < size < 2**50:
        raise UsageError(f"{text!r} is no size of a memory; write it like 12GiB, 16GB or 512MiB")
    return size


# Parts of the names that drivers report, the more special one first.
_NAMES = (
    ("V100", "v100"),
    ("A100", "a100"),
    ("H100", "h100"),
    ("H200", "h200"),
    ("B200", "b200"),
    ("MI300X", "mi300x"),
    ("RTX 4090", "rtx4090"),
    ("L40S", "l40s"),
    ("L4", "l4"),
)


def local_device() -> Device | None:
    """This machine's first GPU as a description, or None where torch sees none.

    Rates come from the preset of that name; for a GPU without one, from the clocks and units
    that the driver reports.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return describe_gpu(properties)


def describe_gpu(properties: Any) -> Device:
    """A Device from torch.cuda.get_device_properties."""
    memory = int(properties.total_memory)
    words = re.split(r"[^A-Z0-9]+", properties.name.upper())
    for part, stem in _NAMES:
        if all(word in words for word in part.split()):
            presets = [d for d in DEVICES.values() if d.name.split("-")[0] == stem]
            nearest = min(presets, key=lambda d: abs(d.memory_bytes - memory))
            return replace(nearest, memory_bytes=memory)
    # Peaks by the units: 128 fp32 lanes per multiprocessor, a fused multiply-add per clock; tensor
    # cores give at least four times that in half precision since Volta (compute capability 7).
    fp32 = properties.multi_processor_count * 128 * 2 * properties.clock_rate * 1e3
    flops = {"float32": fp32}
    if properties.major >= 7:
        flops["float16"] = 4 * fp32
    if properties.major >= 8:
        flops |= {"bfloat16": 4 * fp32, "tf32": 2 * fp32}
    return Device(
        name=properties.name,
        memory_bytes=memory,
        flops=flops,
        bandwidth=2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8,
        link=12e9,
        sources=("torch.cuda.get_device_properties",),
    )
