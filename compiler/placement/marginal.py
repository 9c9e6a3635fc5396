"""Marginal values: what one more GiB, GB/s or device would buy, each solved again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from p2bw.compiler.devices import GIB
from p2bw.compiler.placement.changes import with_devices, with_memory
from p2bw.compiler.placement.feasible import Request
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.placement.solver import solve
from p2bw.compiler.placement.stop import Interrupted
from p2bw.compiler.topology import Topology
from p2bw.contract.errors import TimeLimitError

GB_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One change of the devices or links, and what it would make of the samples per second."""

    what: str
    samples_per_s: float
    gain: float  # samples per second more
    status: Literal["optimal", "feasible"]
    gap: float  # how much more than `samples_per_s` is not ruled out


def find_gains(
    request: Request, now: float, limits: Limits, say: Callable[[str], None]
) -> Iterator[Gain]:
    """The gain of each change over `now` samples per second; as far as the limits allow.

    What is there now stays possible: a change is never a loss.
    """
    for what, topology in _changes(request.problem.topology):
        if limits.stop():
            return
        say(f"solving again with {what}")
        changed = request.changed(topology=topology)
        try:
            found = solve(
                {problem.microbatch: problem for problem in changed.problems},
                depths=changed.depths,
                widths=changed.widths,
                recompute=changed.recompute,
                limits=limits,
            )
        except (TimeLimitError, Interrupted):
            continue
        rate = max(now, found.samples_per_s)
        yield Gain(
            what=what,
            samples_per_s=rate,
            gain=rate - now,
            status=found.status,
            gap=max(0.0, found.bound / rate - 1),
        )


def _changes(topology: Topology) -> Iterator[tuple[str, Topology]]:
    for device in topology.kinds:
        more = with_memory(topology, device, device.memory_bytes + GIB)
        yield f"1 GiB more memory on each {device.name}", more
    for i, level in enumerate(topology.levels):
        wider = replace(level, bandwidth=level.bandwidth + GB_S)
        levels = (*topology.levels[:i], wider, *topology.levels[i + 1 :])
        text = f"1 GB/s more than {level.bandwidth / GB_S:.4g} on each port of level {level.name}"
        yield text, replace(topology, levels=levels)
    for bandwidth in sorted({wire.bandwidth for wire in topology.wires}, reverse=True):
        wires = tuple(
            replace(wire, bandwidth=bandwidth + GB_S) if wire.bandwidth == bandwidth else wire
            for wire in topology.wires
        )
        text = f"1 GB/s more on each link of {bandwidth / GB_S:.4g} GB/s"
        yield text, replace(topology, wires=wires)
    if topology.levels:
        more = with_devices(topology, topology.gpus + 1)
        yield f"1 {topology.device.name} more", more
