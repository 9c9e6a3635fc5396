"""group_blocks: gather nodes into blocks that the placement moves as one."""

import heapq
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from operator import getitem

import networkx as nx
import torch
from torch import fx

from p2bw.compiler.placement.contraction import Contraction, Size, UnionFind
from p2bw.compiler.program import Block, Program, tensor_arguments
from p2bw.compiler.storage import Storage, is_contiguous, storage_of

_aten = torch.ops.aten
# These fail, or mean something else, if their input's strides change.
_STRIDE_SENSITIVE = frozenset(
    (
        _aten.view.default,
        _aten.view.dtype,
        _aten.view_as.default,
        _aten.view_as_complex.default,
        _aten.as_strided.default,
    )
)


def group_blocks(program: Program) -> Program:
    """Divide the compute nodes into the smallest blocks whose graph has no cycle.

    Nodes that cannot be told apart stay together: a tuple and its items, writes in place and those
    who see them. What takes no time and has no parameters (a view) goes with the operator that it
    serves, so that layers which each take a view of the same tensor, like a table of angles, can
    all be sent that one tensor. How many blocks the placement looks at at once is its own business
    (compiler/placement/coarsen.py).
    """
    nodes = program.compute_nodes
    groups = _mandatory_groups(program, nodes)
    group_of = {node: i for i, group in enumerate(groups) for node in group}
    contraction = Contraction(_sizes(program, nodes, groups), _cuts(program, nodes, group_of))
    contraction.run(0.0)
    merged = [
        sorted(chain.from_iterable(groups[i] for i in members))
        for members in contraction.joined.groups()
    ]
    blocks = [[nodes[i] for i in members] for members in _topological(nodes, merged)]
    names = _unique(_block_name(program, members) for members in blocks)
    return replace(
        program,
        blocks=tuple(
            Block(name, tuple(node.name for node in members))
            for name, members in zip(names, blocks, strict=True)
        ),
        history=(*program.history, "group_blocks"),
    )


def _mandatory_groups(program: Program, nodes: Sequence[fx.Node]) -> list[tuple[int, ...]]:
    """What must stay together, and then whatever lies on a cycle between such groups."""
    position = {node: i for i, node in enumerate(nodes)}
    joined = UnionFind(len(nodes))
    for members in chain(
        _tuples(program, nodes),
        _writes(program, nodes),
        _strided(program, nodes),
        _loners(program, nodes),
        _constants(nodes),
        _views(program, nodes),
    ):
        for a, b in pairwise(members):
            joined.union(position[a], position[b])
    graph = nx.DiGraph()
    graph.add_nodes_from(joined.find(i) for i in range(len(nodes)))
    graph.add_edges_from(
        (joined.find(position[argument]), joined.find(i))
        for i, node in enumerate(nodes)
        for argument in tensor_arguments(node)
        if argument in position
    )
    for component in nx.strongly_connected_components(graph):
        for a, b in pairwise(component):
            joined.union(a, b)
    return _topological(nodes, [list(group) for group in joined.groups()])


def _tuples(program: Program, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Only single tensors travel between stages: the items of a tuple stay with it."""
    for node in nodes:
        users = list(node.users)
        if len(program.facts[node.name].out) != 1 or any(u.target is getitem for u in users):
            yield [node, *(user for user in users if user.op == "call_function")]


def _writes(program: Program, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Who makes, sees or writes memory stays together until the last write to it.

    Each stage has its own copy of the model's buffers and the program's inputs, so for those all
    users stay together.
    """
    last_write: dict[Storage, int] = {}
    seen: list[set[Storage]] = []
    for i, node in enumerate(nodes):
        arguments = tensor_arguments(node)
        stores = [
            storage_of(program, a.name) if _is_tensor(program, a) else None for a in arguments
        ]
        for index in program.fact(node, "mutates"):
            store = stores[index]
            assert store is not None, f"{node.name} writes into a tuple"
            last_write[store] = i
        touched = {store for store in stores if store is not None}
        seen.append(touched | {storage_of(program, node.name, o) for o in _outputs(program, node)})
    members: dict[Storage, list[fx.Node]] = {store: [] for store in last_write}
    for i, (node, touched) in enumerate(zip(nodes, seen, strict=True)):
        for store in touched & last_write.keys():
            if i <= last_write[store] or program.node(store[0]).op != "call_function":
                members[store].append(node)
    yield from members.values()


def _is_tensor(program: Program, node: fx.Node) -> bool:
    return len(program.facts[node.name].out) == 1


def _outputs(program: Program, node: fx.Node) -> range:
    return range(len(program.facts[node.name].out))


def _strided(program: Program, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Tensors arrive contiguous, so views that make or need other strides stay with each other."""
    for node in nodes:
        users = [user for user in node.users if user.op == "call_function"]
        if len(node.users) == 1 and users and not _is_contiguous(program, node):
            (user,) = users
            if _viewed(program, node) is not None or _viewed(program, user) is node:
                yield [node, user]
        if node.target in _STRIDE_SENSITIVE:
            current = node
            while source := _viewed(program, current):
                if not _is_contiguous(program, source):
                    yield [source, current]
                current = source


def _viewed(program: Program, node: fx.Node) -> fx.Node | None:
    """The computed tensor that a node's output is a view of."""
    alias = program.fact(node, "alias")
    if node.op != "call_function" or not alias or alias[0] is None:
        return None
    source = tensor_arguments(node)[alias[0]]
    return source if source.op == "call_function" else None


def _is_contiguous(program: Program, node: fx.Node) -> bool:
    return all(map(is_contiguous, program.facts[node.name].out, program.fact(node, "strides")))


def _loners(program: Program, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """A node without edges (a counter's increment) goes with the next of its module."""
    for i, node in enumerate(nodes):
        arguments = tensor_arguments(node)
        if node.users or any(a.op == "call_function" for a in arguments) or len(nodes) == 1:
            continue
        near = [*nodes[i + 1 :], *reversed(nodes[:i])]
        path = _path(program, node)
        yield [node, next((other for other in near if _path(program, other) == path), near[0])]


def _constants(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """What depends on no tensor (a range of positions) is made where it is used, if once."""
    constant: set[fx.Node] = set()
    for node in nodes:
        if constant.issuperset(tensor_arguments(node)):
            constant.add(node)
            if len(node.users) == 1:
                yield [node, *(user for user in node.users if user.op == "call_function")]


def _views(program: Program, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """A view of what others read too is made where it is first used, if it is no smaller."""
    for node in nodes:
        source = _viewed(program, node) if _seconds(program, node) == 0 else None
        users = [user for user in node.users if user.op == "call_function"]
        if source is None or len(source.users) < 2 or not users:
            continue
        if not (_is_tensor(program, node) and _is_tensor(program, source)):
            continue
        (kind,), (viewed,) = program.facts[node.name].out, program.facts[source.name].out
        if kind.bytes >= viewed.bytes:
            yield [node, users[0]]


def _path(program: Program, node: fx.Node) -> str | None:
    """The innermost module that a node belongs to; None outside of the model."""
    scopes = program.facts[node.name].scopes
    return scopes[-1].path if scopes else None


def _topological(nodes: Sequence[fx.Node], groups: list[list[int]]) -> list[tuple[int, ...]]:
    """Groups of node positions sorted topologically, as near to program order as can be."""
    position = {node: i for i, node in enumerate(nodes)}
    group_of = {i: g for g, group in enumerate(groups) for i in group}
    before: list[set[int]] = [set() for _ in groups]
    after: list[set[int]] = [set() for _ in groups]
    for i, node in enumerate(nodes):
        for argument in tensor_arguments(node):
            u, v = group_of.get(position.get(argument, -1)), group_of[i]
            if u is not None and u != v:
                before[v].add(u)
                after[u].add(v)
    waiting = [len(found) for found in before]
    ready = [(groups[g][0], g) for g, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order: list[tuple[int, ...]] = []
    while ready:
        _, g = heapq.heappop(ready)
        order.append(tuple(groups[g]))
        for v in after[g]:
            waiting[v] -= 1
            if not waiting[v]:
                heapq.heappush(ready, (groups[v][0], v))
    assert len(order) == len(groups), "the graph of blocks has a cycle"
    return order


def _sizes(
    program: Program, nodes: Sequence[fx.Node], groups: Sequence[tuple[int, ...]]
) -> list[Size]:
    """Each group's share of the program's time and of its parameters' bytes."""
    seconds = [_seconds(program, node) for node in nodes]
    weights = [0] * len(nodes)
    counted: set[str] = set()
    for i, node in enumerate(nodes):
        for argument in tensor_arguments(node):
            target = str(argument.target)
            if argument.op == "get_attr" and target in program.parameters and target not in counted:
                counted.add(target)
                weights[i] += program.parameters[target].type.bytes
    all_seconds, all_weights = math.fsum(seconds) or 1.0, sum(weights) or 1
    return [
        (
            math.fsum(seconds[i] for i in group) / all_seconds,
            sum(weights[i] for i in group) / all_weights,
        )
        for group in groups
    ]


def _seconds(program: Program, node: fx.Node) -> float:
    seconds: float = program.fact(node, "forward_s") + program.fact(node, "backward_s")
    return seconds


def _cuts(
    program: Program, nodes: Sequence[fx.Node], group_of: dict[int, int]
) -> dict[tuple[int, int], int]:
    """Per edge between groups: the bytes alive, in program order, where it would be cut."""
    position = {node: i for i, node in enumerate(nodes)}
    alive = _alive(program, nodes, position)
    cuts: dict[tuple[int, int], int] = {}
    for i, node in enumerate(nodes):
        for argument in tensor_arguments(node):
            start = position.get(argument)
            if start is None or group_of[start] == group_of[i]:
                continue
            edge = (group_of[start], group_of[i])
            cut = min(alive[start], alive[i - 1])
            cuts[edge] = min(cut, cuts.get(edge, cut))
    return cuts


def _alive(program: Program, nodes: Sequence[fx.Node], position: dict[fx.Node, int]) -> list[int]:
    """Per node: bytes of tensors made up to it and used after it, with their gradients."""
    change = [0] * (len(nodes) + 1)
    for i, node in enumerate(nodes):
        uses = [position[user] for user in node.users if user in position]
        if uses and _is_tensor(program, node):
            (kind,), (gradient,) = program.facts[node.name].out, program.fact(node, "requires_grad")
            change[i] += kind.bytes * (1 + gradient)
            change[max(uses)] -= kind.bytes * (1 + gradient)
    alive: list[int] = []
    for step in change[:-1]:
        alive.append((alive[-1] if alive else 0) + step)
    return alive


def _block_name(program: Program, members: Sequence[fx.Node]) -> str:
    """The deepest module that holds all of a block that matters, by time; "loss" outside."""
    seconds = [_seconds(program, node) for node in members]
    most = max(seconds)
    heaviest = members[seconds.index(most)]
    matter = [node for node, s in zip(members, seconds, strict=True) if 20 * s >= most]
    paths = [path for node in matter if (path := _path(program, node)) is not None]
    scopes = [scope.path for scope in program.facts[heaviest.name].scopes]
    if not scopes:
        return "loss"
    common = scopes[0]
    for path in scopes:
        if all(other == path or other.startswith(f"{path}.") or not path for other in paths):
            common = path
    if common == "" and len(scopes) > 1:
        common = scopes[1]  # the part of the model where the time goes
    return common or program.model_name


def _unique(names: Iterable[str]) -> list[str]:
    """The names, with #2, #3 .. behind those that were there before.

    A name that looks like that itself has #1 as well, so that what is behind the last # is ours.
    """
    count: dict[str, int] = {}
    found: list[str] = []
    for name in names:
        count[name] = count.get(name, 0) + 1
        numbered = count[name] > 1 or re.search(r"#\d+$", name)
        found.append(f"{name}#{count[name]}" if numbered else name)
    return found
