"""Digests by which equal parts of a program are found: layers that repeat are looked at once."""

import hashlib
from collections.abc import Iterable

from torch import fx

from p2bw.compiler.program import Block, Program, tensor_arguments
from p2bw.compiler.split import StageGraph


def block_kind(program: Program, block: Block) -> str:
    """A digest of what decides how long a block takes: equal blocks have equal ones."""
    return _digest(_lines(program, block.nodes, {}))


def stage_kind(program: Program, graph: StageGraph) -> str:
    """A digest of all that a stage computes with: equal stages hold as much.

    What it is given and what it gives count in their order, parameters by how they are used.
    """
    number: dict[str, str] = {}
    lines = []
    for name in graph.arguments:
        number[name] = f"@{len(number)}"
        lines.append(f"{number[name]} = {_given(program, program.node(name))}")
    lines += _lines(program, graph.nodes, number)
    lines += [number[name] for name in graph.results]
    lines += [name for name in graph.nodes if name in program.opaque]  # what they do is unknown
    lines += [f"{t.type} {t.gradient}" for t in (*graph.receives, *graph.sends)]
    return _digest(lines)


def _lines(program: Program, nodes: Iterable[str], number: dict[str, str]) -> list[str]:
    lines = []
    for name in nodes:
        node = program.node(name)
        for argument in tensor_arguments(node):
            if argument.name not in number:
                number[argument.name] = f"@{len(number)}"
                lines.append(f"{number[argument.name]} = {_given(program, argument)}")
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: number[n.name])
        number[name] = f"%{len(number)}"
        opaque = program.opaque.get(name)
        called = (opaque.type_name, opaque.forward, opaque.backward) if opaque else node.target
        lines.append(
            f"{number[name]} = {called}{arguments} {program.facts[name].context}"
            f" -> {_described(program, node)} {program.fact(node, 'flops_backward')}"
            f" {program.fact(node, 'traffic_backward')}"
        )
    return lines


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _given(program: Program, node: fx.Node) -> str:
    trainable = node.op == "get_attr" and str(node.target) in program.parameters
    return f"{'parameter' if trainable else node.op} {_described(program, node)}"


def _described(program: Program, node: fx.Node) -> str:
    facts = program.facts[node.name]
    kinds = ", ".join(map(str, facts.out))
    return f"{kinds} {facts.strides} {facts.requires_grad}"
