"""Rules: what the user decides of the placement, by globs over module paths.

In a glob, `*`, `?` and `[..]` stay within one name of a path, and `**` is any number of names:
`h.*.attn` is the attention of each layer, `**.attn` any attention. A module is all that it holds.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import networkx as nx

from p2bw.compiler.drawing import module_of
from p2bw.compiler.problem import Constraints, PlacementProblem
from p2bw.compiler.program import Program
from p2bw.contract.errors import UsageError

NEAR = 3  # names that a message suggests


@dataclass(frozen=True, slots=True)
class Rules:
    """Globs as they were given; `parse_rules` has checked their form."""

    pin: tuple[tuple[str, int], ...] = ()  # all that matches is in this stage
    together: tuple[tuple[str, ...], ...] = ()  # all that matches any of these is in one stage
    apart: tuple[tuple[str, str], ...] = ()  # no stage has of both
    never_cut: tuple[str, ...] = ()  # no call of a module that matches is cut
    cut_after: tuple[str, ...] = ()  # the stages: each ends with this module, the last with all

    @property
    def depth(self) -> int | None:
        """The number of stages, if the cuts are given."""
        return len(self.cut_after) + 1 if self.cut_after else None

    @property
    def texts(self) -> tuple[str, ...]:
        """As options of the command line, for the plan and messages."""
        return (
            *(f"pin {glob}={stage}" for glob, stage in self.pin),
            *(f"together {','.join(globs)}" for globs in self.together),
            *(f"apart {','.join(globs)}" for globs in self.apart),
            *(f"never-cut {glob}" for glob in self.never_cut),
            *(f"cut-after {glob}" for glob in self.cut_after),
        )


def parse_rules(
    pin: Iterable[str] = (),
    together: Iterable[str] = (),
    apart: Iterable[str] = (),
    never_cut: Iterable[str] = (),
    cut_after: Iterable[str] = (),
) -> Rules:
    """Rules as the command line spells them: pin 'wte=0', together 'a,b', apart 'a,b'."""
    rules = Rules(
        pin=tuple(map(_parse_pin, pin)),
        together=tuple(_parse_list("together", text) for text in together),
        apart=tuple(_parse_pair(text) for text in apart),
        never_cut=tuple(never_cut),
        cut_after=tuple(cut_after),
    )
    if "" in (*rules.never_cut, *rules.cut_after):
        raise UsageError("--never-cut and --cut-after want a module: --cut-after h.11")
    return rules


def _parse_pin(text: str) -> tuple[str, int]:
    glob, _, stage = text.rpartition("=")
    if not glob or not re.fullmatch(r"\d{1,6}", stage, re.ASCII):
        raise UsageError(f"--pin {text}: give a module and its stage: --pin 'wte=0'")
    return glob, int(stage)


def _parse_list(option: str, text: str) -> tuple[str, ...]:
    globs = tuple(part.strip() for part in text.split(","))
    if "" in globs:
        raise UsageError(f"--{option} {text}: give modules with commas: --{option} 'h.0,h.1'")
    return globs


def _parse_pair(text: str) -> tuple[str, str]:
    globs = _parse_list("apart", text)
    if len(globs) != 2:
        raise UsageError(f"--apart {text}: give two modules: --apart 'h.0,h.1'")
    return globs[0], globs[1]


def check_rules(rules: Rules, gpus: int, depth: int | None) -> None:
    """Refuse, before any long work, what no model could be given."""
    if rules.depth is not None and depth not in (None, rules.depth):
        raise UsageError(
            f"{len(rules.cut_after)} --cut-after make {rules.depth} stages, not {depth}; "
            f"leave --depth out"
        )
    if rules.depth is not None and rules.depth > gpus:
        raise UsageError(
            f"{len(rules.cut_after)} --cut-after make {rules.depth} stages, more than {gpus} "
            f"device{'s' * (gpus > 1)}"
        )
    last = (rules.depth or depth or gpus) - 1
    for glob, stage in rules.pin:
        if stage > last:
            raise UsageError(f"--pin {glob}={stage}: the last stage can be {last}")


def constraints_of(rules: Rules, program: Program, problem: PlacementProblem) -> Constraints:
    """The rules as constraints on blocks; UsageError for what matches nothing or contradicts."""
    if not rules.texts:
        return Constraints()
    modules, flow = _Modules(program), _flow(problem)
    decided: dict[str, _Decision] = {}  # by block
    for decision, blocks in (*_segments(rules, modules, flow), *_pins(rules, modules)):
        for name in blocks:
            known = decided.setdefault(name, decision)
            if known.stage != decision.stage:
                raise _contradiction(known, decision, f"both decide of {name}")
    together = list(_together(rules, modules))
    _check_flow(flow, decided)
    _check_sets(decided, together)
    stages: dict[int, list[str]] = {}
    for name, decision in decided.items():
        stages.setdefault(decision.stage, []).append(name)
    sets = (*map(tuple, stages.values()), *(blocks for _, blocks in together))
    return Constraints(
        # The decided blocks of a stage are together, so that the pin of one is that of all.
        pin={stages[k][0]: k for k in sorted(stages)},
        together=tuple(blocks for blocks in dict.fromkeys(sets) if len(blocks) > 1),
        apart=tuple(dict.fromkeys(_apart(rules, modules, flow))),
    )


@dataclass(frozen=True, slots=True)
class _Decision:
    """That a block is in a stage, and the option that says so."""

    stage: int
    option: str


def _contradiction(first: _Decision, second: _Decision, why: str) -> UsageError:
    return UsageError(f"{first.option} and {second.option} contradict each other ({why}); drop one")


class _Modules:
    """The modules of a program, by their paths."""

    def __init__(self, program: Program) -> None:
        assert program.blocks is not None, "group_blocks has not run"
        self._named: dict[str, list[str]] = {}  # blocks named after a module
        self._calls: dict[str, list[tuple[str, ...]]] = {}  # blocks with nodes of each call
        calls: dict[tuple[str, int], dict[str, None]] = {}
        for block in program.blocks:
            self._named.setdefault(module_of(block.name), []).append(block.name)
            for node in block.nodes:
                for scope in program.facts[node].scopes:
                    calls.setdefault((scope.path, scope.call), {})[block.name] = None
        for (path, _), blocks in calls.items():
            self._calls.setdefault(path, []).append(tuple(blocks))
        self.paths = tuple(
            dict.fromkeys(
                ".".join(names[: i + 1])
                for path in (*self._named, *self._calls)
                if path
                for names in [path.split(".")]
                for i in range(len(names))
            )
        )

    def matching(self, option: str, glob: str) -> list[str]:
        """The paths that a glob matches; UsageError if there are none."""
        globs = glob.split(".")
        found = [path for path in self.paths if matches(globs, path.split("."))]
        if found:
            return found
        near = difflib.get_close_matches(glob, self.paths, NEAR, 0.5)
        top = [path for path in self.paths if "." not in path]
        hint = f"near it are {', '.join(near)}" if near else f"at the top are {', '.join(top)}"
        raise UsageError(f"--{option} {glob} matches no module of the model; {hint}")

    def within(self, path: str) -> list[str]:
        """The blocks of a module, or those that have some of it if none is its own."""

        def inside(other: str) -> bool:
            return f"{other}.".startswith(f"{path}.")

        own = [name for other, names in self._named.items() if inside(other) for name in names]
        if own:
            return own
        calls = (call for other, found in self._calls.items() if inside(other) for call in found)
        return list(dict.fromkeys(name for call in calls for name in call))

    def blocks(self, option: str, globs: Iterable[str]) -> tuple[str, ...]:
        paths = [path for glob in globs for path in self.matching(option, glob)]
        return tuple(dict.fromkeys(name for path in paths for name in self.within(path)))

    def calls(self, option: str, glob: str) -> Iterator[tuple[str, ...]]:
        """All that has a part in a call, for each call of each module that matches."""
        for path in self.matching(option, glob):
            if path in self._calls:
                yield from self._calls[path]
            else:  # a container, which is never called itself
                yield tuple(self.within(path))


def matches(globs: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a path matches a glob, both in their parts; ** stands for any number of them."""
    if not globs or not names:
        return not names and all(glob == "**" for glob in globs)
    if globs[0] == "**":
        return matches(globs[1:], names) or matches(globs, names[1:])
    return fnmatch.fnmatchcase(names[0], globs[0]) and matches(globs[1:], names[1:])


def _flow(problem: PlacementProblem) -> nx.DiGraph:
    """The blocks in their order, and which of them needs which."""
    flow = nx.DiGraph()
    flow.add_nodes_from(block.name for block in problem.blocks)
    flow.add_edges_from((t.producer, consumer) for t in problem.tensors for consumer in t.consumers)
    place = {name: i for i, name in enumerate(flow)}
    ordered = nx.DiGraph()
    ordered.add_nodes_from(nx.lexicographical_topological_sort(flow, key=place.__getitem__))
    ordered.add_edges_from(flow.edges)
    return ordered


def _segments(
    rules: Rules, modules: _Modules, flow: nx.DiGraph
) -> Iterator[tuple[_Decision, Sequence[str]]]:
    """The stages that the cuts make: all up to the end of each module, in the program's order."""
    order = list(flow)
    place = {name: i for i, name in enumerate(order)}
    begin, option = 0, ""
    for k, path in enumerate(rules.cut_after):
        found = modules.matching("cut-after", path)
        if len(found) > 1:
            raise UsageError(
                f"--cut-after {path} matches {len(found)} modules ({_few(found)}); name one"
            )
        before, option = option, f"--cut-after {path}"
        end = 1 + max(place[name] for name in modules.within(found[0]))
        if end <= begin:
            raise UsageError(f"{option} is not behind {before}: give the cuts in order, each once")
        if end == len(order):
            raise UsageError(f"{option} leaves nothing for a stage behind it; leave it out")
        yield _Decision(k, option), order[begin:end]
        begin = end
    if option:
        yield _Decision(len(rules.cut_after), option), order[begin:]


def _pins(rules: Rules, modules: _Modules) -> Iterator[tuple[_Decision, Sequence[str]]]:
    for glob, stage in rules.pin:
        yield _Decision(stage, f"--pin {glob}={stage}"), modules.blocks("pin", [glob])


def _together(rules: Rules, modules: _Modules) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Sets of blocks of one stage, each behind the option that says so."""
    for globs in rules.together:
        yield f"--together {','.join(globs)}", modules.blocks("together", globs)
    for glob in rules.never_cut:
        for blocks in modules.calls("never-cut", glob):
            yield f"--never-cut {glob}", blocks


def _apart(rules: Rules, modules: _Modules, flow: nx.DiGraph) -> Iterator[tuple[str, str]]:
    for globs in rules.apart:
        first, second = (modules.blocks("apart", [glob]) for glob in globs)
        if both := [name for name in first if name in second]:
            raise UsageError(f"--apart {','.join(globs)}: both have {_few(both)}")
        yield from pairs_apart(flow, first, second)


def pairs_apart(
    flow: nx.DiGraph, first: Sequence[str], second: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The pairs of blocks that must be apart so that no stage has some of both.

    What lies on a path between two blocks of a stage is in it too: a pair with another block of
    either side between them is apart if the nearer pairs are.
    """
    members = {*first, *second}
    behind = {name: nx.descendants(flow, name) & members for name in members}
    far = {name: set().union(*(behind[b] for b in behind[name])) for name in members}
    for a, b in product(first, second):
        near = b in behind[a] - far[a] or a in behind[b] - far[b]
        if near or not (b in behind[a] or a in behind[b]):
            yield a, b


def _check_flow(flow: nx.DiGraph, decided: Mapping[str, _Decision]) -> None:
    """No block may be decided to be before one that it needs."""
    latest: dict[str, _Decision] = {}  # of what each block needs, directly or not
    for name in flow:
        needs = [latest[other] for other in flow.predecessors(name) if other in latest]
        last = max(needs, key=lambda decision: decision.stage, default=None)
        own = decided.get(name)
        if own is not None and last is not None and own.stage < last.stage:
            raise _contradiction(last, own, f"{name} needs what stage {last.stage} computes")
        if own is not None or last is not None:
            latest[name] = own or last  # type: ignore[assignment]


def _check_sets(
    decided: Mapping[str, _Decision], together: Iterable[tuple[str, tuple[str, ...]]]
) -> None:
    """No set of blocks of one stage may have been decided to be in two."""
    for option, blocks in together:
        first: _Decision | None = None
        for own in (decided[name] for name in blocks if name in decided):
            first = first or own
            if own.stage != first.stage:
                others = " and ".join(dict.fromkeys((first.option, own.option)))
                raise UsageError(f"{option} is contradicted by {others}; drop one of them")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
