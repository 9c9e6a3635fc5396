"""compare: what moved between two artifacts, in module paths."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from p2bw.compiler.drawing import module_of
from p2bw.compiler.plan import Plan, Stage, read_plan

Pair = tuple[Any, Any]  # before, after; None where there is none


@dataclass(frozen=True, slots=True)
class Move:
    """A module, or what it does besides its parts, and its stages; () where it is not there."""

    module: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageChange:
    """A position of the pipeline in both plans; None where one has no such stage."""

    index: int
    seconds: Pair
    memory: Pair  # bytes
    recompute: Pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two plans side by side. Pairs are (before, after)."""

    equal: bool
    settings: Mapping[str, Pair]  # those that differ
    stages: tuple[StageChange, ...]  # those that differ
    moves: tuple[Move, ...]
    code: tuple[int, ...]  # stages whose code differs
    period_s: Pair
    samples_per_s: Pair
    utilisation: Pair
    bytes_per_sample: Pair

    def to_json(self) -> dict[str, Any]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["settings"] = dict(self.settings)
        for name in ("stages", "moves"):
            found[name] = [{f.name: getattr(x, f.name) for f in fields(x)} for x in found[name]]
        return found


def compare(before: Path, after: Path) -> Difference:
    """Compare two artifact folders; InputFileError for what is none."""
    old, new = read_plan(before), read_plan(after)
    code = tuple(_different_code(before, after, max(old.depth, new.depth)))
    return Difference(
        equal=old == new and not code,
        settings=_different(_settings(old), _settings(new)),
        stages=tuple(_stages(old, new)),
        moves=tuple(moves_between(_homes(old), _homes(new))),
        code=code,
        period_s=(old.period_s, new.period_s),
        samples_per_s=(old.samples_per_s, new.samples_per_s),
        utilisation=(old.utilisation, new.utilisation),
        bytes_per_sample=(old.bytes_per_sample, new.bytes_per_sample),
    )


def _settings(plan: Plan) -> dict[str, Any]:
    """What was given to the compiler or chosen for the whole plan, by name."""
    model, topology = plan.model, plan.topology
    return {
        "p2bw": plan.p2bw_version,
        "torch": plan.torch_version,
        "model file": f"{model.file} {model.sha256[:12]}",
        "model": f"{model.name} by {model.factory}",
        **{f"--set {name}": value for name, value in model.settings.items()},
        "autocast": model.autocast,
        "cluster": topology.get("name"),
        "device": topology.get("device"),
        "devices": topology.get("gpus"),
        "links": {k: v for k, v in topology.items() if k not in ("name", "device", "gpus")},
        "schedule": plan.schedule,
        "depth": plan.depth,
        "width": plan.width,
        "microbatch": plan.microbatch,
        "microbatches per update": plan.microbatches_per_update,
        "early microbatches": plan.extra_in_flight,
        "clip norm": plan.clip_norm,
        "constraints": plan.constraints,
        "opaque modules": [opaque.module for opaque in plan.opaque],
        "proof": plan.optimality.status,
    }


def _different(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Pair]:
    names = dict.fromkeys((*old, *new))
    pairs = {name: (old.get(name), new.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _different_code(before: Path, after: Path, depth: int) -> Iterator[int]:
    for k in range(depth):
        first, second = (folder / "stages" / f"stage_{k}.py" for folder in (before, after))
        if not (first.is_file() and second.is_file()) or first.read_bytes() != second.read_bytes():
            yield k


def _stages(old: Plan, new: Plan) -> Iterator[StageChange]:
    for k in range(max(old.depth, new.depth)):
        pair = [plan.stages[k] if k < plan.depth else None for plan in (old, new)]
        change = StageChange(k, *zip(*map(_numbers, pair), strict=True))
        if any(a != b for a, b in (change.seconds, change.memory, change.recompute)):
            yield change


def _numbers(stage: Stage | None) -> tuple[float | None, int | None, bool | None]:
    if stage is None:
        return None, None, None
    return stage.compute_s.total, stage.memory.total, stage.recompute


def moves_between(before: Mapping[str, int], after: Mapping[str, int]) -> Iterator[Move]:
    """From the stage of each block: the largest modules that moved as a whole, and else parts."""
    names = tuple(dict.fromkeys((*before, *after)))
    tree: dict[str, dict[str, None]] = {"": {}}  # by module path, those right below
    for name in names:
        path = ""
        for part in module_of(name).split("."):
            path, above = f"{path}.{part}".lstrip("."), path
            tree[above][path] = None
            tree.setdefault(path, {})

    def moves(path: str, around: Iterable[str]) -> Iterator[Move]:
        inside = [name for name in around if f"{module_of(name)}.".startswith(f"{path}.")]
        places = {(before.get(name), after.get(name)) for name in inside}
        if all(a == b for a, b in places):
            return
        move = Move(path, _stages_of(before, inside), _stages_of(after, inside))
        if len(move.before) <= 1 and len(move.after) <= 1:
            yield move
            return
        own = [name for name in inside if module_of(name) == path]
        yield from _own_moves(f"{path} ({'glue' if tree[path] else 'part'})", own, before, after)
        for child in tree[path]:
            yield from moves(child, inside)

    for child in tree[""]:
        yield from moves(child, names)


def _homes(plan: Plan) -> dict[str, int]:
    return {name: stage.index for stage in plan.stages for name in stage.blocks}


def _stages_of(homes: Mapping[str, int], blocks: Iterable[str]) -> tuple[int, ...]:
    return tuple(sorted({homes[name] for name in blocks if name in homes}))


def _own_moves(
    label: str, own: list[str], before: Mapping[str, int], after: Mapping[str, int]
) -> Iterator[Move]:
    """Of what a module does itself, besides its parts, the blocks that moved."""
    moves = (Move(label, _stages_of(before, [n]), _stages_of(after, [n])) for n in own)
    yield from dict.fromkeys(move for move in moves if move.before != move.after)
