"""p2bw diff: what moved between two artifacts."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2bw.app import Debug, Json, Quiet, app, print_json, reporting

if TYPE_CHECKING:
    from p2bw.compiler.difference import Difference, Move

_LONGEST = 120  # characters of one setting


@app.command("diff")
def diff_command(
    before: Annotated[Path, typer.Argument(metavar="A", help="An artifact of compile.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if they differ, as git diff does.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what changed from artifact A to B: settings, speed, and which modules moved."""
    with reporting(debug):
        from p2bw.compiler.difference import compare

        found = compare(before, after)
        if as_json:
            print_json(found.to_json())
        elif not quiet:
            typer.echo("\n".join(_lines(found)))
    if exit_code and not found.equal:
        raise typer.Exit(1)


def _lines(found: "Difference") -> Iterator[str]:
    from p2bw.compiler import units

    if found.equal:
        yield "the same plan and the same code"
        return
    for name, pair in found.settings.items():
        yield f"{name:<23} {_arrow(*_values(*pair))}"
    numbers = (
        ("period", found.period_s, units.seconds),
        ("samples/s", found.samples_per_s, lambda value: f"{value:.4g}"),
        ("utilisation", found.utilisation, units.percent),
        ("traffic per sample", found.bytes_per_sample, units.data),
    )
    for name, pair, shown in numbers:
        if pair[0] != pair[1]:
            share = "" if name == "utilisation" else _percent(*pair)
            yield f"{name:<23} {_arrow(*map(shown, pair))}{share}"
    for stage in found.stages:
        kinds = (("time", stage.seconds, units.seconds), ("memory", stage.memory, units.data),
                 ("recompute", stage.recompute, _yes))  # fmt: skip
        changes = [
            f"{name} {_arrow(*('none' if value is None else shown(value) for value in pair))}"
            for name, pair, shown in kinds
            if pair[0] != pair[1] and not (name == "recompute" and None in pair)
        ]
        yield f"stage {stage.index:<17} {', '.join(changes)}"
    for (old, new), modules in _grouped(found.moves):
        yield f"{_places(old, new):<23} {with_ranges(modules)}"
    if found.code:
        stages = f"stage{'s' * (len(found.code) > 1)} {units.ranges(found.code)}"
        yield f"{'code':<23} differs in {stages}"
    elif not (found.settings or found.stages or found.moves):
        yield "the plans differ in details only; compare their plan.json"


def _arrow(old: str, new: str) -> str:
    return f"{old} -> {new}"


def _values(old: Any, new: Any) -> tuple[str, str]:
    """A setting before and after; of a device or topology its name, or else what is different."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.get("name") != new.get("name"):
            return str(old.get("name")), str(new.get("name"))
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        old, new = ({key: value[key] for key in keys if key in value} for value in (old, new))
    return _value(old), _value(new)


def _value(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _percent(old: float, new: float) -> str:
    return f" ({100 * (new / old - 1):+.1f} %)" if old else ""


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _places(old: tuple[int, ...], new: tuple[int, ...]) -> str:
    from p2bw.compiler import units

    if old and new:
        return f"stage {_arrow(units.ranges(old), units.ranges(new))}"
    return f"stage {units.ranges(old)}, removed" if old else f"stage {units.ranges(new)}, added"


def _grouped(
    moves: Iterable["Move"],
) -> list[tuple[tuple[tuple[int, ...], tuple[int, ...]], list[str]]]:
    """By the stages that they come from and go to; those that left or came last."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for move in moves:
        found.setdefault((move.before, move.after), []).append(move.module)
    return sorted(found.items(), key=lambda item: (not all(item[0]), item[0]))


def with_ranges(paths: Iterable[str]) -> str:
    """('h.3', 'h.4', 'h.5.attn') -> 'h.3-4, h.5.attn'."""
    runs: list[tuple[str, int | None, int | None]] = []  # what stands before the numbers, and these
    for path in paths:
        numbered = re.fullmatch(r"(.*?)(\d+)", path)
        prefix, number = (numbered[1], int(numbered[2])) if numbered else (path, None)
        if runs and number is not None and runs[-1][0] == prefix and runs[-1][2] == number - 1:
            runs[-1] = (prefix, runs[-1][1], number)
        else:
            runs.append((prefix, number, number))
    return ", ".join(
        prefix + ("" if first is None else str(first) if first == last else f"{first}-{last}")
        for prefix, first, last in runs
    )
