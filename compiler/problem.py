"""PlacementProblem: what the placement has to know of a model, as plain numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from p2bw.compiler.plan import Count, Data, Number, Schedule, wrong_field
from p2bw.compiler.topology import Topology, check_topology
from p2bw.contract.errors import InputFileError, UsageError

Positive = Annotated[int, Field(ge=1)]

PROBLEM = "problem.json"  # in an artifact: what was solved, at the microbatch that was chosen


class Times(Data):
    """Seconds of one microbatch."""

    forward_s: Number
    backward_s: Number


class BlockCost(Data):
    """An indivisible part of the model: what one microbatch costs in it.

    `forward_s` and `backward_s` are those of `topology.device`; `on` has those of the topology's
    other kinds of device, by their names.
    """

    name: str
    forward_s: Number
    backward_s: Number
    on: Mapping[str, Times] = Field(default_factory=dict)
    stash_bytes: Count = 0  # storages made here that autograd keeps for the backward
    transient_bytes: Count = 0  # the most that one forward or backward holds besides
    buffer_bytes: Count = 0  # the model's own buffers and constants


class ParameterCost(Data):
    """A parameter, in every stage that holds one of `blocks` (several blocks: it is tied).

    A stage that holds it pays its weights (times the versions), gradient, optimizer state and
    one optimizer step; where several stages do, they exchange its gradient once per update.
    Without a gradient it never changes, and a stage has it once.
    """

    name: str
    bytes: Count
    gradient_bytes: Count
    optimizer_bytes: Count
    update_s: Number = 0.0  # one optimizer step
    on: Mapping[str, Number] = Field(default_factory=dict)  # that on other kinds of device
    blocks: Annotated[tuple[str, ...], Field(min_length=1)]


class TensorCost(Data):
    """A tensor from one block to others; it is sent to every other stage that reads it."""

    name: str
    producer: str
    consumers: Annotated[tuple[str, ...], Field(min_length=1)]
    bytes: Count
    gradient_bytes: Count  # of its gradient on the way back; 0: it has none
    saved: bool  # a stage that receives it keeps it for its backward
    # Its gradient has three terms or more: relayed where that costs no time, since then the stages
    # add them one by one from the last, as eager PyTorch does, and the sum is the same to the bit.
    ordered: bool = False


class Constraints(Data):
    """What the user decided: names of blocks and tensors."""

    pin: Mapping[str, Count] = Field(default_factory=dict)  # block -> stage
    together: tuple[tuple[str, ...], ...] = ()  # blocks of one stage
    apart: tuple[tuple[str, str], ...] = ()  # blocks of different stages
    never_cut: tuple[str, ...] = ()  # tensors that stay inside a stage
    max_stages: Positive | None = None


class PlacementProblem(Data):
    """One model at one microbatch size, on one topology, under one schedule."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    microbatch: Positive
    schedule: Schedule = "2bw"
    microbatches: Positive | None = None  # per update; None: as many as there are stages
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # of a whole batch's gradients
    blocks: Annotated[tuple[BlockCost, ...], Field(min_length=1)]
    parameters: tuple[ParameterCost, ...] = ()
    tensors: tuple[TensorCost, ...] = ()
    topology: Topology
    constraints: Constraints = Constraints()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = {block.name for block in self.blocks}
        for kind, items in (
            ("block", self.blocks),
            ("parameter", self.parameters),
            ("tensor", self.tensors),
        ):
            if len({item.name for item in items}) < len(items):
                raise ValueError(f"two entries of one {kind} name")
        for where, name in self._references():
            if name not in names:
                raise ValueError(f"{where} names no block: {name!r}")
        for tensor in self.constraints.never_cut:
            if tensor not in {t.name for t in self.tensors}:
                raise ValueError(f"constraints.never_cut names no tensor: {tensor!r}")
        self._check_kinds()
        try:
            TopologicalSorter(self._edges()).prepare()
        except CycleError as error:
            raise ValueError(f"blocks depend on each other: {' <- '.join(error.args[1])}") from None
        return self

    def _check_kinds(self) -> None:
        check_topology(self.topology)
        others = {device.name for device in self.topology.kinds[1:]}
        timed: list[tuple[str, Iterable[str]]] = [(b.name, b.on) for b in self.blocks]
        timed += [(p.name, p.on) for p in self.parameters if p.update_s or p.on]
        for name, on in timed:
            if others - set(on):
                raise ValueError(f"{name!r} has no times on {min(others - set(on))}: add to `on`")
            if set(on) - others:
                raise ValueError(f"{name!r} has times on {min(set(on) - others)}: no device is one")

    def _references(self) -> Iterator[tuple[str, str]]:
        for parameter in self.parameters:
            for name in parameter.blocks:
                yield f"parameter {parameter.name!r}", name
        for tensor in self.tensors:
            for name in (tensor.producer, *tensor.consumers):
                yield f"tensor {tensor.name!r}", name
        for name in self.constraints.pin:
            yield "constraints.pin", name
        for group in (*self.constraints.together, *self.constraints.apart):
            for name in group:
                yield "constraints", name

    def _edges(self) -> dict[str, set[str]]:
        edges: dict[str, set[str]] = {}
        for tensor in self.tensors:
            for consumer in tensor.consumers:
                if consumer != tensor.producer:
                    edges.setdefault(consumer, set()).add(tensor.producer)
        return edges

    def microbatches_at(self, depth: int) -> int:
        """Microbatches per update of a pipeline of so many stages."""
        return self.microbatches or depth

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def read_problem(path: Path) -> PlacementProblem:
    """A problem from a JSON file; InputFileError names the field that is not valid."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        return PlacementProblem.model_validate_json(text)
    except ValidationError as error:
        raise InputFileError(f"{path}: {wrong_field(error, 'the problem')}") from None


def problem_of(artifact: Path) -> PlacementProblem:
    """What was solved for an artifact's plan."""
    if not (artifact / PROBLEM).is_file():
        raise InputFileError(f"{artifact} has no {PROBLEM}; compile the model again")
    return read_problem(artifact / PROBLEM)


def interpolate(
    first: PlacementProblem, second: PlacementProblem, microbatch: int
) -> PlacementProblem:
    """The problem at another microbatch size, on the straight line through two of one model."""
    if first.microbatch > second.microbatch:
        first, second = second, first
    steps, span = microbatch - first.microbatch, second.microbatch - first.microbatch
    assert span > 0, "two problems of one microbatch size"

    def number(a: float, b: float) -> float:
        return max(0.0, a + (b - a) * steps / span)

    def count(a: int, b: int) -> int:  # bytes round up: the plan promises that they suffice
        return max(0, a - (a - b) * steps // span)

    def mixed(a: Item, b: Item) -> Item:
        changes: dict[str, Any] = {}
        for field, value in a:
            other = getattr(b, field)
            if isinstance(value, float):
                changes[field] = number(value, other)
            elif isinstance(value, int) and not isinstance(value, bool):
                changes[field] = count(value, other)
            elif field == "on":
                changes[field] = {kind: between(value[kind], other[kind]) for kind in value}
            else:
                assert value == other, f"{a} and {b} are not of one model"
        return a.model_copy(update=changes)

    def between(a: Times | float, b: Times | float) -> Times | float:
        if isinstance(a, Times) and isinstance(b, Times):
            return Times(
                forward_s=number(a.forward_s, b.forward_s),
                backward_s=number(a.backward_s, b.backward_s),
            )
        assert not isinstance(a, Times)
        assert not isinstance(b, Times)
        return number(a, b)

    return first.model_copy(
        update={
            "microbatch": microbatch,
            "blocks": _zipped(mixed, first.blocks, second.blocks),
            "parameters": _zipped(mixed, first.parameters, second.parameters),
            "tensors": _zipped(mixed, first.tensors, second.tensors),
        }
    )


Item = TypeVar("Item", BlockCost, ParameterCost, TensorCost)


def _zipped(
    mix: Callable[[Item, Item], Item], first: tuple[Item, ...], second: tuple[Item, ...]
) -> tuple[Item, ...]:
    return tuple(mix(a, b) for a, b in zip(first, second, strict=True))
