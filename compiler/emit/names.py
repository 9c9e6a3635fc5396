"""Names for emitted code: foreign ones made safe, and readable ones for tensors at boundaries."""

import builtins
import keyword
import operator
import re
from collections import Counter
from collections.abc import Collection, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import fx

from p2bw.compiler.emit.hints import OPERATOR_NAMES
from p2bw.compiler.emit.regions import Key, survey
from p2bw.compiler.program import Program

# What the emitted file itself means by these names.
_RESERVED = {
    *dir(builtins),
    *keyword.kwlist,
    *keyword.softkwlist,
    *("self", "torch", "F", "nn", "Tensor", "Stage", "OrderedDict", "opaque", "l", "I", "O"),
}


def identifier(text: str, taken: Collection[str], default: str = "x") -> str:
    """A valid, unreserved and untaken identifier that reads like `text`."""
    name = re.sub(r"[^0-9a-zA-Z_]+", "_", text).strip("_") or default
    if name[0].isdigit():
        name = f"{default}_{name}"
    if name in _RESERVED:
        name += "_"
    if name not in taken:
        return name
    number = 2
    joint = "_" if name[-1].isdigit() else ""
    while f"{name}{joint}{number}" in taken:
        number += 1
    return f"{name}{joint}{number}"


def is_plain(name: str) -> bool:
    """Whether a name can be an attribute after a dot."""
    return name.isidentifier() and name.isascii() and not keyword.iskeyword(name)


def tensor_names(program: Program) -> Mapping[str, str]:
    """A readable name for every node, unique in the program: h_5 for what module h.5 returns."""
    names = _NAMES.get(program.graph)
    if names is None:
        names = _NAMES[program.graph] = _tensor_names(program)
    return names


def short_name(program: Program, node: fx.Node) -> str:
    """What a forward calls a tensor that came from another stage, "" if nothing says."""
    node = _origin(program, node)
    if node.op == "placeholder":
        return node.name
    name = str(getattr(node.target, "_opname", ""))
    if name in OPERATOR_NAMES:
        return OPERATOR_NAMES[name]
    kind = program.facts[node.name].out[0]
    return "mask" if kind.dtype is torch.bool else ""


def _origin(program: Program, node: fx.Node) -> fx.Node:
    """The node that a value was made by, past those that change nothing of it."""
    same = survey(program).same
    while node in same:
        node = same[node]
    return node


_NAMES: "WeakKeyDictionary[fx.Graph, dict[str, str]]" = WeakKeyDictionary()


def _tensor_names(program: Program) -> dict[str, str]:
    module_of: dict[str, str] = {}  # node -> outermost module call that it is the result of
    trunk, given = _trunk(program), _given(program)
    for (path, call), extent in survey(program).extents.items():
        if given[path, call] > 1:
            continue
        if path and len(path) < len(module_of.get(extent.last, path + " ")):
            module_of[extent.last] = path if call == 0 else f"{path}_{call + 1}"
    module_of = {name: path.removeprefix(trunk) for name, path in module_of.items()}
    names: dict[str, str] = {}
    taken: set[str] = set()
    counts: dict[str, int] = {}

    # Of several the last has the plain name, as it is what others read; but inputs keep theirs.
    def rank(node: fx.Node) -> tuple[bool, bool]:
        return node.op != "placeholder", _is_passed_on(program, node)

    for node in sorted(reversed(program.graph.nodes), key=rank):
        if node.op == "placeholder":
            wish = node.name
        elif node.op == "call_function":
            wish = _wish(program, module_of, _origin(program, node), trunk)
        else:
            continue
        name = identifier(wish, ())
        while name in taken:
            counts[wish] = counts.get(wish, 1) + 1
            name = identifier(f"{wish}_{counts[wish]}", ())
        names[node.name] = name
        taken.add(name)
    return names


def _is_passed_on(program: Program, node: fx.Node) -> bool:
    """Whether all that read a node hand it back as it is."""
    same = survey(program).same
    return bool(node.users) and all(same.get(user) is node for user in node.users)


def _given(program: Program) -> Counter[Key]:
    """How many values of each module call are read outside of it."""
    found: Counter[Key] = Counter()
    for node in program.compute_nodes:
        calls = {(scope.path, scope.call) for scope in program.facts[node.name].scopes}
        inside = [
            {(scope.path, scope.call) for scope in program.facts[user.name].scopes}
            for user in node.users
        ]
        found.update(call for call in calls if any(call not in others for others in inside))
    return found


def _trunk(program: Program) -> str:
    """ "transformer." where most of the model is in there, which no name then has to say."""
    first = Counter(
        scope.path.partition(".")[0]
        for node in program.compute_nodes
        for scope in program.facts[node.name].scopes[1:2]
    )
    name, count = max(first.items(), key=lambda item: item[1], default=("", 0))
    paths = [path.removeprefix(f"{name}.") for path, _ in survey(program).extents]
    within = [path.partition(".")[0] for path in paths if path not in ("", name)]
    deep = len(paths) > 2 and not any(part.isdecimal() for part in within)
    return f"{name}." if deep and 2 * count > len(program.compute_nodes) else ""


def _wish(program: Program, module_of: Mapping[str, str], node: fx.Node, trunk: str) -> str:
    if node.op == "placeholder":
        return node.name
    if node.target is operator.getitem:
        producer, index = node.args
        assert isinstance(producer, fx.Node)
        return _wish(program, module_of, producer, trunk) + (f"_{index}" if index else "")
    return module_of.get(node.name) or _place(program, node, trunk)


def _place(program: Program, node: fx.Node, trunk: str) -> str:
    """The module that a node is in, and what it does there."""
    scopes = program.facts[node.name].scopes
    path = max((scope.path for scope in scopes), key=len, default="")
    path = f"{path}.".removeprefix(trunk).removesuffix(".")
    name = str(getattr(node.target, "_opname", "")) or re.sub(r"_\d+$", "", node.name)
    kinds = program.facts[node.name].out
    mask = len(kinds) == 1 and kinds[0].dtype is torch.bool
    name = "mask" if mask else OPERATOR_NAMES.get(name, name.strip("_"))
    return f"{path}_{name}" if path else name
