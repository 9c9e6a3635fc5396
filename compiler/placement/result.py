"""What a search takes and gives: limits, progress, and the placement with its proof."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from p2bw.compiler.placement.evaluate import Layout, LinkLoad, StageNumbers
from p2bw.compiler.placement.ideals import MAX_IDEALS
from p2bw.compiler.placement.stop import Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long to search, in units that are the same on every machine; and when to stop early."""

    deterministic_s: float = 20.0  # of CP-SAT, over all shapes; a second is a few on a slow core
    ideals: int = MAX_IDEALS
    stop: Stop = field(default_factory=Stop)
    gap: float = 0.0  # stop when nothing is better than the best by a larger share of it
    any_will_do: bool = False  # stop at the first placement: is there one at all?


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a search is: shapes done of all; best found and best possible samples per second."""

    phase: Literal["dynamic program", "CP-SAT", "cures"]
    done: int
    total: int
    samples_per_s: float | None
    bound: float

    def __str__(self) -> str:
        if self.phase == "cures":
            return "nothing fits; looking for the smallest changes that would"
        best, gap = "none", ""
        if self.samples_per_s is not None:
            best = f"{self.samples_per_s:.4g} samples/s"
            gap = f", gap {100 * max(0.0, self.bound / self.samples_per_s - 1):.2f} %"
        return (
            f"placing the stages: {self.phase}, {self.done} of {self.total} shapes settled, "
            f"best {best}, bound {self.bound:.4g}{gap}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The decision, its numbers and its proof."""

    depth: int
    width: int
    microbatch: int
    microbatches_per_update: int
    layout: Layout
    stage_of_block: Mapping[str, int]
    recompute: tuple[bool, ...]  # by stage
    relayed: tuple[str, ...] = ()  # tensors that every stage on their way passes on
    devices: tuple[tuple[int, ...], ...]  # by stage: the rank of each replica
    stages: tuple[StageNumbers, ...]
    links: tuple[LinkLoad, ...]
    period_s: float  # between two microbatches leaving one pipeline
    samples_per_s: float  # of all replicas
    utilisation: float  # share of all devices' time in forwards and backwards; recomputing is none
    bytes_per_sample: float  # sent over all links
    status: Literal["optimal", "feasible"]
    bound: float  # samples per second that nothing in the search space exceeds
    gap: float  # bound / samples_per_s - 1
    search_space: str
