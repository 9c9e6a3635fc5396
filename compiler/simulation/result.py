"""What a simulation tells."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """What one device, or several that do the same at the same time, make of the steady state."""

    stage: int
    ranks: tuple[int, ...]
    busy: float  # share of the time in which it computes
    waits: Mapping[str, float]  # shares of the time, by what it waits for
    in_flight: int  # microbatches, at most
    peak_bytes: int
    planned_bytes: int
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class LinkUse:
    """Of the links that carry as much: the first one's name, how many, and how busy."""

    name: str
    count: int
    busy: float  # share of its bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """The steady state, and a run of so many batches from an empty pipeline to an empty one.

    Times are seconds. `period_s` is the mean time between two microbatches of one pipeline.
    """

    schedule: str
    depth: int
    width: int
    microbatches: int  # per update
    period_s: float
    samples_per_s: float
    utilisation: float  # share of all devices' time in forwards and backwards, as in the plan
    planned_period_s: float
    cycle_batches: int | None  # the steady state repeats exactly after so many; None: it is a mean
    batches: int
    total_s: float
    start_s: float  # of it, until the first update's gradients are complete on the first stage
    drain_s: float  # of it, after the last forward of the first stage
    devices: tuple[DeviceUse, ...]
    links: tuple[LinkUse, ...]  # the busiest first

    @property
    def ratio(self) -> float:
        """How much longer the period is than planned."""
        return self.period_s / self.planned_period_s if self.planned_period_s else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}
