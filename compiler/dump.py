"""A Program as text, one line per node, to read and to diff (`--dump-passes`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from p2bw.compiler.program import NodeFacts, Program
from p2bw.compiler.storage import is_contiguous

_NUMBERS = (
    *("random_calls", "flops_forward", "flops_backward", "traffic_forward", "traffic_backward"),
    *("forward_s", "backward_s"),
)


def dump(program: Program) -> str:
    """The nodes in program order, then the blocks if there are any."""
    lines = [f"# {program.model_name}, {program.batch_size} samples, after {program.history[-1]}"]
    lines.extend(_line(program, node) for node in program.graph.nodes)
    if program.blocks is not None:
        lines.append(f"# {len(program.blocks)} blocks")
        lines.extend(f"{block.name}: {' '.join(block.nodes)}" for block in program.blocks)
    return "\n".join(lines) + "\n"


def _line(program: Program, node: fx.Node) -> str:
    facts = program.facts[node.name]
    if node.op == "output":
        return f"return {program.loss}"
    types = ", ".join(map(str, facts.out))
    notes = "; ".join(filter(None, (_place(facts), *_known(facts))))
    return f"{node.name}: {types} = {_expression(program, node)}" + (
        f"  # {notes}" if notes else ""
    )


def _expression(program: Program, node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        for kind in ("parameters", "buffers", "constants"):
            if str(node.target) in getattr(program, kind):
                return f"{kind.removesuffix('s')} {node.target}"
    arguments = [
        *map(_value, node.args),
        *(f"{name}={_value(value)}" for name, value in node.kwargs.items()),
    ]
    name = getattr(node.target, "__name__", "") or str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
    return f"{name}({', '.join(arguments)})"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value)


def _place(facts: NodeFacts) -> str:
    parts = [facts.scopes[-1].path or facts.scopes[-1].type_name] if facts.scopes else []
    return ", ".join([*parts, *filter(None, (facts.source, *facts.context))])


def _known(facts: NodeFacts) -> Iterator[str]:
    """What the passes have found; what is zero, empty or as usual is left out."""
    if facts.requires_grad and any(facts.requires_grad):
        yield "grad" if all(facts.requires_grad) else f"grad={facts.requires_grad}"
    if facts.strides and not all(map(is_contiguous, facts.out, facts.strides)):
        yield f"strides={', '.join(map(str, facts.strides))}"
    if facts.alias and any(source is not None for source in facts.alias):
        yield f"alias={', '.join(map(str, facts.alias))}"
    if facts.mutates:
        yield f"mutates={', '.join(map(str, facts.mutates))}"
    if facts.saved:
        yield f"saves={', '.join(f'{s.kind} {s.index}: {s.bytes}' for s in facts.saved)}"
    for name in _NUMBERS:
        if value := getattr(facts, name):
            yield f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
