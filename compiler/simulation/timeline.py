"""A pipeline's timeline as text, like the figures of the papers: one line for each device."""

from collections.abc import Sequence

from p2bw.compiler.simulation.job import Job
from p2bw.compiler.simulation.simulate import run_whole
from p2bw.contract.schedule import Action, Kind

LEGEND = "3─── forward of microbatch 3, 3━━━ its backward, ▒ weights updated"
_MARKS = {Kind.FORWARD: "─", Kind.BACKWARD: "━"}
_DRAWN = (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)

Span = tuple[Kind, int, int, int]  # kind, microbatch, from, to (ps)


def draw_timeline(job: Job, width: int) -> list[str]:
    """One line per stage of the first replica, of at most so many columns, from the start on."""
    spans: list[list[Span]] = [[] for _ in range(job.pipe.depth)]

    def record(own: int, stage: int, action: Action, began: int, now: int) -> None:
        if own == 0 and action.kind in _DRAWN and now > began:
            spans[stage].append((action.kind, action.index, began, now))

    run_whole(job, record)
    shortest = min(
        (end - began for own in spans for kind, _, began, end in own if kind in _MARKS), default=1
    )
    # The shortest has room for its number, and a mark behind it.
    columns = len(str(job.pipe.microbatches * job.pipe.batches - 1)) + 1
    step = max(1, shortest // columns)  # ps of a column
    return [_line(own, step, width) for own in spans]


def _line(spans: Sequence[Span], step: int, width: int) -> str:
    line = [" "] * width
    for kind, index, began, end in spans:
        first, last = began // step, end // step
        text = _MARKS.get(kind, "▒") * (last - first)
        if kind in _MARKS:
            label = str(index)
            text = label + text[len(label) :] if len(label) <= len(text) else text
        for column, mark in enumerate(text, start=first):
            if column < width:
                line[column] = mark
    return "".join(line).rstrip()
