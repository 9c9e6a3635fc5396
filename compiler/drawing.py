"""Drawing: the graph of a plan as nodes and edges, at the level of the model's layers."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Literal

from p2bw.compiler import units
from p2bw.compiler.plan import Plan, Stage, TransferSpec
from p2bw.compiler.problem import BlockCost, PlacementProblem
from p2bw.contract.errors import MismatchError


@dataclass(frozen=True, slots=True)
class Node:
    """A layer or module, several alike in a row, or the port of a tensor that a stage receives."""

    key: str  # s0n3, unique in the drawing
    label: str
    kind: Literal["module", "port"] = "module"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A stage: its numbers in a few lines, and its nodes in the program's order."""

    title: tuple[str, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """flow: data inside a stage; cut: a tensor sent to another; tied: one parameter in both."""

    source: str
    target: str
    kind: Literal["flow", "cut", "tied"]
    label: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawing:
    """What `p2bw show --graph` draws, in whichever language."""

    name: str
    clusters: tuple[Cluster, ...]
    lines: tuple[Line, ...]


def module_of(block: str) -> str:
    """The module path that a block is named after: h.3.attn#2 -> h.3.attn."""
    return re.sub(r"#\d+$", "", block)


def draw(plan: Plan, problem: PlacementProblem) -> Drawing:
    """The graph of a plan; `problem` is what was solved for it (problem.json)."""
    stage_of = {name: stage.index for stage in plan.stages for name in stage.blocks}
    if stage_of.keys() != {block.name for block in problem.blocks}:
        raise MismatchError("plan.json and problem.json are of different models; compile anew")
    units_of = _units(stage_of)
    home: dict[str, Node] = {}  # of each block
    nodes: list[list[Node]] = []
    for stage in plan.stages:
        found = list(_nodes(plan, stage, units_of, {b.name: b for b in problem.blocks}))
        nodes.append([node for node, _ in found])
        home |= {name: node for node, blocks in found for name in blocks}
    cuts = _cuts(plan, problem, home, nodes)
    return Drawing(
        name=plan.model.name,
        clusters=tuple(
            Cluster(tuple(_title(stage)), tuple(own))
            for stage, own in zip(plan.stages, nodes, strict=True)
        ),
        lines=(*_flows(problem, home, stage_of), *cuts, *_tied(plan, problem, home)),
    )


def _units(blocks: Iterable[str]) -> dict[str, str]:
    """By module path of a block, the module that is drawn for it.

    That is the first numbered one on the path (h.3); where none is, the largest module that holds
    no numbered ones, nor names that end in a number (denseblock1).
    """
    paths = list(dict.fromkeys(map(module_of, blocks)))
    within: dict[str, set[str]] = {}  # by prefix, the names further down
    for path in paths:
        names = path.split(".")
        for i in range(1, len(names)):
            within.setdefault(".".join(names[:i]), set()).update(names[i:])

    def unit(path: str) -> str:
        names = path.split(".")
        prefixes = [".".join(names[: i + 1]) for i in range(len(names))]
        for prefix, name in zip(prefixes, names, strict=True):
            if name.isdecimal():
                return prefix
        for prefix, name in zip(prefixes, names, strict=True):
            below = within.get(prefix, set())
            numbered = [other for other in below if other[-1:].isdecimal()]
            if not any(map(str.isdecimal, below)) and (name[-1:].isdecimal() or not numbered):
                return prefix
        return path

    return {path: unit(path) for path in paths}


def _nodes(
    plan: Plan, stage: Stage, units_of: Mapping[str, str], costs: Mapping[str, BlockCost]
) -> Iterator[tuple[Node, list[str]]]:
    """The nodes of a stage with their blocks; layers that are alike and in a row are one node."""
    elsewhere = {
        units_of[module_of(name)]
        for other in plan.stages
        if other.index != stage.index
        for name in other.blocks
    }
    drawn = set(units_of.values())
    glued = {
        unit
        for unit in drawn
        if unit == plan.model.name or any(other.startswith(f"{unit}.") for other in drawn)
    }
    foreign = [own.module for own in plan.opaque]
    runs: list[_Run] = []
    # In the program's order, so that no line goes back: what comes again is another node.
    for unit, group in groupby(stage.blocks, lambda name: units_of[module_of(name)]):
        blocks = list(group)
        kind: Literal["glue", "part", "whole"]
        kind = "glue" if unit in glued else "part" if unit in elsewhere else "whole"
        run = _Run(kind, unit, unit, tuple(_shape(unit, costs[name]) for name in blocks), blocks)
        if runs and run.continues(runs[-1]):
            runs[-1] = replace(runs[-1], last=unit, blocks=[*runs[-1].blocks, *blocks])
        else:
            runs.append(run)
    for i, run in enumerate(runs):
        inside = [p for p in foreign if any(_is_within(module_of(b), p) for b in run.blocks)]
        yield Node(f"s{stage.index}n{i}", run.label + _opaque(run, inside)), run.blocks


def _opaque(run: "_Run", inside: list[str]) -> str:
    """What of a run is the user's own code, called as it is."""
    if not inside:
        return ""
    names = dict.fromkeys(_below(run, path) for path in inside)
    return f" [opaque{': ' if any(names) else ''}{', '.join(filter(None, names))}]"


def _below(run: "_Run", path: str) -> str:
    """A module's path within the layer of a run that it is in: h.4.moe is moe in h.3-h.5."""
    if _is_within(path, run.first):
        return path.removeprefix(run.first).removeprefix(".")
    container = run.first.rpartition(".")[0]
    return path.removeprefix(f"{container}.").partition(".")[2]


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


@dataclass(frozen=True, slots=True)
class _Run:
    """A unit, or several that are alike with numbers in a row."""

    kind: Literal["glue", "part", "whole"]
    first: str
    last: str
    alike: tuple[tuple[object, ...], ...]  # of each
    blocks: list[str]  # of all

    def continues(self, before: "_Run") -> bool:
        number = re.search(r"\d+$", before.last)
        return (
            self.kind == before.kind == "whole"
            and self.alike == before.alike
            and number is not None
            and self.first == f"{before.last[: number.start()]}{int(number[0]) + 1}"
        )

    @property
    def label(self) -> str:
        match self.kind:
            case "glue":
                return f"{self.first} (glue)"
            case "part":
                return f"part of {self.first}"
            case "whole":
                return self.first if self.first == self.last else f"{self.first}-{self.last}"


def _shape(unit: str, block: BlockCost) -> tuple[object, ...]:
    """What is the same of two layers' blocks if the layers are alike."""
    costs = (block.forward_s, block.backward_s, block.stash_bytes, block.transient_bytes)
    return block.name.removeprefix(unit), *costs, block.buffer_bytes


def _title(stage: Stage) -> Iterator[str]:
    ranks = f"rank{'s' * (len(stage.devices) > 1)} {units.ranges(stage.devices)}"
    yield f"stage {stage.index} on {ranks}"
    memory = f"{units.data(stage.memory.total)} of {units.data(stage.memory.limit)}"
    again = ", recomputes" if stage.recompute else ""
    yield f"{units.seconds(stage.compute_s.total)}{again}, {memory}"
    if stage.inputs:
        yield f"reads {', '.join(stage.inputs)}"


def _flows(
    problem: PlacementProblem, home: Mapping[str, Node], stage_of: Mapping[str, int]
) -> list[Line]:
    found: dict[Line, None] = {}
    for tensor in problem.tensors:
        for consumer in tensor.consumers:
            source, target = home[tensor.producer], home[consumer]
            inside = stage_of[tensor.producer] == stage_of[consumer]
            # An edge that only keeps an order has a name that no tensor has.
            if inside and source != target and tensor.name.isidentifier():
                found[Line(source.key, target.key, "flow")] = None
    return list(found)


def _cuts(
    plan: Plan, problem: PlacementProblem, home: Mapping[str, Node], nodes: list[list[Node]]
) -> list[Line]:
    """All transfers, each with its bytes; those with the same ends in one line.

    A tensor with several readers in a stage, or one that is passed on, comes in at a port there,
    which is added to `nodes`.
    """
    tensors = {tensor.name: tensor for tensor in problem.tensors}
    stage_of = {name: stage.index for stage in plan.stages for name in stage.blocks}
    ports: dict[tuple[str, int], Node] = {}
    cuts: dict[tuple[str, str], list[str]] = {}
    inside: list[Line] = []
    for stage in plan.stages:
        for sent in stage.sends:
            if sent.tensor not in tensors:
                raise MismatchError(f"problem.json has no tensor {sent.tensor}; compile anew")
            tensor = tensors[sent.tensor]
            readers = [home[c] for c in tensor.consumers if stage_of[c] == sent.peer]
            targets = list(dict.fromkeys(readers))
            source = ports.get((sent.tensor, stage.index), home[tensor.producer])
            if len(targets) == 1 and not _is_sent(sent.tensor, plan.stages[sent.peer]):
                (target,) = targets
            else:
                own = nodes[sent.peer]
                target = Node(f"s{sent.peer}n{len(own)}", sent.tensor, "port")
                own.append(target)
                ports[sent.tensor, sent.peer] = target
                inside += [Line(target.key, reader.key, "flow") for reader in targets]
            cuts.setdefault((source.key, target.key), []).append(_label(sent))
    return [*(Line(*ends, "cut", tuple(labels)) for ends, labels in cuts.items()), *inside]


def _is_sent(tensor: str, stage: Stage) -> bool:
    return any(sent.tensor == tensor for sent in stage.sends)


def _label(sent: TransferSpec) -> str:
    gradient = "" if sent.gradient else ", no gradient"
    return f"{sent.tensor} {sent.dtype}{list(sent.shape)} {units.data(sent.bytes)}{gradient}"


def _tied(plan: Plan, problem: PlacementProblem, home: Mapping[str, Node]) -> Iterator[Line]:
    """Between the nodes that share parameters: which, or how many."""
    names = {tied.names[0]: tied.names for tied in plan.tied}
    shared: dict[tuple[str, str], list[str]] = {}
    for parameter in problem.parameters:
        keys = dict.fromkeys(home[block].key for block in parameter.blocks)
        for ends in pairwise(keys):
            shared.setdefault(ends, []).append(parameter.name)
    for (source, target), own in shared.items():
        first, *others = names.get(own[0], own)
        label = (first, *(f"= {name}" for name in others))
        yield Line(
            source, target, "tied", label if len(own) == 1 else (f"{len(own)} shared parameters",)
        )
