"""Values whose order of evaluation does not matter, in the order in which they are read."""

from p2bw.compiler.emit.expr import Call, Index, Raw, Ref, Unary
from p2bw.compiler.emit.loops import Line


def as_read(pending: list[Line], reads: list[int]) -> list[Line]:
    """The pending values in the order in which they are read, where theirs does not matter.

    What depends on no tensor, like a range of positions, may be made at any time. Two slices of
    one tensor that do not overlap may be taken in any order: they compute nothing, and no element
    of the tensor gets a gradient from both.
    """
    order = list(pending)
    for index, read in enumerate(reads):
        line = next(line for line in order if line.statement.targets[0] == read)
        if _is_range(line):
            order.remove(line)
            after = [i for i, p in enumerate(order) if p.statement.targets[0] in reads[index + 1 :]]
            order.insert(after[0] if after else len(order), line)
    pending = order
    if len(pending) < 2 or len(reads) < 2:
        return pending
    *rest, first, second = pending
    if [first.statement.targets[0], second.statement.targets[0]] != [reads[-1], reads[-2]]:
        return pending
    return [*rest, second, first] if _are_halves(first, second) else pending


def _is_range(line: Line) -> bool:
    match line.statement.expr:
        case Call(Raw("torch.arange"), _, _):
            return not line.statement.context
    return False


def _are_halves(first: Line, second: Line) -> bool:
    """x[..., :k] and x[..., k:], or -x[..., k:]."""
    one, two = first.statement.expr, second.statement.expr
    two = two.operand if isinstance(two, Unary) else two
    match one, two:
        case Index(Ref(a), (*before, Raw(low))), Index(Ref(b), (*after, Raw(high))):
            split = low.removeprefix(":")
            return a == b and before == after and split.isdecimal() and high == f"{split}:"
    return False
