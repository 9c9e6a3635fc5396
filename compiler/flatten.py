"""From torch.export's program to one flat graph: attributes by name, regions as facts."""

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.export.graph_signature import InputKind

from p2bw.compiler.opaque import OPAQUE
from p2bw.compiler.program import Attribute, NodeFacts, OpaqueCall, Program, Scope, TensorType
from p2bw.compiler.trace_errors import AUTOCAST, UntraceableError, at
from p2bw.contract.errors import ModelError
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.usercode import Line

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
    opaque: Mapping[str, OpaqueCall],
) -> Program:
    """The Program of an exported training step.

    `input_names` name its tensor inputs in order, `opaque` has its opaque calls by their names.
    """
    flat = _Flat(file, model)
    operands = flat.placeholders(exported, input_names)
    loss = flat.copy(exported.graph, operands)
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
        opaque=MappingProxyType(
            {n.name: opaque[str(n.args[0])] for n in nodes if n.target is OPAQUE}
        ),
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

    def copy(self, graph: fx.Graph, operands: Sequence[fx.Node]) -> fx.Node:
        """Copy a graph's calls, keeping track of grad mode and autocast; gives its one result."""
        env: dict[fx.Node, fx.Node] = dict(
            zip(graph.find_nodes(op="placeholder"), operands, strict=True)
        )
        regions: dict[fx.Node, _Region] = {}  # what was in force before each autocast
        region = _Region()
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):  # get_attr: what some calls would run
                continue
            if node.target is torch._C._set_grad_enabled:
                region = replace(region, grad=node.args[0])
            elif node.target is torch.amp.autocast_mode._enter_autocast:
                regions[node] = region
                region = self._cast(region, node, *node.args)
            elif node.target is torch.amp.autocast_mode._exit_autocast:
                region = replace(region, autocast=regions[node.args[0]].autocast)
            elif node.op == "output":
                (loss,) = node.all_input_nodes
                return env[loss]
            else:
                env[node] = self._call(node, env, region)
        raise AssertionError("a graph without an output")

    def _cast(
        self,
        region: _Region,
        node: fx.Node,
        device: str,
        dtype: torch.dtype | None,
        enabled: bool = True,
        cache: bool = True,
    ) -> _Region:
        if enabled and device != "cpu":
            raise at(self._line(node), AUTOCAST)
        dtype = dtype or torch.get_autocast_dtype(device)
        return replace(region, autocast=str(dtype).removeprefix("torch.") if enabled else "")

    def _call(self, node: fx.Node, env: dict[fx.Node, fx.Node], region: _Region) -> fx.Node:
        line = self._line(node)
        value = node.meta.get("val")
        known = isinstance(node.target, OpOverload) or node.target is operator.getitem
        if not known and not _is_symbolic(value):  # check() judges symbols, if they matter
            name = getattr(node.target, "__name__", node.target)
            reason = f"the model uses {name}, which p2bw cannot cut into stages"
            raise _untraceable(line, reason, self._scopes(node))
        new = self.graph.node_copy(node, env.__getitem__)
        self.values[new.name] = value
        self.lines[new.name] = line
        self.facts[new.name] = NodeFacts(
            scopes=self._scopes(node),
            source=str(line) if line else "",
            context=region.names,
            out=_types(value),
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
                scopes = self.facts[node.name].scopes
                raise _untraceable(
                    line,
                    "the result depends on the values in a tensor, in its shape or as a Python "
                    "number; keep shapes fixed (torch.where instead of x[mask]) and numbers as "
                    "tensors (no .item()), or do it in a submodule of its own that returns fixed "
                    "shapes and stays one call of your code",
                    scopes,
                )
            for argument in _written(node):
                if argument.op == "get_attr" and argument.target in self.constants:
                    raise at(
                        line,
                        f"forward changes the tensor {argument.target}, which is neither a "
                        f"parameter nor a buffer; use self.register_buffer",
                    )


def _untraceable(line: Line | None, message: str, scopes: Sequence[Scope]) -> ModelError:
    """The error about a node that a Program cannot hold, made by the innermost of `scopes`."""
    return UntraceableError(str(at(line, message)), scopes[-1].path if scopes else "")


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


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Pairs of an argument's schema and the argument that a call of an operator gives."""
    assert isinstance(node.target, OpOverload)
    for index, schema in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            yield schema, node.args[index]
        elif schema.name in node.kwargs:
            yield schema, node.kwargs[schema.name]


def _operator(target: OpOverload) -> str:
    """The name of an operator without overload and package."""
    return str(target._schema.name).partition("::")[2]


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that an operator writes to, by its schema."""
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        for schema, argument in _arguments(node):
            if schema.alias_info is not None and schema.alias_info.is_write:
                yield from (n for n in (argument,) if isinstance(n, fx.Node))


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
        if all(_only_reads(user, node) for user in node.users):
            node.replace_all_uses_with(constant[node])
            graph.erase_node(node)


def _only_reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a node neither writes it nor gives out a view of it."""
    if not isinstance(user.target, OpOverload):
        return False
    aliased = {
        argument
        for schema, argument in _arguments(user)
        if schema.alias_info is not None and isinstance(argument, fx.Node)
    }
    return not (
        node in aliased
        or torch.Tag.maybe_aliasing_or_mutating in user.target.tags
        or _operator(user.target) in _MAY_ALIAS
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
    name = _operator(node.target)
    if name.startswith(("_assert", "sym_constrain")):
        return False
    return (
        node.target._schema.is_mutable
        or node.target is OPAQUE  # it may write the module's buffers
        or torch.Tag.nondeterministic_seeded in node.target.tags
        or name in ("batch_norm", "instance_norm")  # write running statistics
    )
