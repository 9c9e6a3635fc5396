"""Program: the traced training step, and what the passes have found out about each node.

The graph is read-only after tracing; facts lie beside it, so a pass is a pure function from
Program to Program and keeping every intermediate Program costs nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

_DTYPE_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}


class MissingFactError(Exception):
    """A pass asked for a fact that no pass has found out yet: the order of passes is wrong."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape and dtype of one tensor; prints as f32[8, 64]."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        name = _DTYPE_NAMES.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Scope:
    """One level of the module hierarchy that a node was traced in.

    `call` counts the calls of one module (0 for the first), so a module that the model calls
    twice gives two scopes with one path.
    """

    path: str  # "transformer.h.3.attn"; "" for the user's model itself
    type_name: str  # "torch.nn.modules.linear.Linear", "gpt.Block"
    call: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """One tensor that autograd keeps from a node's forward to its backward.

    kind "input": the node's index-th tensor argument (counted over flattened arguments);
    kind "output": its index-th output; kind "fresh": a tensor that only autograd holds.
    """

    kind: str
    index: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What is known about one node. None means that no pass has found it out yet."""

    # Found by tracing.
    scopes: tuple[Scope, ...] = ()  # outermost (the model itself) first; () for the loss function
    source: str = ""  # "gpt.py:52", the user's own line, relative
    context: tuple[str, ...] = ()  # regions around the node: "no_grad", "autocast(bfloat16)"
    out: tuple[TensorType, ...] = ()  # one per tensor output, () if the output is no tensor

    # Found by annotate_autograd.
    strides: tuple[tuple[int, ...], ...] | None = None  # per tensor output, in elements
    requires_grad: tuple[bool, ...] | None = None  # per tensor output
    alias: tuple[int | None, ...] | None = None  # per tensor output: tensor argument whose storage
    mutates: tuple[int, ...] | None = None  # tensor arguments that the node writes in place
    saved: tuple[Saved, ...] | None = None
    random_calls: int | None = None  # seeded random operators that one forward dispatches

    # Found by annotate_cost: one microbatch, one forward and one backward.
    flops_forward: int | None = None
    flops_backward: int | None = None
    traffic_forward: int | None = None  # bytes read and written
    traffic_backward: int | None = None

    # Found by annotate_time, for the slowest kind of device in the topology.
    forward_s: float | None = None
    backward_s: float | None = None


_PASS_OF_FACT = {
    **dict.fromkeys(
        ("strides", "requires_grad", "alias", "mutates", "saved", "random_calls"),
        "annotate_autograd",
    ),
    **dict.fromkeys(
        ("flops_forward", "flops_backward", "traffic_forward", "traffic_backward"), "annotate_cost"
    ),
    **dict.fromkeys(("forward_s", "backward_s"), "annotate_time"),
}


@dataclass(frozen=True, slots=True)
class Attribute:
    """A parameter, buffer or constant of the model, under the model's own qualified names.

    `names` holds every name that the model's state knows it by (more than one: tied); the first
    is canonical and is the target of the graph's get_attr nodes.
    """

    names: tuple[str, ...]
    type: TensorType
    trainable: bool = False  # a parameter that gets a gradient
    persistent: bool = True  # part of the model's state_dict

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor, by its number, in the nested arguments or results of an opaque call."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaqueCall:
    """One call of a module of the user's own that could not be traced, and what running it showed.

    Its node calls p2bw::opaque with the call's tensors, then the module's parameters and buffers;
    arguments are counted over all of these, as by `tensor_arguments`. What it costs was counted,
    operator by operator, as it ran by itself on the CPU.
    """

    path: str  # of the module
    type_name: str  # of its class: "moe.MoE"
    reason: str  # why it could not be traced, and where
    arguments: Any  # (args, kwargs), nested, with a Slot for each tensor
    result: Any  # likewise
    outputs: tuple[TensorType, ...]
    strides: tuple[tuple[int, ...], ...]
    requires_grad: tuple[bool, ...]
    alias: tuple[int | None, ...]
    mutates: tuple[int, ...]
    saved: tuple[Saved, ...]
    forward: "Work"
    backward: "Work"
    declared: bool = False  # the user has said what it costs


@dataclass(frozen=True, slots=True)
class Work:
    """What one direction of an opaque call takes."""

    flops: int = 0
    traffic: int = 0  # bytes read and written
    kernels: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Nodes that the placement moves as one, in program order."""

    name: str  # "h.3.attn", unique in the program
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One training step for one microbatch: forward and loss, as a flat torch.fx graph.

    Nodes are placeholders (tensor inputs only), get_attr (targets: canonical names in
    parameters, buffers or constants; at most one node each), call_function (ATen overloads,
    p2bw::opaque, operator.getitem) and one output node whose single argument is the scalar loss.
    """

    graph: fx.Graph
    model_name: str  # class of the user's model
    batch_size: int
    inputs: Mapping[str, TensorType]  # placeholder name -> type, in calling order
    parameters: Mapping[str, Attribute]
    buffers: Mapping[str, Attribute]
    constants: Mapping[str, torch.Tensor]  # tensors that the user's code made outside of forward
    facts: Mapping[str, NodeFacts]
    notes: tuple[str, ...] = ()  # what the user should know of the trace, each with its line
    opaque: Mapping[str, OpaqueCall] = field(default_factory=dict)  # node name -> its call
    blocks: tuple[Block, ...] | None = None
    history: tuple[str, ...] = ()
    _nodes: Mapping[str, fx.Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_nodes", {node.name: node for node in self.graph.nodes})

    def node(self, name: str) -> fx.Node:
        return self._nodes[name]

    @property
    def loss(self) -> fx.Node:
        """The node that computes the scalar loss."""
        (loss,) = self.graph.output_node().args
        assert isinstance(loss, fx.Node)
        return loss

    @property
    def compute_nodes(self) -> tuple[fx.Node, ...]:
        """The call_function nodes, in program order."""
        return tuple(node for node in self.graph.nodes if node.op == "call_function")

    def attribute(self, node: fx.Node) -> Attribute:
        """The parameter or buffer that a get_attr node reads (KeyError for a constant)."""
        target = str(node.target)
        return self.parameters[target] if target in self.parameters else self.buffers[target]

    def fact(self, node: fx.Node | str, name: str) -> Any:
        """One fact about a node; MissingFactError names the pass to run first."""
        key = node if isinstance(node, str) else node.name
        value = getattr(self.facts[key], name)
        if value is None:
            raise MissingFactError(f"node {key!r} has no {name}: run {_PASS_OF_FACT[name]} first")
        return value

    def learn(self, pass_name: str, **columns: Mapping[str, object]) -> "Program":
        """A new Program that also knows `columns`: fact name -> {node name: value}."""
        known = {f.name for f in fields(NodeFacts)}
        assert columns.keys() <= known, columns.keys() - known
        facts = dict(self.facts)
        rows: dict[str, dict[str, object]] = {}
        for fact, column in columns.items():
            for node, value in column.items():
                rows.setdefault(node, {})[fact] = value
        for node, row in rows.items():
            facts[node] = replace(facts[node], **row)  # type: ignore[arg-type]
        return replace(self, facts=MappingProxyType(facts), history=(*self.history, pass_name))

    @contextmanager
    def entering(self, node: fx.Node, device: str = "cpu") -> Iterator[None]:
        """The regions (no_grad, autocast) that the user's code put around a node."""
        with ExitStack() as stack:
            for region in self.facts[node.name].context:
                if region == "no_grad":
                    stack.enter_context(torch.no_grad())
                elif region == "enable_grad":
                    stack.enter_context(torch.enable_grad())
                else:
                    dtype = getattr(torch, region.removeprefix("autocast(").removesuffix(")"))
                    stack.enter_context(torch.autocast(device, dtype=dtype))
            yield


def tensor_arguments(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes among a node's flattened arguments, in order and with repeats.

    `Saved.index`, `NodeFacts.alias` and `NodeFacts.mutates` count along this tuple.
    """
    found: list[fx.Node] = []

    def keep(argument: fx.Node) -> fx.Node:
        found.append(argument)
        return argument

    fx.node.map_arg((node.args, node.kwargs), keep)
    return tuple(found)
