"""Profile: what was measured of a device and of a model's blocks on it, as a file of data."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from p2bw.compiler.devices import GIB, MIB, Device, parse_bytes
from p2bw.compiler.kinds import block_kind
from p2bw.compiler.plan import Data, wrong_field
from p2bw.compiler.problem import Times
from p2bw.compiler.program import Program, TensorType
from p2bw.compiler.topology import DEFAULT_GPUS, Level, Topology, make_topology
from p2bw.compiler.units import several
from p2bw.contract.errors import InputFileError, UsageError

Rate = Annotated[float, Field(gt=0, lt=1e20)]
Positive = Annotated[int, Field(ge=1, lt=2**50)]
Seconds = Annotated[float, Field(ge=0, lt=1e6)]  # sums of many stay finite


class Timing(Data):
    """The median of several runs, in seconds, and the median of what they differ from it."""

    median_s: Seconds
    spread_s: Seconds


class Matmul(Data):
    """Products of two square matrices."""

    dtype: str
    size: Positive  # rows
    flops_per_s: Rate


class DeviceProfile(Data):
    """What a device sustains, as one of the processes that share the machine sees it."""

    name: str  # as the driver or the operating system calls it
    type: Literal["cpu", "cuda"]
    memory_bytes: Positive
    threads: Positive  # of the process that was measured
    processes: Positive  # that were at work at the same time, each on a device (core) of its own
    torch_version: str
    matmuls: Annotated[tuple[Matmul, ...], Field(min_length=1)]
    bandwidth: Rate  # bytes/s, read and written, of a large copy
    op_overhead_s: Seconds  # of one small operator, called from Python
    runtime_s: Seconds = 0.0  # that the runtime takes of a core itself for each microbatch
    link: Rate | None = None  # bytes/s between two processes, one way; None: there is no peer
    latency_s: Seconds = 0.0  # of a small message between them
    backend: str | None = None  # "gloo", "nccl"

    def device(self) -> Device:
        """The device as the compiler knows devices; its rates are sustained already."""
        flops: dict[str, float] = {}
        for matmul in self.matmuls:
            flops[matmul.dtype] = max(matmul.flops_per_s, flops.get(matmul.dtype, 0.0))
        return Device(
            name=f"measured: {self.name}" + " (cpu)" * (self.type == "cpu"),
            memory_bytes=self.memory_bytes,
            flops=flops,
            bandwidth=self.bandwidth,
            link=self.link or self.bandwidth,
            matmul_fraction=1.0,
            bandwidth_fraction=1.0,
            op_overhead_s=self.op_overhead_s,
            runtime_s=self.runtime_s,
            context_bytes=(512 if self.type == "cuda" else 256) * MIB,
            sources=(
                f"p2bw profile, torch {self.torch_version}, {several(self.threads, 'thread')}",
            ),
        )

    @model_validator(mode="after")
    def _has_float32(self) -> Self:
        if all(matmul.dtype != "float32" for matmul in self.matmuls):
            raise ValueError("matmuls: there is none in float32")
        if self.memory_bytes < GIB:
            raise ValueError("memory_bytes: less than 1 GiB")
        return self


class Kind(Data):
    """Blocks with the same operators on tensors of the same shapes: one microbatch of one block."""

    forward: Timing
    backward: Timing


class Check(Data):
    """One forward and backward of the user's own model, against the sum of its blocks."""

    whole_s: Seconds
    blocks_s: Seconds

    @property
    def ratio(self) -> float:
        return self.blocks_s / self.whole_s if self.whole_s else 1.0


class Step(Data):
    """The model at one microbatch size."""

    microbatch: Positive
    blocks: dict[str, str]  # name of a block -> its kind
    feed_s: Seconds  # making one microbatch of data
    check: Check | None = None  # None: the model did not fit the device as a whole


class ModelProfile(Data):
    """What was measured, for people."""

    file: str
    factory: str
    settings: dict[str, str | int | float | bool | None]
    autocast: Literal["bfloat16"] | None = None
    name: str


class Profile(Data):
    """A device, a model, and the time of each kind of its blocks."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    p2bw_version: str
    device: DeviceProfile
    model: ModelProfile
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]  # by microbatch size
    kinds: dict[str, Kind]
    updates: dict[str, Seconds]  # type of a parameter -> seconds of its part of one weight update

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sizes = [step.microbatch for step in self.steps]
        if sizes != sorted(set(sizes)):
            raise ValueError("steps: microbatch sizes are not in ascending order, each once")
        for step in self.steps:
            if unknown := set(step.blocks.values()) - self.kinds.keys():
                raise ValueError(f"steps: there is no kind {min(unknown)!r}")
        return self

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    @property
    def microbatches(self) -> tuple[int, ...]:
        return tuple(step.microbatch for step in self.steps)


def read_profile(path: Path) -> Profile:
    """A profile from a JSON file; InputFileError names the field that is not valid."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        wrong = wrong_field(error, "the profile")
        raise InputFileError(f"{path}: {wrong}; make it anew with p2bw profile") from None


def choose_topology(
    profile: Profile | None,
    gpus: int | None,
    device: str | None,
    memory: str | None,
    cluster: str | None,
) -> Topology:
    """What the options describe; with a profile, devices like the one that was measured.

    These have a `cluster`'s links, or else the one that was measured between two processes.
    """
    if profile is None:
        return make_topology(gpus=gpus, device=device, memory=memory, cluster=cluster)
    if device is not None:
        raise UsageError(
            f"--device {device}: the profile says what the devices are, {profile.device.name}; "
            "leave one of the two out"
        )
    kind = profile.device.device()
    if cluster is not None:
        topology = make_topology(gpus=gpus, cluster=cluster)
        if len(topology.kinds) > 1:
            raise UsageError(
                f"--cluster {cluster} has several kinds of device, and the profile only one"
            )
        kind = replace(kind, memory_bytes=topology.device.memory_bytes)
        topology = replace(topology, device=kind)
    else:
        count = gpus or DEFAULT_GPUS
        level = Level(
            name="node", size=count, bandwidth=kind.link, latency_s=profile.device.latency_s
        )
        topology = Topology(name=kind.name, device=kind, gpus=count, levels=(level,))
    return replace(topology, device=kind.with_memory(parse_bytes(memory))) if memory else topology


def update_times(profile: Profile, program: Program) -> Mapping[TensorType, float]:
    """Seconds of one optimizer step of a parameter of each type."""
    kinds = {p.type for p in program.parameters.values() if p.trainable}
    for kind in sorted(kinds, key=str):
        if str(kind) not in profile.updates:
            raise _other_model(profile, f"a parameter {kind}")
    return {kind: profile.updates[str(kind)] for kind in kinds}


def block_times(profile: Profile, program: Program) -> Mapping[str, Times]:
    """By name of a block: its measured seconds; UsageError if it was not measured.

    A microbatch size between two that were measured lies on the line between them.
    """
    assert program.blocks is not None, "group_blocks has not run"
    low, high, share = _around(profile, program.batch_size)
    if low is high:
        kinds = {block.name: block_kind(program, block) for block in program.blocks}
        return {name: _times(profile, kind, name) for name, kind in kinds.items()}

    def between(name: str) -> Times:
        if name not in low.blocks or name not in high.blocks:
            raise _other_model(profile, name)
        a, b = _times(profile, low.blocks[name], name), _times(profile, high.blocks[name], name)
        return Times(
            forward_s=a.forward_s + share * (b.forward_s - a.forward_s),
            backward_s=a.backward_s + share * (b.backward_s - a.backward_s),
        )

    return {block.name: between(block.name) for block in program.blocks}


def feed_s(profile: Profile, microbatch: int) -> float:
    """Seconds that making one microbatch of data takes."""
    low, high, share = _around(profile, microbatch)
    return low.feed_s + share * (high.feed_s - low.feed_s)


def _around(profile: Profile, size: int) -> tuple[Step, Step, float]:
    """The measured steps at or around a microbatch size, and how far it is between them."""
    low = max((s for s in profile.steps if s.microbatch <= size), key=_size, default=None)
    high = min((s for s in profile.steps if s.microbatch >= size), key=_size, default=None)
    if low is None or high is None:
        raise UsageError(
            f"the profile was taken at microbatch {_listed(profile)}, not at {size}; take one with "
            f"p2bw profile --microbatch {size}, or compile with --microbatch "
            f"{profile.microbatches[0]}"
        )
    span = high.microbatch - low.microbatch
    return low, high, (size - low.microbatch) / span if span else 0.0


def _size(step: Step) -> int:
    return step.microbatch


def _times(profile: Profile, kind: str, name: str) -> Times:
    if kind not in profile.kinds:
        raise _other_model(profile, name)
    found = profile.kinds[kind]
    return Times(forward_s=found.forward.median_s, backward_s=found.backward.median_s)


def _other_model(profile: Profile, block: str) -> UsageError:
    model = profile.model
    settings = "".join(f", {key}={value}" for key, value in model.settings.items())
    return UsageError(
        f"the profile has no block like {block}: it was taken of {model.file}:{model.factory}"
        f"{settings}{f' under autocast to {model.autocast}' if model.autocast else ''} at "
        f"microbatch {_listed(profile)}; take one of this model with p2bw profile"
    )


def _listed(profile: Profile) -> str:
    return ", ".join(map(str, profile.microbatches))
