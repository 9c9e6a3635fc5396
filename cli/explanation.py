"""What `p2bw explain` prints on stdout when a person reads it: at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import wrap
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from p2bw.compiler import units
from p2bw.tables import console

if TYPE_CHECKING:
    from p2bw.compiler.placement.explain import Explanation, LinkSlack, Move

WIDTH = 100  # of the tables
MOST_BINDING = 4  # of a kind
MOST_LINKS = 8
MOST_MOVES = 16


def print_explanation(found: Explanation) -> None:
    """The limits that bind, everyone's slack, moves next to the cuts, and marginal values."""
    out = console()
    width = min(out.width, WIDTH)
    proof = f"within {100 * found.gap:.2f} % of the best" if found.gap else "proven optimal"
    if found.constraints:
        proof = "cut by hand"
    out.print(
        escape(
            f"{units.several(found.depth, 'stage')} x {units.several(found.width, 'replica')}, "
            f"{found.schedule}, microbatch {found.microbatch}: "
            f"{found.samples_per_s:.4g} samples/s, {proof}"
        )
    )
    if found.constraints and not found.stopped:
        for i, line in enumerate(wrap(_by_hand(found), width - 12)):
            out.print(escape(f"{'by hand' if i == 0 else '':12}{line}"), soft_wrap=True)
    lines = (part for line in _binding(found) for part in wrap(line, width - 12))
    for i, line in enumerate(lines):
        out.print(escape(f"{'binds' if i == 0 else '':12}{line}"), soft_wrap=True)
    out.print(_stages(found), width=width)
    if found.links:
        out.print(_links(found.links), width=width)
    if found.moves:
        shown = _shown(found)
        out.print(_moves(shown), width=width)
        if len(shown) < len(found.moves):
            out.print(f"The best of {len(found.moves)} moves; --json has all.")
    if found.best_samples_per_s > found.samples_per_s:
        depth, width = found.best_shape
        out.print(
            f"best        {units.several(depth, 'stage')} x {units.several(width, 'replica')} do "
            f"{found.best_samples_per_s:.4g} samples/s; what follows is compared with that"
        )
    if found.gains:
        out.print(_gains(found), width=width)
    if found.stopped:
        out.print(f"stopped     by {found.stopped}: not all was solved again")


def _by_hand(found: Explanation) -> str:
    """How far a manual partition is from the solver's."""
    said = ", ".join(found.constraints)
    if found.best_samples_per_s <= found.samples_per_s:
        return f"{said}: no other cuts into {found.depth} stages are faster"
    gain = 100 * (found.best_samples_per_s / found.samples_per_s - 1)
    return (
        f"{said}: the best {found.depth} stages do {found.best_samples_per_s:.4g} samples/s "
        f"({gain:+.2f} %), cut after {', '.join(found.best_cuts)}"
    )


def _binding(found: Explanation) -> Iterator[str]:
    """A line for each limit; of many of one kind, the first."""
    for kind, some in groupby(found.binding, lambda limit: limit.kind):
        limits = list(some)
        for limit in limits[:MOST_BINDING]:
            yield f"{limit.what}: {limit.why}"
        if len(limits) > MOST_BINDING:
            where = "stages" if kind == "compute" else "links"
            yield f"and {len(limits) - MOST_BINDING} other {where} that are as busy"


def _table(*columns: str, words: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", overflow="ellipsis")
    return table


def _stages(found: Explanation) -> Table:
    table = _table("stage", "busy", "slack", "memory", "of", "free", words=())
    for k, stage in enumerate(found.stages):
        table.add_row(
            f"{k}{' r' if stage.recompute else ''}",
            units.seconds(stage.compute_s),
            units.seconds(stage.slack_s),
            units.data(stage.memory),
            units.data(stage.limit),
            units.data(stage.free),
        )
    return table


def _links(links: Iterable[LinkSlack]) -> Table:
    """The busiest ones."""
    busiest = sorted(links, key=lambda link: -link.seconds)
    table = _table("link", "busy", "slack", words=("link",))
    for link in busiest[:MOST_LINKS]:
        table.add_row(escape(link.name), units.seconds(link.seconds), units.seconds(link.slack_s))
    if len(busiest) > MOST_LINKS:
        table.add_row(f".. and {len(busiest) - MOST_LINKS} that are no busier", "", "")
    return table


def _shown(found: Explanation) -> list[Move]:
    """The best move over each cut, each way; of a long pipeline, next to the busiest stages."""
    best: dict[tuple[int, int], Move] = {}
    for move in found.moves:
        known = best.setdefault((move.source, move.target), move)
        if _badness(move) < _badness(known):
            best[move.source, move.target] = move
    busiest = min(range(found.depth), key=lambda k: found.stages[k].slack_s)
    near = sorted(
        best.values(), key=lambda m: min(abs(m.source - busiest), abs(m.target - busiest))
    )
    return sorted(near[:MOST_MOVES], key=lambda move: (move.source, move.target))


def _badness(move: Move) -> tuple[bool, float]:
    return bool(move.problems), move.period_s


def _moves(moves: Iterable[Move]) -> Table:
    table = _table(
        "moving", "from", "to", "period", "memory after", words=("moving", "memory after")
    )
    for move in moves:
        after = " / ".join(map(units.data, move.memory))
        if move.problems:
            after = f"not possible: {move.problems[0]}"
        table.add_row(
            escape(_short(move.blocks)),
            str(move.source),
            str(move.target),
            f"{100 * move.change:+.2f} %",
            escape(after),
        )
    return table


def _short(name: str, width: int = 34) -> str:
    half = (width - 2) // 2
    return name if len(name) <= width else f"{name[:half]}..{name[-half:]}"


def _gains(found: Explanation) -> Table:
    table = _table("with", "samples/s", "gain", "proof", words=("with", "proof"))
    for gain in found.gains:
        proof = "optimal" if gain.status == "optimal" else f"gap {100 * gain.gap:.2f} %"
        table.add_row(
            escape(gain.what),
            f"{gain.samples_per_s:.4g}",
            f"{100 * gain.gain / (gain.samples_per_s - gain.gain):+.2f} %",
            proof,
        )
    return table
