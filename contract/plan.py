"""What the runtime needs of an artifact's plan.json, read with the standard library alone.

The compiler writes plan.json and knows the whole schema; here are the fields that decide what runs
where, under the same names. A file in which they are missing or contradict each other is refused.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from p2bw.contract.errors import InputFileError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor of one microbatch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def fits(self, tensor: torch.Tensor) -> bool:
        return tensor.shape == self.shape and tensor.dtype == self.dtype

    def __str__(self) -> str:
        return describe(self.shape, self.dtype)


def describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """float32[8, 64]."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A tensor that travels between this stage and `peer`, each microbatch."""

    tensor: str
    peer: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    gradient: bool  # its gradient travels back

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.tensor, self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class Tied:
    """One parameter of the model under all of its names, and the stages that hold it."""

    names: tuple[str, ...]
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One position of the pipeline: `Stage.forward(*arguments)` returns `results`."""

    index: int
    recompute: bool
    inputs: tuple[str, ...]  # program inputs, the first of the arguments
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    devices: tuple[int, ...]  # rank of each replica

    @property
    def loss(self) -> str | None:
        """The result that nobody is sent: the loss, on the stage that computes it."""
        sent = {transfer.tensor for transfer in self.sends}
        return next((name for name in self.results if name not in sent), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model file that was compiled, and how its model is made."""

    file: str
    factory: str
    settings: Mapping[str, str | int | float | bool | None]
    autocast: str | None  # dtype of the region that the model was compiled under
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which stage each rank runs, and what travels between them."""

    schema: int
    model: Model
    schedule: str
    depth: int
    width: int
    microbatch: int
    microbatches_per_update: int
    extra_in_flight: int  # microbatches that all stages but the last may take on early
    clip_norm: float | None
    inputs: tuple[TensorSpec, ...]
    tied: tuple[Tied, ...]
    stages: tuple[Stage, ...]

    @property
    def ranks(self) -> int:
        return self.depth * self.width

    @property
    def loss_stage(self) -> int:
        return next(stage.index for stage in self.stages if stage.loss is not None)

    def position(self, rank: int) -> tuple[int, int]:
        """Stage and replica of a rank."""
        return next((s.index, s.devices.index(rank)) for s in self.stages if rank in s.devices)


class BadValueError(Exception):
    """What is wrong with a value that a file holds."""


def read_plan(artifact: Path) -> Plan:
    """The plan of an artifact folder; InputFileError names what is wrong with it."""
    path = artifact / "plan.json"
    try:
        return plan_from(json.loads(path.read_bytes()))
    except OSError as error:
        raise InputFileError(f"{artifact} is no artifact: {error.strerror} ({path.name})") from None
    except BadValueError as error:
        raise InputFileError(f"{path}: {error}; compile the model anew") from None
    except ValueError as error:
        raise InputFileError(f"{path} is not JSON: {error}; compile the model anew") from None


def plan_from(value: Any) -> Plan:
    """A plan from the contents of plan.json."""
    plan: Plan = read_value(Plan, value, "")
    for problem in _contradictions(plan):
        raise BadValueError(problem)
    return plan


def read_value(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a field of type `kind`; all integers of a plan are counts."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        return kind(
            **{
                n: read_value(hint, value.get(n), f"{where}.{n}".lstrip("."))
                for n, hint in hints.items()
            }
        )
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(
            read_value(get_args(kind)[0], item, f"{where}.{i}") for i, item in enumerate(value)
        )
    if kind is torch.dtype and isinstance(value, str):
        value = getattr(torch, value, value)
    wanted = kind if isinstance(kind, UnionType) else get_origin(kind) or kind
    fits = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    if not fits or (wanted is int and value < 0):
        wants = getattr(wanted, "__name__", wanted)
        raise BadValueError(f"{where or 'the file'} should be {wants}, is {value!r:.40}")
    return value


def _contradictions(plan: Plan) -> Iterator[str]:
    """What would hang the ranks or abort them."""
    if plan.schema != 1:
        yield f"schema {plan.schema} is not 1, the one that this version reads"
    if not plan.depth or [stage.index for stage in plan.stages] != list(range(plan.depth)):
        yield f"stages are not 0 to {plan.depth - 1}, one each"
    if any(len(stage.devices) != plan.width for stage in plan.stages):
        yield f"not every stage has {plan.width} devices"
    if sorted(rank for s in plan.stages for rank in s.devices) != list(range(plan.ranks)):
        yield f"devices are not the ranks 0 to {plan.ranks - 1}, one each"
    if [stage.loss is not None for stage in plan.stages].count(True) != 1:
        yield "not exactly one stage returns the loss"
    if plan.clip_norm is not None and not plan.clip_norm > 0:
        yield f"clip_norm {plan.clip_norm} is not above 0"
    sent = {(s.index, t.peer, t.spec, t.gradient) for s in plan.stages for t in s.sends}
    received = {(t.peer, s.index, t.spec, t.gradient) for s in plan.stages for t in s.receives}
    for source, target, spec, _ in sorted(sent ^ received, key=lambda edge: edge[:2]):
        yield f"{spec.name}: what stage {source} sends is not what stage {target} receives"
    for source, target, spec, _ in sent:
        if not source < target < plan.depth:
            yield f"{spec.name} goes from stage {source} to stage {target}"
    inputs = {spec.name for spec in plan.inputs}
    for stage in plan.stages:
        if not inputs.issuperset(stage.inputs):
            yield f"stages.{stage.index}.inputs are not all among the program's"
        yield from _stage_contradictions(stage)


def _stage_contradictions(stage: Stage) -> Iterator[str]:
    """What a stage receives and sends, against what its code takes and returns."""
    where = f"stages.{stage.index}"
    receives = {transfer.tensor: transfer for transfer in stage.receives}
    if len(receives) < len(stage.receives):
        yield f"{where} receives one tensor from two stages"
    if stage.arguments != (*stage.inputs, *receives):
        yield f"{where}.arguments are not its inputs and receives"
    for sent in stage.sends:
        came = receives.get(sent.tensor, sent)
        if (came.spec, came.gradient) != (sent.spec, sent.gradient):
            yield f"{where} passes {sent.tensor} on, but with another shape, dtype or gradient"
    if missing := {t.tensor for t in stage.sends} - set(stage.results):
        yield f"{where}.results lack {', '.join(sorted(missing))}"
