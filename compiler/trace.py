"""From a model file to a Program, by torch.export (non-strict) under fake tensors.

torch.export is the one tracer that captures training steps of the models people use, with loss
and gradients bit-equal to eager, and its cost does not depend on the size of the tensors. The
training graph that it yields is kept as it is: decomposing it breaks the training of BatchNorm.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from p2bw.compiler.program import Attribute, NodeFacts, Program, Scope, TensorType
from p2bw.runtime.modelfile import ModelFile

_ROOT = "model"  # name of the user's model inside the traced step


class _Step(nn.Module):
    """Forward and loss of one microbatch: what is traced."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, inputs: Any, targets: Any) -> torch.Tensor:
        outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs)
        if self.loss is not None:
            outputs = self.loss(outputs, *targets)
        return outputs if isinstance(outputs, torch.Tensor) else outputs.loss


def trace(file: ModelFile, batch_size: int) -> Program:
    """Trace one training step for a microbatch of `batch_size` samples; no weights are allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = file.model()
        inputs = file.inputs(batch_size)
        targets = file.targets(batch_size)
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(targets, torch.Tensor):
        targets = (targets,)
    step = _Step(model, file.function("loss"))
    exported = torch.export.export(step, (inputs, targets), strict=False)
    module = exported.module(check_guards=False)
    return _to_program(module, model, batch_size)


def _to_program(module: fx.GraphModule, model: nn.Module, batch_size: int) -> Program:
    attributes = {name: a for a in _attributes(model) for name in a.names}
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    graph = fx.Graph()
    facts: dict[str, NodeFacts] = {}
    inputs: dict[str, TensorType] = {}
    parameters: dict[str, Attribute] = {}
    buffers: dict[str, Attribute] = {}
    constants: dict[str, torch.Tensor] = {}
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            name = str(node.target).removeprefix(f"{_ROOT}.")
            if name not in attributes:
                constants[name] = _lookup(module, str(node.target))
                out = (TensorType(tuple(constants[name].shape), constants[name].dtype),)
            else:
                attribute = attributes[name]
                name = attribute.name
                (parameters if name in parameter_names else buffers)[name] = attribute
                out = (attribute.type,)
            new = graph.create_node("get_attr", name, name=node.name.removeprefix(f"{_ROOT}_"))
            facts[new.name] = NodeFacts(out=out)
        elif node.op == "output":
            ((loss,),) = (node.args[0],)
            new = graph.output(env[loss])
            facts[new.name] = NodeFacts()
        else:
            new = graph.node_copy(node, env.__getitem__)
            facts[new.name] = NodeFacts(
                scopes=_scopes(node), out=tuple(_types(node.meta.get("val"))), source=""
            )
            if node.op == "placeholder":
                inputs[new.name] = facts[new.name].out[0]
        env[node] = new
    return Program(
        graph=graph,
        model_name=type(model).__name__,
        batch_size=batch_size,
        inputs=MappingProxyType(inputs),
        parameters=MappingProxyType(parameters),
        buffers=MappingProxyType(buffers),
        constants=MappingProxyType(constants),
        facts=MappingProxyType(facts),
        history=("trace",),
    )


def _attributes(model: nn.Module) -> Iterator[Attribute]:
    """Parameters and buffers with all the names under which the model knows them."""
    named: dict[int, tuple[torch.Tensor, list[str]]] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        named.setdefault(id(tensor), (tensor, []))[1].append(name)
    state = model.state_dict().keys()
    for tensor, names in named.values():
        yield Attribute(
            names=tuple(names),
            type=TensorType(tuple(tensor.shape), tensor.dtype),
            trainable=tensor.requires_grad,
            persistent=names[0] in state,
        )


def _lookup(module: nn.Module, target: str) -> torch.Tensor:
    owner: Any = module
    for part in target.split("."):
        owner = getattr(owner, part)
    assert isinstance(owner, torch.Tensor)
    return owner


def _scopes(node: fx.Node) -> tuple[Scope, ...]:
    scopes = []
    for key, (path, type_name) in (node.meta.get("nn_module_stack") or {}).items():
        if path == _ROOT or path.startswith(f"{_ROOT}."):
            _, _, call = key.partition("@")
            path = path.partition("@")[0].removeprefix(_ROOT).removeprefix(".")
            scopes.append(Scope(path, type_name, int(call or 0)))
    return tuple(scopes)


def _types(value: Any) -> Iterator[TensorType]:
    if isinstance(value, torch.Tensor):
        yield TensorType(tuple(value.shape), value.dtype)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _types(item)
