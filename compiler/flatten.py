"""From torch.export's program to one flat graph: attributes by name, regions inlined."""

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor
from torch.export.graph_signature import InputKind

from p2bw.compiler.program import Attribute, NodeFacts, Program, Scope, TensorType
from p2bw.compiler.trace_errors import AUTOCAST, at
from p2bw.runtime.modelfile import ModelFile
from p2bw.runtime.usercode import Line

_ROOT = "model"  # the user's model is this attribute of the traced step

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


class LostConstantError(Exception):
    """A tensor that the program needs has no value, because the model was built without any."""


@dataclass(frozen=True, slots=True)
class _Region:
    """Grad mode and autocast in force at a node. A training step starts with grad, uncast."""

    grad: bool = True
    autocast: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        casts = (f"autocast({self.autocast})",) if self.autocast else ()
        return casts if self.grad else ("no_grad", *casts)


def flatten(
    exported: torch.export.ExportedProgram,
    file: ModelFile,
    model: nn.Module,
    batch_size: int,
    input_names: Sequence[str],
) -> Program:
    """The Program of an exported training step; `input_names` name its tensor inputs in order."""
    flat = _Flat(file, model)
    operands = flat.placeholders(exported, input_names)
    (loss,) = flat.inline(exported.graph_module, operands, _Region())
    flat.facts[flat.graph.output(loss).name] = NodeFacts()
    _drop_constant_copies(flat.graph)
    _drop_dead(flat.graph)
    flat.check()
    nodes = tuple(flat.graph.nodes)
    used = {str(node.target) for node in nodes if node.op == "get_attr"}
    attributes = {a.name: a for a in flat.attributes.values()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Program(
        graph=flat.graph,
        model_name=type(model).__name__,
        batch_size=batch_size,
        inputs=MappingProxyType(
            {n.name: flat.facts[n.name].out[0] for n in nodes if n.op == "placeholder"}
        ),
        parameters=MappingProxyType({n: a for n, a in attributes.items() if n in parameters}),
        buffers=MappingProxyType({n: a for n, a in attributes.items() if n not in parameters}),
        constants=MappingProxyType(
            {name: _known(name, value) for name, value in flat.constants.items() if name in used}
        ),
        facts=MappingProxyType({node.name: flat.facts[node.name] for node in nodes}),
        history=("trace",),
    )


class _Flat:
    """The graph in the making."""

    def __init__(self, file: ModelFile, model: nn.Module) -> None:
        self.file = file
        self.model = model
        self.graph = fx.Graph()
        self.attributes = {name: a for a in _attributes(model) for name in a.names}
        self.constants: dict[str, Tensor] = {}
        self.facts: dict[str, NodeFacts] = {}
        self.values: dict[str, Any] = {}  # node -> fake value
        self.lines: dict[str, Line | None] = {}  # node -> where the user wrote it
        self._line_of_trace: dict[str, Line | None] = {}

    def placeholders(
        self, exported: torch.export.ExportedProgram, input_names: Sequence[str]
    ) -> list[fx.Node]:
        """The nodes for the exported graph's placeholders, in its order."""
        nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
        specs = list(zip(nodes, exported.graph_signature.input_specs, strict=True))
        made: dict[fx.Node, fx.Node] = {}
        inputs = [node for node, spec in specs if spec.kind == InputKind.USER_INPUT]
        for node, name in zip(inputs, input_names, strict=True):
            made[node] = self._add("placeholder", name, NodeFacts(out=_types(node.meta["val"])))
        attribute_nodes: dict[str, fx.Node] = {}
        for node, spec in specs:
            if node in made:
                continue
            target = str(spec.target).removeprefix(f"{_ROOT}.")
            if target in self.attributes:
                name = self.attributes[target].name
            else:
                name = self._constant(target, exported.constants[str(spec.target)])
            if name not in attribute_nodes:
                facts = NodeFacts(out=_types(node.meta["val"]))
                attribute_nodes[name] = self._add("get_attr", name, facts)
            made[node] = attribute_nodes[name]
        return [made[node] for node in nodes]

    def _constant(self, target: str, value: Tensor) -> str:
        """The name of a constant: its path in the user's model if it has one."""
        name = target
        if not isinstance(_lookup(self.model, target), Tensor):
            number = sum(known.startswith("constant_") for known in self.constants)
            name = f"constant_{number}"
        assert name not in self.attributes
        self.constants[name] = value
        return name

    def _add(self, op: str, target: str, facts: NodeFacts) -> fx.Node:
        node = self.graph.create_node(op, target, name=target.replace(".", "_"))
        self.facts[node.name] = facts
        return node

    def inline(
        self, module: fx.GraphModule, operands: Sequence[Any], region: _Region
    ) -> Sequence[Any]:
        """Copy a graph's nodes, regions of grad mode and autocast flattened; gives its results."""
        feed = iter(operands)
        env: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(feed)
            elif node.op == "get_attr":
                env[node] = _lookup(module, str(node.target))
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], env.__getitem__)
                return results if isinstance(results, (tuple, list)) else (results,)
            else:
                arguments = fx.node.map_arg(node.args, env.__getitem__)
                keywords = fx.node.map_arg(node.kwargs, env.__getitem__)
                env[node] = self._call(node, arguments, keywords, region)
        raise AssertionError("a graph without an output")

    def _call(
        self,
        node: fx.Node,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        region: _Region,
    ) -> Any:
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_set_grad_enabled":
            enabled, submodule, *operands = arguments
            return self.inline(submodule, operands, replace(region, grad=enabled))
        if name == "wrap_with_autocast":
            device, dtype, enabled, _cache, submodule, *operands = arguments
            if enabled and device != "cpu":
                inner = [n for n in submodule.graph.nodes if n.op == "call_function"]
                raise at(self._line(inner[0]) if inner else None, AUTOCAST)
            cast = str(dtype or torch.bfloat16).removeprefix("torch.") if enabled else ""
            return self.inline(submodule, operands, replace(region, autocast=cast))
        if node.target is operator.getitem and isinstance(arguments[0], (tuple, list)):
            return arguments[0][arguments[1]]  # a result of an inlined region
        line = self._line(node)
        if isinstance(node.target, HigherOrderOperator):
            raise at(line, f"the model uses torch.{name}, which p2bw cannot cut into stages")
        new = self.graph.create_node(
            "call_function", node.target, arguments, keywords, name=node.name
        )
        self.values[new.name] = node.meta.get("val")
        self.lines[new.name] = line
        self.facts[new.name] = NodeFacts(
            scopes=self._scopes(node),
            source=str(line) if line else "",
            context=region.names,
            out=_types(node.meta.get("val")),
        )
        return new

    def _line(self, node: fx.Node) -> Line | None:
        """The innermost line of user or library code that made a node."""
        trace = node.meta.get("stack_trace") or ""
        if trace not in self._line_of_trace:
            frames = (
                self.file.code.line(file, int(number))
                for file, number in reversed(_FRAME.findall(trace))
            )
            self._line_of_trace[trace] = next((line for line in frames if line), None)
        return self._line_of_trace[trace]

    def _scopes(self, node: fx.Node) -> tuple[Scope, ...]:
        private, public = f"{self.file.module.__name__}.", f"{self.file.path.stem}."
        scopes = []
        for key, (path, type_name) in (node.meta.get("nn_module_stack") or {}).items():
            if path == _ROOT or path.startswith(f"{_ROOT}."):
                _, _, call = key.partition("@")
                path = path.partition("@")[0].removeprefix(_ROOT).removeprefix(".")
                if type_name.startswith(private):
                    type_name = public + type_name.removeprefix(private)
                scopes.append(Scope(path, type_name, int(call or 0)))
        return tuple(scopes)

    def check(self) -> None:
        """Refuse what a Program cannot hold: shapes or numbers that depend on data, odd calls."""
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            line = self.lines[node.name]
            if _is_symbolic(self.values[node.name]):
                raise at(
                    line,
                    "the result depends on the values in a tensor, in its shape or as a Python "
                    "number; keep shapes fixed (torch.where instead of x[mask]) and numbers as "
                    "tensors (no .item())",
                )
            if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
                raise at(line, f"the model calls {node.target}, which no stage can hold")
            for argument in _written(node):
                if argument.op == "get_attr" and argument.target in self.constants:
                    raise at(
                        line,
                        f"forward changes the tensor {argument.target}, which is neither a "
                        f"parameter nor a buffer; use self.register_buffer",
                    )


def _attributes(model: nn.Module) -> Iterator[Attribute]:
    """Parameters and buffers with all the names under which the model knows them."""
    named: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        named.setdefault(id(tensor), (tensor, []))[1].append(name)
    state = model.state_dict().keys()
    for tensor, names in named.values():
        yield Attribute(
            names=tuple(names),
            type=TensorType(tuple(tensor.shape), tensor.dtype),
            trainable=tensor.requires_grad,
            persistent=any(name in state for name in names),
        )


def _lookup(owner: Any, target: str) -> Any:
    for part in target.split("."):
        owner = getattr(owner, part, None)
    return owner


def _known(name: str, value: Tensor) -> Tensor:
    if isinstance(value, FakeTensor) or value.is_meta:
        kind = TensorType(tuple(value.shape), value.dtype)
        raise LostConstantError(
            f"the tensor {name}, {kind}, has no value without building the whole model; keep it "
            f"as a buffer, self.register_buffer(name, tensor). (torch.autograd.grad inside of "
            f"forward cannot be compiled.)"
        )
    return value.detach()


def _types(value: Any) -> tuple[TensorType, ...]:
    if isinstance(value, Tensor):
        return (TensorType(tuple(value.shape), value.dtype),)
    if isinstance(value, (tuple, list)):
        return tuple(found for item in value for found in _types(item))
    return ()


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not all(isinstance(size, int) for size in value.shape)
    if isinstance(value, (tuple, list)):
        return any(map(_is_symbolic, value))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that an operator writes to, by its schema."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                yield value


def _drop_constant_copies(graph: fx.Graph) -> None:
    """Read constants where the graph reads fresh copies of them, unless a copy may be changed.

    `torch.tensor(3.0)` in forward gives lift_fresh_copy and detach_ of a constant.
    """
    copies = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default)
    constant: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in copies:
            source = node.args[0]
            source = constant.get(source, source)
            fresh = node.target is copies[0] and source.op == "get_attr"
            if fresh or node.args[0] in constant:
                constant[node] = source
    for node in reversed(constant):
        if all(user in constant or _only_reads(user) for user in node.users):
            node.replace_all_uses_with(constant[node])
            graph.erase_node(node)


def _only_reads(node: fx.Node) -> bool:
    """Neither writes its arguments nor gives out a view of them."""
    if not isinstance(node.target, OpOverload):
        return False
    schema, tags = node.target._schema, node.target.tags
    return not (
        schema.is_mutable
        or torch.Tag.maybe_aliasing_or_mutating in tags
        or any(argument.alias_info for argument in schema.arguments)
        or node.target.name().partition("::")[2].partition(".")[0] in _MAY_ALIAS
    )


# Composite operators that return their argument, or a view of it, in some cases.
_MAY_ALIAS = frozenset(
    (
        *("reshape", "reshape_as", "contiguous", "to", "type_as", "view_as", "expand_as"),
        *("flatten", "ravel", "broadcast_tensors", "meshgrid"),
        *("atleast_1d", "atleast_2d", "atleast_3d"),
    )
)


def _drop_dead(graph: fx.Graph) -> None:
    """Erase nodes that neither the loss nor any state depends on, and assertions.

    A node that draws random numbers stays even so: without it the numbers after it would differ.
    """
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if node.op == "get_attr" or not _has_effect(node):
            graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    name = node.target.name().partition("::")[2].partition(".")[0]
    if name.startswith(("_assert", "sym_constrain")):
        return False
    return (
        node.target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in node.target.tags
        or name in ("batch_norm", "instance_norm")  # write running statistics
    )
