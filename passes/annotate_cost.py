"""annotate_cost: floating-point operations and memory traffic of each node, forward and backward.

FLOPs are counted on meta tensors: on CPU tensors, real or fake, torch's counter misses attention.
"""

from collections.abc import Iterable
from dataclasses import replace
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from p2bw.compiler.program import Program, Work, tensor_arguments
from p2bw.compiler.storage import picked_output
from p2bw.passes.execute import (
    Call,
    TensorMeta,
    describe_call,
    flatten_tensors,
    invoke,
    make_inputs,
    plain_argument,
)

_aten = torch.ops.aten
# These read only the rows that they return, however large the table.
_LOOKUPS = frozenset(
    (
        _aten.embedding.default,
        _aten.index.Tensor,
        _aten.index_select.default,
        _aten.gather.default,
    )
)
# An input sequence (not a packed one), step by step.
_RECURRENT = frozenset(
    (_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)
)


class _Cost(NamedTuple):
    flops_forward: int = 0
    flops_backward: int = 0
    traffic_forward: int = 0
    traffic_backward: int = 0


def annotate_cost(program: Program) -> Program:
    """Count FLOPs, and bytes read and written, of one microbatch's forward and backward."""
    needed = _needed_outputs(program)
    measured: dict[tuple[Call, tuple[bool, ...]], tuple[int, int, int]] = {}
    costs: dict[str, _Cost] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is getitem:
            costs[node.name] = _Cost()
            continue
        if opaque := program.opaque.get(node.name):
            there, back = opaque.forward, opaque.backward if any(needed[node.name]) else Work()
            costs[node.name] = _Cost(there.flops, back.flops, there.traffic, back.traffic)
            continue
        key = (_call(program, node), needed[node.name])
        if key not in measured:
            with program.entering(node):
                measured[key] = _measure_steps(node, *key)
        forward, backward, moved = measured[key]
        traffic = _traffic(program, node, needed[node.name], moved)
        costs[node.name] = _Cost(forward, backward, *traffic)
    columns = {
        fact: {name: cost[i] for name, cost in costs.items()}
        for i, fact in enumerate(_Cost._fields)
    }
    return program.learn("annotate_cost", **columns)


def _needed_outputs(program: Program) -> dict[str, tuple[bool, ...]]:
    """Per node and tensor output: does the backward from the loss pass through it?"""
    needed: dict[str, list[bool]] = {
        name: [False] * len(facts.out) for name, facts in program.facts.items()
    }
    needed[program.loss.name] = [True]
    for node in reversed(program.graph.nodes):
        if node.op != "call_function":
            continue
        grads = program.fact(node, "requires_grad")
        if program.fact(node, "mutates"):  # seen by later readers of what it writes
            needed[node.name] = [True] * len(grads)
        needed[node.name] = [n and g for n, g in zip(needed[node.name], grads, strict=True)]
        if not any(needed[node.name]):
            continue
        for argument in tensor_arguments(node):
            needed[argument.name][picked_output(program, node, argument)] = True
    return {name: tuple(outputs) for name, outputs in needed.items()}


def _call(program: Program, node: fx.Node) -> Call:
    metas = []
    for argument in tensor_arguments(node):
        (kind,) = program.facts[argument.name].out
        metas.append(
            TensorMeta(
                shape=kind.shape,
                stride=program.fact(argument, "strides")[0],
                dtype=kind.dtype,
                requires_grad=program.fact(argument, "requires_grad")[0],
                storage_bytes=0,
            )
        )
    return describe_call(node, tuple(metas), program.facts[node.name].context)


def _measure_steps(node: fx.Node, call: Call, needed: tuple[bool, ...]) -> tuple[int, int, int]:
    """As `_measure`; of a long sequence through a recurrent layer, by its first few steps."""
    # Each step does the same, so counts grow by a constant from step to step.
    if node.target not in _RECURRENT:
        return _measure(node, call, needed)
    axis = 1 if plain_argument(node, ("batch_first",)) else 0
    first, *others = call.tensors
    steps = first.shape[axis]
    if steps <= 3 or len(first.shape) < 3:
        return _measure(node, call, needed)

    def shortened(length: int) -> tuple[int, int, int]:
        shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
        tensors = (replace(first, shape=shape), *others)
        return _measure(node, replace(call, tensors=tensors), needed)

    two, three = shortened(2), shortened(3)
    forward, backward, moved = (a + (steps - 2) * (b - a) for a, b in zip(two, three, strict=True))
    return forward, backward, moved


def _measure(node: fx.Node, call: Call, needed: tuple[bool, ...]) -> tuple[int, int, int]:
    """FLOPs forward, FLOPs backward, and bytes that the backward's operators move."""
    inputs = make_inputs(call, "meta")
    counter = FlopCounterMode(display=False)
    traffic = CountTraffic()
    with counter:
        outputs = list(flatten_tensors(invoke(node, inputs.tensors, "meta")))
        forward = counter.get_total_flops()
        ends = [
            out for out, need in zip(outputs, needed, strict=True) if need and out.requires_grad
        ]
        gradients = [torch.empty_like(end) for end in ends]
        if ends and inputs.leaves:
            with traffic:
                torch.autograd.grad(ends, inputs.leaves, gradients, allow_unused=True)
    return forward, counter.get_total_flops() - forward, traffic.bytes


class CountTraffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that operators read and write, and counts the operators; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.kernels += 1
            self.bytes += sum(map(_tensor_bytes, flatten_tensors((args, result))))
        return result


def _tensor_bytes(tensor: Tensor) -> int:
    return _extent(tuple(tensor.shape), tensor.stride()) * tensor.dtype.itemsize


def _extent(shape: Iterable[int], stride: Iterable[int]) -> int:
    """Elements in memory: an expanded dimension repeats the same ones."""
    count = 1
    for size, step in zip(shape, stride, strict=True):
        count *= size if step or not size else 1
    return count


def _traffic(
    program: Program, node: fx.Node, needed: tuple[bool, ...], moved_backward: int
) -> tuple[int, int]:
    """Bytes moved forward and backward, each tensor once: what a good fused kernel moves."""
    every = tensor_arguments(node)
    arguments = tuple(dict.fromkeys(every))
    outputs = [_bytes(program, node, i) for i in range(len(needed))]
    alias, mutates = program.fact(node, "alias"), program.fact(node, "mutates")
    if not mutates and all(source is not None for source in alias):
        # A view moves nothing forward; backward it may pad (slice) or sum (expand).
        return 0, moved_backward
    written = sum(size for size, source in zip(outputs, alias, strict=True) if source is None)
    written += sum(_bytes(program, every[index]) for index in mutates)
    if node.target in _LOOKUPS:
        read = written + sum(_bytes(program, argument) for argument in arguments[1:])
    else:
        read = sum(_bytes(program, argument) for argument in arguments)
    if not any(needed):
        return read + written, 0
    given = sum(size for size, need in zip(outputs, needed, strict=True) if need)
    kept = sum(
        # Of a view, the storage is kept but only the view is read.
        min(saved.bytes, _bytes(program, every[saved.index]))
        if saved.kind == "input"
        else saved.bytes
        for saved in program.fact(node, "saved")
    )
    made = sum(_bytes(program, a) for a in arguments if program.fact(a, "requires_grad")[0])
    return read + written, given + kept + made


def _bytes(program: Program, node: fx.Node, output: int = 0) -> int:
    kind = program.facts[node.name].out[output]
    return _extent(kind.shape, program.fact(node, "strides")[output]) * kind.dtype.itemsize
