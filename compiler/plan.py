"""Plan: everything that compile decides, as data (plan.json)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2bw.contract.errors import InputFileError

if TYPE_CHECKING:
    from p2bw.contract import plan as contract

Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=0)]
Schedule = Literal["2bw", "flush", "gpipe", "stash"]


class Data(BaseModel):
    """Base of all that is read from files: frozen, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def wrong_field(error: ValidationError, whole: str) -> str:
    """For a message: the first field that is not valid (`whole` if none alone is), and why."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


class ModelSource(Data):
    """Which model was compiled. `file` is relative; `sha256` is that of the file's bytes."""

    file: str
    factory: str
    settings: dict[str, str | int | float | bool | None]
    autocast: Literal["bfloat16"] | None = None  # around forward and loss
    sha256: str
    name: str


class TensorSpec(Data):
    """A tensor of one microbatch."""

    name: str
    shape: tuple[Count, ...]
    dtype: str  # "float32", as in torch


class TransferSpec(Data):
    """A tensor that a stage sends to or receives from a peer stage, each microbatch."""

    tensor: str
    peer: Count
    shape: tuple[Count, ...]
    dtype: str
    bytes: Count
    gradient: bool  # its gradient travels back


class TiedSpec(Data):
    """One parameter under several names; where `stages` holds several, its gradients are summed."""

    names: tuple[str, ...]
    stages: tuple[Count, ...]
    bytes: Count


class OpaqueSpec(Data):
    """A module that could not be traced: the stages call the user's own, and no cut divides it."""

    module: str
    type: str
    stages: tuple[Count, ...]  # where it is called
    reason: str  # why it could not be traced, and where
    returns: tuple[tuple[str, ...], ...]  # what its calls were compiled for: "float32[2, 8]", ...
    flops_forward: Count  # of all its calls
    flops_backward: Count
    costs: Literal["counted", "declared"] = "counted"  # as it ran on the CPU, by itself


class Seconds(Data):
    """Compute of one stage for one microbatch; update is one optimizer step divided by m."""

    forward: Number
    backward: Number
    recompute: Number
    update: Number

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recompute + self.update


class Memory(Data):
    """Bytes of one stage at its peak, by kind, against what the device offers (docs/memory.md)."""

    weights: Count  # all versions
    gradients: Count
    optimizer: Count
    stash: Count  # all microbatches in flight
    buffers: Count  # receive and send buffers, and the model's own buffers
    transient: Count  # what else is held in that moment
    reserve: Count  # what the framework takes for itself
    total: Count
    limit: Count


class Stage(Data):
    """One position of the pipeline."""

    index: Count
    blocks: tuple[str, ...]
    modules: tuple[str, ...]  # module paths, for people
    parameters: Count  # elements
    tied: tuple[str, ...]
    recompute: bool
    random: tuple[Count, ...]  # which of the program's random operator calls run here
    flops_forward: Count
    flops_backward: Count
    compute_s: Seconds
    memory: Memory
    inputs: tuple[str, ...]  # program inputs that the stage reads
    arguments: tuple[str, ...]  # parameters of Stage.forward: inputs, then received tensors
    results: tuple[str, ...]  # what it returns: tensors to send, then the loss on its stage
    receives: tuple[TransferSpec, ...]
    sends: tuple[TransferSpec, ...]
    devices: tuple[Count, ...]  # rank of each replica


class Optimality(Data):
    """The proof. Objective and bound are samples per second; gap = bound / objective - 1."""

    status: Literal["optimal", "feasible"]
    objective: Number
    bound: Number
    gap: Number
    search_space: str


class Plan(Data):
    """A placement with its numbers, proof and provenance; byte-identical for the same input."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    p2bw_version: str
    torch_version: str
    model: ModelSource
    topology: dict[str, Any]  # as solved; compiler/topology.py gives its meaning
    schedule: Schedule
    depth: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    microbatch: Annotated[int, Field(ge=1)]
    microbatches_per_update: Annotated[int, Field(ge=1)]
    extra_in_flight: Annotated[int, Field(ge=0)]  # microbatches that are taken on early
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of a whole batch's gradients
    constraints: tuple[str, ...] = ()  # what the user decided: "pin wte=0", "cut-after h.11"
    period_s: Number  # between two microbatches leaving one pipeline, steady state
    samples_per_s: Number  # all replicas
    utilisation: Number
    bytes_per_sample: Number  # sent over all links
    optimality: Optimality
    inputs: tuple[TensorSpec, ...]  # of the program: the model's inputs, then the loss's targets
    tied: tuple[TiedSpec, ...]
    stages: tuple[Stage, ...]
    # Left out of the file if there are none:
    opaque: tuple[OpaqueSpec, ...] = ()
    notes: tuple[str, ...] = ()  # what else the user should know of the model's trace

    def to_data(self) -> dict[str, Any]:
        """The contents of plan.json."""
        left_out = {name for name in ("constraints", "opaque", "notes") if not getattr(self, name)}
        return self.model_dump(mode="json", by_alias=True, exclude=left_out)

    def for_runtime(self) -> "contract.Plan":
        """What the runtime, and the schedules that it performs, know of it."""
        from p2bw.contract.plan import plan_from  # it needs torch, which plans do not

        return plan_from(self.model_dump(mode="json", by_alias=True))

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_plan(artifact: Path) -> Plan:
    """The plan of an artifact folder; InputFileError names the field that is not valid."""
    path = artifact / "plan.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputFileError(f"{artifact} is no artifact: {error.strerror} ({path.name})") from None
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise InputFileError(f"{path}: {wrong_field(error, 'the file')}") from None
