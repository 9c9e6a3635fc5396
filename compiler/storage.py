"""Which memory a tensor lives in: following aliases, and counting what autograd keeps alive."""

from collections.abc import Collection, Iterable, Iterator
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


def saved_bytes(program: Program, nodes: Iterable[str]) -> int:
    """Bytes that autograd keeps of one microbatch when exactly `nodes` run in one stage.

    Each storage counts once. Parameters, buffers and constants do not count, received tensors and
    program inputs do.
    """
    inside = frozenset(nodes)
    kept = dict(kept_storages(program, inside))
    return sum(kept.values())


def kept_storages(
    program: Program, nodes: Collection[str]
) -> Iterator[tuple[tuple[str, str, int], int]]:
    """What autograd keeps when `nodes` run in one stage: (kind, node, index) -> bytes, unsorted.

    The key ("tensor", node, output) names a storage that the graph knows, ("fresh", node, index)
    one that only autograd knows. Keys can come more than once, with equal bytes.
    """
    for name in nodes:
        for saved in program.fact(name, "saved"):
            if saved.kind == "fresh":
                yield ("fresh", name, saved.index), saved.bytes
                continue
            maker, output = storage_of(program, *kept_tensor(program, name, saved), within=nodes)
            if maker in nodes:
                yield ("tensor", maker, output), saved.bytes
            elif program.node(maker).op != "get_attr":
                yield ("tensor", maker, output), program.facts[maker].out[output].bytes


def kept_tensor(program: Program, name: str, saved: Saved) -> Storage:
    """The tensor that a node keeps, one of its arguments or its own outputs: not a fresh one."""
    if saved.kind == "input":
        return tensor_arguments(program.node(name))[saved.index].name, 0
    return name, saved.index
