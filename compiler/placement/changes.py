"""Changes that are tried one at a time: of constraints, of a topology's devices and memory."""

from collections.abc import Sequence
from dataclasses import replace

from p2bw.compiler.devices import GIB, MIB, Device
from p2bw.compiler.problem import Constraints
from p2bw.compiler.topology import Topology


def dropped(constraints: Constraints) -> dict[str, list[tuple[str, object]]]:
    """For each field: what to say, and the field's value without one of its entries."""

    def without(entries: tuple[object, ...], i: int) -> object:
        return entries[:i] + entries[i + 1 :]

    pin = constraints.pin
    return {
        "pin": [
            (
                f"without the pin of {name} to stage {stage}",
                {other: k for other, k in pin.items() if other != name},
            )
            for name, stage in pin.items()
        ],
        "together": [
            (f"without {_few(names)} together", without(constraints.together, i))
            for i, names in enumerate(constraints.together)
        ],
        "apart": [
            (f"without {a} and {b} apart", without(constraints.apart, i))
            for i, (a, b) in enumerate(constraints.apart)
        ],
        "never_cut": [
            (f"without never_cut of {name}", without(constraints.never_cut, i))
            for i, name in enumerate(constraints.never_cut)
        ],
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]}"


def with_memory(topology: Topology, device: Device, size: int) -> Topology:
    """Another memory on all devices of one kind."""
    larger = replace(device, memory_bytes=size)
    return replace(
        topology,
        device=larger if topology.device == device else topology.device,
        more=tuple(
            replace(run, device=larger) if run.device == device else run for run in topology.more
        ),
    )


def with_devices(topology: Topology, gpus: int) -> Topology:
    """More devices of the first kind; the outermost level takes them."""
    inside = 1
    for level in topology.levels[:-1]:
        inside *= level.size
    outer = topology.levels[-1]
    outer = replace(outer, size=max(outer.size, -(-gpus // inside)))
    return replace(topology, gpus=gpus, levels=(*topology.levels[:-1], outer))


def exact_bytes(size: int) -> str:
    """'17412MiB': bytes as the option --memory takes them, exactly."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}B"
