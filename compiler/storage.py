"""Which memory a tensor lives in: following aliases."""

from collections.abc import Collection
from operator import getitem

from torch import fx

from p2bw.compiler.program import Program, Saved, TensorType, tensor_arguments

Storage = tuple[str, int]  # the node that made it, and which of its tensor outputs


def is_contiguous(kind: TensorType, strides: tuple[int, ...]) -> bool:
    """Do the elements lie in row-major order without gaps?"""
    step = 1
    for size, stride in zip(reversed(kind.shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return kind.elements == 0
        step *= size
    return True


def storage_of(
    program: Program, name: str, output: int = 0, *, within: Collection[str] | None = None
) -> Storage:
    """The memory of a node's output: the first maker along its chain of aliases.

    With `within`, the chain ends at what these nodes are given from outside: a tensor that crosses
    into a stage has memory of its own there.
    """
    while within is None or name in within:
        alias = program.fact(name, "alias")[output]
        if alias is None:
            break
        node = program.node(name)
        source = tensor_arguments(node)[alias]
        name, output = source.name, picked_output(program, node, source)
    return name, output


def picked_output(program: Program, node: fx.Node, source: fx.Node) -> int:
    """Which tensor output of `source` a node reads: getitem picks, others read the only one."""
    if node.target is getitem and len(program.facts[source.name].out) > 1:
        index = node.args[1]
        assert isinstance(index, int)
        return index
    return 0


def kept_tensor(program: Program, name: str, saved: Saved) -> Storage:
    """The tensor that a node keeps, one of its arguments or its own outputs: not a fresh one."""
    if saved.kind == "input":
        return tensor_arguments(program.node(name))[saved.index].name, 0
    return name, saved.index
