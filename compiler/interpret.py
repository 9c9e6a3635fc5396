"""Run a Program's flat graph on a real model: what verify and the tests compare against."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn

from p2bw.compiler.opaque_run import filled, with_slots
from p2bw.compiler.program import OpaqueCall, Program


def interpret(
    program: Program,
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    before_node: Callable[[fx.Node], None] | None = None,
) -> torch.Tensor:
    """The loss of one microbatch, by the program's graph and the model's own tensors.

    `inputs` are in the order of `Program.inputs` (`flatten_microbatch`). Buffers that the
    program updates are updated in the model, as in eager. `before_node` sees each call first.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **program.constants,
    }
    feed = iter(inputs)
    values: dict[fx.Node, Any] = {}
    context: tuple[str, ...] = ()
    with ExitStack() as regions:
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(feed)
            elif node.op == "get_attr":
                values[node] = tensors[str(node.target)]
            elif node.op == "call_function":
                # One region for a run of nodes: autocast casts a weight once per region.
                if program.facts[node.name].context != context:
                    regions.close()
                    regions.enter_context(program.entering(node))
                    context = program.facts[node.name].context
                if before_node:
                    before_node(node)
                arguments = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if opaque := program.opaque.get(node.name):
                    values[node] = call_opaque(model, opaque, arguments[0][1])
                else:
                    values[node] = node.target(*arguments[0], **arguments[1])
    loss: torch.Tensor = values[program.loss]
    return loss


def call_opaque(
    model: nn.Module, opaque: OpaqueCall, inputs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """What the node of an opaque call gives: the tensors that the model's own module returns."""
    args, kwargs = filled(opaque.arguments, inputs)
    _, tensors = with_slots(model.get_submodule(opaque.path)(*args, **kwargs), "returns")
    return tensors
