"""Run one module of the user's by itself, for real, and see what a call of it gives and costs."""

import keyword
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from p2bw.compiler.program import Saved, Slot, TensorType, Work
from p2bw.modelfile.microbatch import seeded
from p2bw.passes.annotate_autograd import classify_saved
from p2bw.passes.annotate_cost import CountTraffic
from p2bw.passes.execute import storage_of

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


_aten = torch.ops.aten
# The CPU's own kernels of attention, which torch's counter does not know.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_DRAWS = 5  # of values, see _draw
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


class UnfitError(Exception):
    """A module cannot be one opaque call; the text goes on after its path."""


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor that a call is given, without its values."""

    type: TensorType
    stride: tuple[int, ...]
    requires_grad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a call gave; see OpaqueCall."""

    result: Any
    outputs: tuple[TensorType, ...]
    strides: tuple[tuple[int, ...], ...]
    requires_grad: tuple[bool, ...]
    alias: tuple[int | None, ...]
    mutates: tuple[int, ...]
    saved: tuple[Saved, ...]
    forward: Work
    backward: Work


def with_slots(value: Any, what: str) -> tuple[Any, list[Tensor]]:
    """Nested arguments or results with a Slot for each tensor, and the tensors."""
    leaves, spec = tree_flatten(value)
    tensors: list[Tensor] = []
    slots: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            slots.append(Slot(len(tensors)))
            tensors.append(leaf)
        elif isinstance(leaf, _PLAIN):
            slots.append(leaf)
        else:
            kind = type(leaf)
            raise UnfitError(f"{what} a {kind.__module__}.{kind.__qualname__}, which is no tensor")
    return tree_unflatten(slots, spec), tensors


def is_writable(arguments: Any) -> bool:
    """Whether a call can be written as code: lists, tuples and dicts, keywords that are names."""
    args, kwargs = arguments
    names = (name.isidentifier() and not keyword.iskeyword(name) for name in kwargs)
    return all(names) and _is_plain((args, kwargs))


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return isinstance(value, (Slot, *_PLAIN))


def _is_nested(value: Any) -> bool:
    """Whether all of a result can be reached by indices and keys."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_nested, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_nested(v) for key, v in value.items())
    return isinstance(value, (Slot, *_PLAIN))


def filled(value: Any, tensors: list[Tensor]) -> Any:
    """Nested arguments or results with the tensors in their places."""
    leaves, spec = tree_flatten(value)
    filled = [tensors[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in leaves]
    return tree_unflatten(filled, spec)


def state_of(module: nn.Module) -> list[Tensor]:
    """What a call of the module works with besides its arguments, in the order of the node's."""
    return [*module.parameters(), *module.buffers()]


def observe(
    module: Callable[[], nn.Module],
    arguments: Any,
    given: tuple[Argument, ...],
    regions: Callable[[], ExitStack],
) -> Observed:
    """Run a call, then on other values: the form of what it gives must not depend on them.

    `module` gives it with its first weights, `regions` enters what surrounds the call.
    """
    first, saw = _first_run(module, arguments, given, regions)
    for number in range(first + 1, _DRAWS):
        tensors = [_draw(argument, number) for argument in given]
        args, kwargs = filled(arguments, tensors)
        try:
            with seeded("opaque"), torch.no_grad(), regions():
                result, outputs = with_slots(module()(*args, **kwargs), "returns")
        except UnfitError:
            raise
        except Exception:
            continue  # values that it does not take; it took those before
        kinds = _types(outputs)
        if (saw.result, saw.outputs) != (result, kinds):
            forms = " and ".join(", ".join(map(str, form)) for form in (saw.outputs, kinds))
            raise UnfitError(f"returns what depends on the values that it is given: {forms}")
    return saw


def _first_run(
    module: Callable[[], nn.Module],
    arguments: Any,
    given: tuple[Argument, ...],
    regions: Callable[[], ExitStack],
) -> tuple[int, Observed]:
    """A run on the first values that the module takes, and which those are."""
    failures: list[Exception] = []
    for number in range(_DRAWS):
        tensors = [_draw(argument, number) for argument in given]
        try:
            return number, _run(module(), arguments, given, tensors, regions)
        except UnfitError:
            raise
        except Exception as error:
            failures.append(error)
    raise failures[0]


def _types(tensors: list[Tensor]) -> tuple[TensorType, ...]:
    return tuple(TensorType(tuple(t.shape), t.dtype) for t in tensors)


def _run(
    module: nn.Module,
    arguments: Any,
    given: tuple[Argument, ...],
    tensors: list[Tensor],
    regions: Callable[[], ExitStack],
) -> Observed:
    with seeded("opaque"), torch.enable_grad():
        wanted = [argument.requires_grad for argument in given]
        leaves = [t.requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
        inputs = [leaf.clone() if leaf.requires_grad else leaf for leaf in leaves]
        state = state_of(module)
        everything = [*inputs, *state]
        versions = [tensor._version for tensor in everything]
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        args, kwargs = filled(arguments, inputs)
        with _counting() as forward, saved_tensors_hooks(pack, lambda tensor: tensor), regions():
            returned = module(*args, **kwargs)
        result, outputs = with_slots(returned, "returns")
        if not _is_nested(result):
            raise UnfitError(f"returns a {type(result).__qualname__}, not tensors in containers")
        buffers = {id(buffer) for buffer in module.buffers()}
        mutates = tuple(
            i
            for i, (tensor, version) in enumerate(zip(everything, versions, strict=True))
            if tensor._version != version
            or (i >= len(inputs) + len(list(module.parameters())) and id(tensor) not in buffers)
        )
        saved = tuple(classify_saved(kept, tuple(everything), outputs))
        kept.clear()
        with _counting() as backward:
            _backward(outputs, [*leaves, *module.parameters()])
    owner = {storage_of(t): i for i, t in reversed(list(enumerate(everything)))}
    return Observed(
        result=result,
        outputs=_types(outputs),
        strides=tuple(t.stride() for t in outputs),
        requires_grad=tuple(t.requires_grad for t in outputs),
        alias=tuple(owner.get(storage_of(t)) for t in outputs),
        mutates=mutates,
        saved=saved,
        forward=forward(),
        backward=backward(),
    )


def _draw(argument: Argument, number: int) -> Tensor:
    """Values for an argument: of either sign, or of one; whole numbers that suit any table.

    At last ones, for who takes nothing but a mask.
    """
    kind = argument.type
    tensor = torch.empty_strided(kind.shape, argument.stride, dtype=kind.dtype)
    if number == _DRAWS - 1:
        return tensor.fill_(1)
    with seeded(f"opaque:{number}"):
        if not (kind.dtype.is_floating_point or kind.dtype.is_complex):
            return tensor.copy_(torch.randint(2, kind.shape))
        tensor.normal_()
    if kind.dtype.is_complex:
        return tensor
    return tensor if number < 2 else tensor.abs() if number == 2 else -tensor.abs()


def _backward(outputs: list[Tensor], leaves: list[Tensor]) -> None:
    ends = [output for output in outputs if output.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if ends and wanted:
        gradients = [torch.ones_like(end) for end in ends]
        torch.autograd.grad(ends, wanted, gradients, allow_unused=True)


@contextmanager
def _counting() -> Iterator[Callable[[], Work]]:
    """Counts what is done inside; asked after it, says how much that was."""
    flops = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    traffic = CountTraffic()
    with traffic, flops:
        yield lambda: Work(flops.get_total_flops(), traffic.bytes, traffic.kernels)
