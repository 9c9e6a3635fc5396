"""Calls that hand back what they were given: `x.to(dtype)` of that dtype, `x * 1.0`, `x[:]`."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from p2bw.compiler.program import Program, tensor_arguments
from p2bw.compiler.storage import Storage, storage_of


def mutated(program: Program) -> set[Storage]:
    """The memory that the program writes to."""
    return {
        storage_of(program, tensor_arguments(node)[index].name)
        for node in program.compute_nodes
        for index in program.fact(node, "mutates")
    }


def returned_argument(
    program: Program, node: fx.Node, written: Collection[Storage]
) -> fx.Node | None:
    """The argument that the call equals bit for bit, None if there is none.

    A copy of it does too, unless one of the two is written to. Gradients stay the same to the bit
    where leaving out the call does not change the order in which three or more are summed.
    """
    name = _name(node)
    if name not in _IDENTITIES or node is program.loss:
        return None
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in target._schema.arguments}
    given = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    found = _IDENTITIES[name](program, given)
    if found is None or found.op == "get_attr":
        return None  # a parameter itself is no value to send
    if not (name.startswith("to.") or _sums_stay(program, node, found)):
        return None
    if program.facts[node.name].out != program.facts[found.name].out:
        return None
    if program.fact(node, "strides") != program.fact(found, "strides"):
        return None
    if program.fact(node, "alias") == (None,):  # a copy
        both = {storage_of(program, node.name), storage_of(program, found.name)}
        return None if both & set(written) else found
    return found


def _sums_stay(program: Program, node: fx.Node, found: fx.Node) -> bool:
    """Whether what is given back to the argument is summed as before."""
    if len(found.users) == 1 or program.fact(node, "requires_grad") != (True,):
        return True
    return _uses(found) <= 2


def _uses(node: fx.Node) -> int:
    """How many operators may read a value, or what is the same, at the most."""
    return sum((_uses(user) if _name(user) in _IDENTITIES else 0) or 1 for user in node.users)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return f"{getattr(target, '_opname', '')}.{getattr(target, '_overloadname', '')}"


def _same_dtype(program: Program, given: dict[str, Any]) -> fx.Node | None:
    plain = not given.get("copy") and given.get("memory_format") is None
    return _node(given["self"]) if plain else None


def _same_shape(program: Program, given: dict[str, Any]) -> fx.Node | None:
    """A view of the same shape and strides: which of the two is used makes no difference."""
    return _node(given["self"])


def _add_zero(program: Program, given: dict[str, Any]) -> fx.Node | None:
    """Of integers: a float's -0.0 would become 0.0."""
    node = _node(given["self"])
    zero = given["other"] == 0 and isinstance(given["other"], int)
    whole = node and not program.facts[node.name].out[0].dtype.is_floating_point
    return node if zero and whole else None


def _times_one(program: Program, given: dict[str, Any]) -> fx.Node | None:
    one = isinstance(given["other"], (int, float)) and given["other"] == 1
    return _node(given["self"]) if one and given.get("rounding_mode") is None else None


def _and_true(program: Program, given: dict[str, Any]) -> fx.Node | None:
    """`ones & mask`, which is how Hugging Face begins to build a mask."""
    ones, mask = _node(given["self"]), _node(given["other"])
    if ones is None or mask is None:
        return None
    made = str(getattr(ones.target, "_opname", "")) in ("new_ones", "ones")
    truth = program.facts[ones.name].out[0].dtype is torch.bool
    return mask if made and truth else None


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


_IDENTITIES: dict[str, Callable[[Program, dict[str, Any]], fx.Node | None]] = {
    **dict.fromkeys(("to.dtype", "to.dtype_layout", "to.device"), _same_dtype),
    **dict.fromkeys(("slice.Tensor", "view.default", "reshape.default"), _same_shape),
    **dict.fromkeys(("expand.default", "alias.default"), _same_shape),
    **dict.fromkeys(("add.Tensor", "sub.Tensor"), _add_zero),
    **dict.fromkeys(("mul.Tensor", "div.Tensor"), _times_one),
    **dict.fromkeys(("bitwise_and.Tensor", "__and__.Tensor"), _and_true),
}
