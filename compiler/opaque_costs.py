"""What the user declares that opaque modules cost, instead of what a run of them showed.

A run counts what one input does; a router that sends most tokens to one expert, or a loop that
ends early, costs something else on average, which only the user knows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from p2bw.compiler.program import OpaqueCall, Program, Saved
from p2bw.compiler.rules import matches
from p2bw.contract.errors import UsageError

_KEYS = ("forward", "backward", "saved")


@dataclass(frozen=True, slots=True)
class Declared:
    """The costs per sample of one call of the modules that match; None: as counted."""

    glob: str
    forward: float | None = None  # FLOPs
    backward: float | None = None  # FLOPs
    saved: float | None = None  # bytes from the forward to the backward


def parse_declared(texts: Iterable[str]) -> tuple[Declared, ...]:
    """--opaque-cost 'h.*.moe:forward=2e9,backward=4e9,saved=65536'."""
    return tuple(map(_parse, texts))


def _parse(text: str) -> Declared:
    glob, _, rest = text.rpartition(":")
    found: dict[str, float] = {}
    for part in rest.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not glob or key not in _KEYS or key in found or not 0 <= number < math.inf:
            raise UsageError(
                f"--opaque-cost {text}: write MODULE:forward=FLOPS,backward=FLOPS,saved=BYTES, "
                "per sample, each at most once, in numbers from 0 on"
            )
        found[key] = number
    return Declared(glob, **found)


def declare_costs(program: Program, declared: Iterable[Declared]) -> Program:
    """The program with declared costs; of several that match a module, the last one counts."""
    opaque = dict(program.opaque)
    for own in declared:
        matching = [
            n for n, call in opaque.items() if matches(own.glob.split("."), call.path.split("."))
        ]
        if not matching:
            paths = ", ".join(dict.fromkeys(call.path for call in opaque.values())) or "none"
            raise UsageError(
                f"--opaque-cost {own.glob} matches no module that is kept opaque (those: {paths})"
            )
        for name in matching:
            opaque[name] = _declared(opaque[name], own, program.batch_size)
    return replace(program, opaque=opaque)


def _declared(call: OpaqueCall, own: Declared, samples: int) -> OpaqueCall:
    """The call with the costs of a microbatch; bytes moved and kernels stay as they were seen."""
    changes: dict[str, object] = {"declared": True}
    for way in ("forward", "backward"):
        flops = getattr(own, way)
        if flops is not None:
            changes[way] = replace(getattr(call, way), flops=round(flops * samples))
    if own.saved is not None:
        size = math.ceil(own.saved * samples)
        changes["saved"] = (Saved("fresh", 0, size),) if size else ()
    return replace(call, **changes)  # type: ignore[arg-type]
