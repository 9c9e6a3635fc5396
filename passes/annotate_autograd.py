"""annotate_autograd: what autograd does with each node, found by running it on fake tensors."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.program import OpaqueCall, Program, Saved, TensorType, tensor_arguments
from p2bw.passes.execute import (
    Call,
    TensorMeta,
    argument_positions,
    describe_call,
    flatten_tensors,
    invoke,
    make_inputs,
    plain_argument,
    storage_of,
    tensor_index,
)
from p2bw.passes.kernels import Workspaces, kernels_of, replaced

_NOT_DIFFERENTIABLE_VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.detach_.default)


@dataclass(slots=True)
class _Value:
    """A tensor of the program: its metadata by now, and all differentiable views of its base."""

    meta: TensorMeta
    views: list["_Value"] = field(default_factory=list)  # itself included

    @staticmethod
    def fresh(meta: TensorMeta) -> "_Value":
        value = _Value(meta)
        value.views.append(value)
        return value


@dataclass(frozen=True, slots=True)
class _Result:
    """What a node of the program gives, and the facts about it."""

    values: tuple[_Value, ...]
    structure: Any  # nested tuples of positions in `values`
    alias: tuple[int | None, ...]
    mutates: tuple[int, ...] = ()
    saved: tuple[Saved, ...] = ()
    random_calls: int = 0

    @property
    def tensor(self) -> _Value:
        assert self.structure == 0, "several tensors are used as if they were one"
        return self.values[0]


@dataclass(frozen=True, slots=True)
class _Output:
    meta: TensorMeta
    alias: int | None


@dataclass(frozen=True, slots=True)
class _Observation:
    """What one run of a node showed."""

    outputs: tuple[_Output, ...]
    structure: Any  # of the result: nested tuples of positions in `outputs`
    saved: tuple[Saved, ...]
    random_calls: int


def annotate_autograd(program: Program, *, on_gpu: bool = False) -> Program:
    """Find out per node: gradients, aliases, writes in place, saved tensors, random operators.

    Saved is what a GPU's kernels save, or a CPU's; all else is as the program runs on the CPU.
    """
    results: dict[str, _Result] = {}
    observed = _Observed(on_gpu)
    with FakeTensorMode():
        for node in program.graph.nodes:
            if node.op == "call_function":
                results[node.name] = _call(program, node, results, observed)
            elif node.op != "output":
                value = _Value.fresh(_given(program, node))
                results[node.name] = _Result((value,), 0, (None,))
    return program.learn(
        "annotate_autograd",
        # The trace's own shapes of a recurrent layer's states are wrong in some versions of torch.
        out={
            n: tuple(TensorType(v.meta.shape, v.meta.dtype) for v in r.values)
            for n, r in results.items()
        },
        strides={n: tuple(v.meta.stride for v in r.values) for n, r in results.items()},
        # Only now: a write in place can make a tensor need a gradient after it was made.
        requires_grad={
            n: tuple(v.meta.requires_grad for v in r.values) for n, r in results.items()
        },
        alias={n: r.alias for n, r in results.items()},
        mutates={n: r.mutates for n, r in results.items()},
        saved={n: r.saved for n, r in results.items()},
        random_calls={n: r.random_calls for n, r in results.items()},
    )


def _call(
    program: Program,
    node: fx.Node,
    results: dict[str, _Result],
    observed: "_Observed",
) -> _Result:
    arguments = tensor_arguments(node)
    if node.target is getitem and not isinstance(results[arguments[0].name].structure, int):
        return _pick(results[arguments[0].name], node.args[1])
    inputs = tuple(results[argument.name].tensor for argument in arguments)
    opaque = program.opaque.get(node.name)
    saw = _observed(opaque) if opaque else _observe(program, node, inputs, observed)
    values = tuple(_link(node, output, inputs) for output in saw.outputs)
    mutates = opaque.mutates if opaque else _mutates(node)
    for value, output in zip(values, saw.outputs, strict=True):
        if output.alias in mutates and value.meta.requires_grad:
            # What is written in place with something that needs a gradient needs one from now on,
            # and so does each view of the same base.
            for view in value.views:
                view.meta = replace(view.meta, requires_grad=True)
    alias = tuple(output.alias for output in saw.outputs)
    return _Result(values, saw.structure, alias, mutates, saw.saved, saw.random_calls)


def _observed(call: OpaqueCall) -> _Observation:
    """What the run of an opaque call showed; its random numbers are its own affair."""
    outputs = zip(call.outputs, call.strides, call.requires_grad, call.alias, strict=True)
    return _Observation(
        outputs=tuple(
            _Output(
                TensorMeta(
                    shape=kind.shape,
                    stride=stride,
                    dtype=kind.dtype,
                    requires_grad=gradient,
                    storage_bytes=kind.bytes,
                ),
                alias,
            )
            for kind, stride, gradient, alias in outputs
        ),
        structure=tuple(range(len(call.outputs))),
        saved=call.saved,
        random_calls=0,
    )


def _given(program: Program, node: fx.Node) -> TensorMeta:
    """Metadata of a program input, parameter, buffer or constant."""
    (kind,) = program.facts[node.name].out
    stride = _contiguous_stride(kind)
    trainable = False
    if node.op == "get_attr":
        if str(node.target) in program.constants:
            stride = program.constants[str(node.target)].stride()
        else:
            trainable = program.attribute(node).trainable
    return TensorMeta(
        shape=kind.shape,
        stride=stride,
        dtype=kind.dtype,
        requires_grad=trainable,
        storage_bytes=kind.bytes,
    )


def _contiguous_stride(kind: TensorType) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(kind.shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _pick(producer: _Result, index: Any) -> _Result:
    """The part of a producer's outputs that a getitem node selects."""
    found: list[_Value] = []

    def renumber(item: Any) -> Any:
        if isinstance(item, tuple):
            return tuple(map(renumber, item))
        if item is None:
            return None
        found.append(producer.values[item])
        return len(found) - 1

    structure = renumber(producer.structure[index])
    return _Result(tuple(found), structure, (0,) * len(found))


def _observe(
    program: Program,
    node: fx.Node,
    inputs: tuple[_Value, ...],
    observed: "_Observed",
) -> _Observation:
    metas = tuple(value.meta for value in inputs)
    call = describe_call(node, metas, program.facts[node.name].context)
    if call not in observed:
        with program.entering(node):
            observed[call] = _run(node, call, observed.on_gpu)
    return observed[call]


class _Observed(dict[Call, _Observation]):
    """Every call that has been run, for one kind of device."""

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu


class _CountRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that draw from the random number generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _run(node: fx.Node, call: Call, on_gpu: bool) -> _Observation:
    with without_onednn(), _CountRandom() as random:
        tensors, result, kept = _invoke(node, call)
    results = list(flatten_tensors(result))
    owner = {storage_of(tensor): index for index, tensor in reversed(list(enumerate(tensors)))}
    outputs = tuple(_Output(_meta(tensor), owner.get(storage_of(tensor))) for tensor in results)
    saved = tuple(classify_saved(kept, tensors, results))
    with kernels_of(on_gpu), Workspaces():  # type: ignore[no-untyped-call]
        if replaced(node.target, on_gpu):
            tensors, again, kept = _invoke(node, call)
            saved = tuple(classify_saved(kept, tensors, [*flatten_tensors(again)]))
    return _Observation(
        outputs=outputs,
        structure=tensor_index(result, lambda item: isinstance(item, Tensor)),
        saved=saved,
        random_calls=random.calls,
    )


def _invoke(node: fx.Node, call: Call) -> tuple[tuple[Tensor, ...], Any, list[Tensor]]:
    """A node's arguments, its result, and what autograd saves."""
    tensors = make_inputs(call, "cpu").tensors
    for tensor, meta in zip(tensors, call.tensors, strict=True):
        tensor.untyped_storage().resize_(meta.storage_bytes)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        return tensors, invoke(node, tensors, "cpu"), kept


@contextmanager
def without_onednn() -> Iterator[None]:
    """Without oneDNN, whose recurrent layers keep a workspace that has no size on fake tensors."""
    flags: Any = torch.backends.mkldnn
    enabled = flags.enabled
    flags.enabled = False
    try:
        yield
    finally:
        flags.enabled = enabled


def _meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        dtype=tensor.dtype,
        requires_grad=tensor.requires_grad,
        storage_bytes=tensor.untyped_storage().nbytes(),
    )


def classify_saved(
    kept: list[Tensor], inputs: tuple[Tensor, ...], outputs: list[Tensor]
) -> Iterator[Saved]:
    """One Saved per storage; a storage that is both an input's and an output's is an input."""
    owner: dict[int, tuple[str, int]] = {}
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for index, tensor in enumerate(tensors):
            owner.setdefault(storage_of(tensor), (kind, index))
    seen: Counter[int] = Counter()
    fresh = 0
    for tensor in kept:
        storage = storage_of(tensor)
        seen[storage] += 1
        if seen[storage] > 1:
            continue
        if storage in owner:
            kind, index = owner[storage]
        else:
            kind, index = "fresh", fresh
            fresh += 1
        yield Saved(kind, index, tensor.untyped_storage().nbytes())


def _link(node: fx.Node, output: _Output, inputs: tuple[_Value, ...]) -> _Value:
    if output.alias is None or node.target in _NOT_DIFFERENTIABLE_VIEWS:
        return _Value.fresh(output.meta)
    views = inputs[output.alias].views
    views.append(_Value(output.meta, views))
    return views[-1]


def _mutates(node: fx.Node) -> tuple[int, ...]:
    """Tensor arguments that the operator's schema, or training a normalisation, writes."""
    # The composite normalisations do not declare that training updates their running statistics.
    trains = plain_argument(node, ("training", "train", "use_input_stats")) is True
    return argument_positions(
        node,
        lambda name, argument: (
            (argument.alias_info is not None and argument.alias_info.is_write)
            or (trains and name in ("running_mean", "running_var"))
        ),
    )
