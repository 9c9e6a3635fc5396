"""What the runtime needs of an artifact's plan.json, read with the standard library alone.

The compiler writes plan.json and knows the whole schema; this reader takes the fields that decide
what runs where, and refuses a file in which they are missing or contradict each other.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from p2bw.runtime.errors import InputFileError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor of one microbatch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def fits(self, tensor: torch.Tensor) -> bool:
        return tuple(tensor.shape) == self.shape and tensor.dtype == self.dtype

    def __str__(self) -> str:
        return describe(self.shape, self.dtype)


def describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """float32[8, 64]."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor that travels between this stage and `peer`, each microbatch."""

    spec: TensorSpec
    peer: int
    gradient: bool  # its gradient travels back


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
        sent = {transfer.spec.name for transfer in self.sends}
        return next((name for name in self.results if name not in sent), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which stage each rank runs, and what travels between them."""

    model_file: str
    factory: str
    settings: Mapping[str, str | int | float | bool | None]
    model_sha256: str
    sha256: str  # of plan.json itself
    schedule: str
    depth: int
    width: int
    microbatch: int
    microbatches_per_update: int
    utilisation: float
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


def read_plan(artifact: Path) -> Plan:
    """The plan of an artifact folder; InputFileError names what is wrong with it."""
    path = artifact / "plan.json"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputFileError(f"{artifact} is no artifact: {error.strerror} ({path.name})") from None
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise InputFileError(f"{path} is not JSON: {error}") from None
    try:
        plan = _plan(_Fields(data, ""), hashlib.sha256(raw).hexdigest())
        _check(plan)
    except _BadField as error:
        raise InputFileError(f"{path}: {error}; compile the model anew") from None
    return plan


class _BadField(Exception):
    pass


class _Fields:
    """Typed access to a JSON object; what is missing or of another type is named by its path."""

    def __init__(self, data: Any, path: str) -> None:
        if not isinstance(data, dict):
            raise _BadField(f"{path.rstrip('.') or 'the file'} is no JSON object")
        self.data = data
        self.path = path

    def get(self, key: str, kind: type[T]) -> T:
        value = self.data.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:  # exactly: True is no count
            raise _BadField(f"{self.path}{key} should be of type {kind.__name__}, is {value!r}")
        return value

    def count(self, key: str, least: int = 0) -> int:
        value = self.get(key, int)
        if value < least:
            raise _BadField(f"{self.path}{key} is {value}, less than {least}")
        return value

    def many(self, key: str, kind: type[T]) -> tuple[T, ...]:
        items: list[Any] = self.get(key, list)
        for index, item in enumerate(items):
            if type(item) is not kind or (isinstance(item, int) and item < 0):
                raise _BadField(f"{self.path}{key}.{index} is {item!r}")
        return tuple(items)

    def objects(self, key: str) -> list["_Fields"]:
        items = self.get(key, list)
        return [_Fields(item, f"{self.path}{key}.{i}.") for i, item in enumerate(items)]


def _plan(fields: _Fields, sha256: str) -> Plan:
    if fields.get("schema", int) != 1:
        raise _BadField(f"schema {fields.data['schema']} is not 1, the one that this version reads")
    model = _Fields(fields.get("model", dict), "model.")
    return Plan(
        model_file=model.get("file", str),
        factory=model.get("factory", str),
        settings=MappingProxyType(model.get("settings", dict)),
        model_sha256=model.get("sha256", str),
        sha256=sha256,
        schedule=fields.get("schedule", str),
        depth=fields.count("depth", 1),
        width=fields.count("width", 1),
        microbatch=fields.count("microbatch", 1),
        microbatches_per_update=fields.count("microbatches_per_update", 1),
        utilisation=fields.get("utilisation", float),
        inputs=tuple(_tensor(f, "name") for f in fields.objects("inputs")),
        tied=tuple(
            Tied(f.many("names", str), f.many("stages", int)) for f in fields.objects("tied")
        ),
        stages=tuple(_stage(f) for f in fields.objects("stages")),
    )


def _stage(fields: _Fields) -> Stage:
    return Stage(
        index=fields.count("index"),
        recompute=fields.get("recompute", bool),
        inputs=fields.many("inputs", str),
        arguments=fields.many("arguments", str),
        results=fields.many("results", str),
        receives=tuple(_transfer(f) for f in fields.objects("receives")),
        sends=tuple(_transfer(f) for f in fields.objects("sends")),
        devices=fields.many("devices", int),
    )


def _transfer(fields: _Fields) -> Transfer:
    return Transfer(_tensor(fields, "tensor"), fields.count("peer"), fields.get("gradient", bool))


def _tensor(fields: _Fields, name: str) -> TensorSpec:
    dtype = getattr(torch, fields.get("dtype", str), None)
    if not isinstance(dtype, torch.dtype):
        raise _BadField(f"{fields.path}dtype {fields.data['dtype']!r} is no dtype of torch")
    return TensorSpec(fields.get(name, str), fields.many("shape", int), dtype)


def _check(plan: Plan) -> None:
    """Refuse a plan whose parts contradict each other: it would hang or abort the ranks."""
    if [stage.index for stage in plan.stages] != list(range(plan.depth)):
        raise _BadField(f"stages are not 0 to {plan.depth - 1}, one each")
    if any(len(stage.devices) != plan.width for stage in plan.stages):
        raise _BadField(f"not every stage has {plan.width} devices")
    if sorted(rank for s in plan.stages for rank in s.devices) != list(range(plan.ranks)):
        raise _BadField(f"devices are not the ranks 0 to {plan.ranks - 1}, one each")
    if [stage.loss is not None for stage in plan.stages].count(True) != 1:
        raise _BadField("not exactly one stage returns the loss")
    sent = {(s.index, t.peer, t.spec, t.gradient) for s in plan.stages for t in s.sends}
    received = {(t.peer, s.index, t.spec, t.gradient) for s in plan.stages for t in s.receives}
    for producer, consumer, spec, _ in sorted(sent ^ received, key=lambda edge: edge[:2]):
        raise _BadField(
            f"{spec.name} is not sent by stage {producer} as stage {consumer} receives it"
        )
    for producer, consumer, spec, _ in sent:
        if not producer < consumer < plan.depth:
            raise _BadField(f"{spec.name} goes from stage {producer} to stage {consumer}")
    inputs = {spec.name for spec in plan.inputs}
    for stage in plan.stages:
        received_names = tuple(transfer.spec.name for transfer in stage.receives)
        if stage.arguments != (*stage.inputs, *received_names) or not inputs.issuperset(
            stage.inputs
        ):
            raise _BadField(f"stages.{stage.index}.arguments are not its inputs and receives")
        if missing := {t.spec.name for t in stage.sends} - set(stage.results):
            raise _BadField(f"stages.{stage.index}.results lack {', '.join(sorted(missing))}")
