"""The module calls of a stage: its nodes, in program order, nested as the user's modules were.

torch traces a module call as one uninterrupted run of nodes, so what a stage has of it is a run
of the stage's nodes too: nesting never changes the order of operators, and with it neither the
order of random numbers and in-place updates nor the order in which gradients are summed.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import fx

from p2bw.compiler.emit.identity import mutated, returned_argument
from p2bw.compiler.program import Program, Scope, TensorType, tensor_arguments
from p2bw.compiler.split import StageGraph

_aten = torch.ops.aten
_SLICES = (_aten.slice.Tensor, _aten.select.int)
_STORES = (_aten.copy_.default, _aten.fill_.Scalar, _aten.fill_.Tensor)


@dataclass(slots=True)
class Region:
    """What one stage has of one call of one module."""

    path: str
    type_name: str
    call: int
    begin: int  # positions in the stage's order of nodes: [begin, end)
    items: "list[fx.Node | Region]" = field(default_factory=list)
    end: int = 0
    whole: bool = True  # the stage has all nodes of the call
    opens: bool = True  # it has the call's first node
    closes: bool = True  # it has the call's last node

    @property
    def class_name(self) -> str:
        return self.type_name.rpartition(".")[2]

    def nodes(self) -> Iterator[fx.Node]:
        for item in self.items:
            if isinstance(item, Region):
                yield from item.nodes()
            else:
                yield item


Key = tuple[str, int]


@dataclass(slots=True)
class Extent:
    """All nodes of one module call in the whole program."""

    first: str
    last: str = ""
    count: int = 0


@dataclass(slots=True)
class Survey:
    """What emission knows of a program before any stage is looked at."""

    same: dict[fx.Node, fx.Node]  # a node that returns its argument itself -> that argument
    parts: dict[fx.Node, dict[int, fx.Node]]  # calls with several outputs -> what getitem takes
    extents: dict[Key, Extent]


_SURVEYS: "WeakKeyDictionary[fx.Graph, Survey]" = WeakKeyDictionary()

# Checks that tracing adds; shapes and dtypes are compiled in.
_CHECKS = ("_assert", "sym_constrain")


def survey(program: Program) -> Survey:
    """What holds of the whole program, computed once."""
    found = _SURVEYS.get(program.graph)
    if found is None:
        found = _SURVEYS[program.graph] = _survey(program)
    return found


def _survey(program: Program) -> Survey:
    found = Survey({}, {}, {})
    written = mutated(program)
    absorbed = {node for node in program.compute_nodes if _is_part_of_loss(program, node)}
    for node in program.compute_nodes:
        if node in absorbed or (node.target is operator.getitem and node.args[0] in absorbed):
            found.same[node] = _broadcast_operand(node)
        elif node.target is operator.getitem:
            producer, index = node.args
            assert isinstance(producer, fx.Node)
            assert isinstance(index, int)
            parts = found.parts.setdefault(producer, {})
            if index in parts:
                found.same[node] = parts[index]
            else:
                parts[index] = node
        elif argument := returned_argument(program, node, written):
            found.same[node] = argument
        if is_silent(node) or node in found.same:
            continue
        for scope in program.facts[node.name].scopes:
            extent = found.extents.setdefault((scope.path, scope.call), Extent(node.name))
            extent.last = node.name
            extent.count += 1
    return found


# Functions of torch.nn.functional that broadcast their two operands themselves.
_BROADCASTING = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")


def _is_part_of_loss(program: Program, node: fx.Node) -> bool:
    """Whether a broadcast is what F.mse_loss and its like begin with, and changes no shape."""
    if getattr(node.target, "_opname", "") != "broadcast_tensors":
        return False
    operands = tensor_arguments(node)
    parts = sorted(node.users, key=lambda part: str(part.args[1]))
    if len(parts) != 2 or any(part.target is not operator.getitem for part in parts):
        return False
    kinds = [program.facts[n.name].out for n in (*operands, *parts)]
    users = {user for part in parts for user in part.users}
    if len({str(kind) for kind in kinds}) != 1 or len(users) != 1:
        return False
    (loss,) = users
    return getattr(loss.target, "_opname", "") in _BROADCASTING and loss.args[:2] == tuple(parts)


def _broadcast_operand(node: fx.Node) -> fx.Node:
    if node.target is not operator.getitem:
        return tensor_arguments(node)[0]
    producer, index = node.args
    assert isinstance(producer, fx.Node)
    assert isinstance(index, int)
    return tensor_arguments(producer)[index]


def is_silent(node: fx.Node) -> bool:
    """Whether a node is no statement of its own: a check, or the unpacking of another's output."""
    if node.target is operator.getitem:
        return True
    return str(getattr(node.target, "_opname", "")).startswith(_CHECKS)


@dataclass(slots=True)
class Layout:
    """A stage as regions, with where each value is made and last used."""

    root: Region
    program: Program
    survey: Survey
    arguments: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    made: dict[fx.Node, int]
    last_use: dict[fx.Node, int]

    def resolve(self, node: fx.Node) -> fx.Node:
        """The value that a node stands for in this stage."""
        while node in self.survey.same and node not in self.arguments:
            node = self.survey.same[node]
        return node

    def reads(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The values that a node needs, as they are known in the stage."""
        if self.number_stored(node) is not None:
            return (self.resolve(tensor_arguments(node)[0]),)
        return tuple(self.resolve(argument) for argument in tensor_arguments(node))

    def is_store(self, node: fx.Node) -> bool:
        """Whether it writes into a part of a tensor, as x[:, 0] = y does."""
        part = node.args[0] if node.target in _STORES and not node.users else None
        return isinstance(part, fx.Node) and part.target in _SLICES

    def number_stored(self, node: fx.Node) -> float | None:
        """The number that x[:, 0] = 3 writes; the graph has it as a constant tensor."""
        value = node.args[1] if self.is_store(node) else None
        if not isinstance(value, fx.Node):
            return None
        constant = self.program.constants.get(str(value.target))
        if constant is None or constant.dim() or constant.is_complex():
            return None
        return constant.item()

    def outputs(self, region: Region) -> list[fx.Node]:
        """Values made in the region that something after it uses, in program order."""
        found = []
        for node in region.nodes():
            for value in self.values(node):
                if self.last_use.get(value, -1) >= region.end:
                    found.append(value)
        return found

    def values(self, node: fx.Node) -> list[fx.Node]:
        """What a node gives: itself, or the parts that getitem takes from it."""
        if node in self.survey.parts:
            parts = self.survey.parts[node]
            return [parts[index] for index in sorted(parts)]
        return [node]

    def type(self, node: fx.Node) -> TensorType:
        return self.program.facts[node.name].out[0]


def lay_out_regions(program: Program, stage: StageGraph) -> Layout:
    """Nest the nodes of a stage by module call."""
    known = survey(program)
    nodes = [program.node(name) for name in stage.nodes]
    ordered = [node for node in nodes if not is_silent(node) and node not in known.same]
    root = Region("", program.model_name, 0, 0, end=len(ordered))
    arguments = tuple(program.node(name) for name in stage.arguments)
    layout = Layout(root, program, known, arguments, (), {}, {})
    layout.results = tuple(layout.resolve(program.node(name)) for name in stage.results)
    _nest(layout, ordered)
    for position, node in enumerate(ordered):
        for value in layout.values(node):
            layout.made[value] = position
        for value in layout.reads(node):
            layout.last_use[value] = position
    for value in layout.results:
        layout.last_use[value] = len(ordered)
    return layout


def _nest(layout: Layout, ordered: Sequence[fx.Node]) -> None:
    open_regions: list[tuple[Scope | None, Region]] = [(None, layout.root)]
    for position, node in enumerate(ordered):
        scopes = _scopes(layout.program, node)
        depth = 0
        while depth < min(len(scopes), len(open_regions) - 1):
            if open_regions[depth + 1][0] != scopes[depth]:
                break
            depth += 1
        for _, region in open_regions[depth + 1 :]:
            region.end = position
        del open_regions[depth + 1 :]
        for scope in scopes[depth:]:
            region = Region(scope.path, scope.type_name, scope.call, position)
            open_regions[-1][1].items.append(region)
            open_regions.append((scope, region))
        open_regions[-1][1].items.append(node)
    for _, region in open_regions[1:]:
        region.end = len(ordered)
    _measure(layout, layout.root)


def _scopes(program: Program, node: fx.Node) -> list[Scope]:
    """The module calls below the model itself, each inside the one before."""
    found: list[Scope] = []
    for scope in program.facts[node.name].scopes:
        above = found[-1].path if found else ""
        if scope.path.startswith(f"{above}." if above else "") and scope.path != above:
            found.append(scope)
    return found


def _measure(layout: Layout, region: Region) -> int:
    """Find out which regions are whole module calls, and which only parts of one."""
    count = 0
    for item in region.items:
        count += _measure(layout, item) if isinstance(item, Region) else 1
    if region.path:
        extent = layout.survey.extents[region.path, region.call]
        nodes = list(region.nodes())
        region.whole = count == extent.count
        region.opens = nodes[0].name == extent.first
        region.closes = nodes[-1].name == extent.last
    return count
