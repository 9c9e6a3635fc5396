"""The docstring at the top of a stage file: the stage's numbers, for whoever reads the code."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from p2bw.compiler.emit.comments import plain, spans, wrapped
from p2bw.compiler.emit.expr import WIDTH
from p2bw.compiler.plan import Plan, TransferSpec
from p2bw.compiler.program import TensorType
from p2bw.compiler.units import data, flops, parameters, percent, seconds

_TIE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A tensor that the stage receives or sends each microbatch."""

    name: str
    type: TensorType
    bytes: int
    peers: tuple[int, ...]
    passed_on: bool = False  # sent as it was received


@dataclass(frozen=True, slots=True, kw_only=True)
class StageHeader:
    """What the docstring of a stage file says."""

    index: int
    depth: int
    model: str
    modules: tuple[str, ...]
    devices: tuple[int, ...]  # rank of each replica
    parameters: int
    flops_forward: int
    flops_backward: int
    forward_s: float
    backward_s: float
    recompute_s: float  # 0: nothing is computed twice
    period_s: float
    memory: tuple[tuple[str, int], ...]  # kind -> bytes, largest first in the text
    memory_limit: int
    receives: tuple[Wire, ...]
    sends: tuple[Wire, ...]
    origin: str  # what it was compiled from: "examples/gpt.py:model"
    version: str
    # Module, class, why it was not traced, and how its costs are known.
    opaque: tuple[tuple[str, str, str, str], ...] = ()


def stage_header(plan: Plan, index: int, names: Mapping[str, str]) -> StageHeader:
    """The header of one stage of a plan; `names` are those of the tensors in the stage's code."""
    stage = plan.stages[index]
    memory = stage.memory
    kinds = ("weights", "gradients", "optimizer", "stash", "buffers", "transient", "reserve")

    received = {transfer.tensor for transfer in stage.receives}

    def wires(
        transfers: Iterable[TransferSpec], passed_on: Collection[str] = ()
    ) -> tuple[Wire, ...]:
        of_tensor: dict[str, list[TransferSpec]] = {}
        for transfer in transfers:
            of_tensor.setdefault(transfer.tensor, []).append(transfer)
        return tuple(
            Wire(
                name=names.get(tensor, tensor),
                type=TensorType(found[0].shape, getattr(torch, found[0].dtype)),
                bytes=found[0].bytes,
                peers=tuple(transfer.peer for transfer in found),
                passed_on=tensor in passed_on,
            )
            for tensor, found in of_tensor.items()
        )

    return StageHeader(
        index=index,
        depth=plan.depth,
        model=plan.model.name,
        modules=stage.modules,
        devices=stage.devices,
        parameters=stage.parameters,
        flops_forward=stage.flops_forward,
        flops_backward=stage.flops_backward,
        forward_s=stage.compute_s.forward,
        backward_s=stage.compute_s.backward,
        recompute_s=stage.compute_s.recompute,
        period_s=plan.period_s,
        memory=tuple((kind, getattr(memory, kind)) for kind in kinds),
        memory_limit=memory.limit,
        receives=wires(stage.receives),
        sends=wires(stage.sends, passed_on=received),
        opaque=tuple(
            (o.module, o.type, o.reason, o.costs) for o in plan.opaque if index in o.stages
        ),
        origin=f"{plan.model.file}:{plan.model.factory}",
        version=plan.p2bw_version,
    )


def format_header(header: StageHeader, libraries: Collection[str] = ()) -> str:
    """The docstring's text, without its quotes."""
    total = sum(amount for _, amount in header.memory)
    busy = header.forward_s + header.backward_s + header.recompute_s
    share = f", busy {percent(busy / header.period_s)} of the period" if header.period_s else ""
    rows = [
        ("parameters", parameters(header.parameters)),
        ("forward", f"{seconds(header.forward_s)}, {flops(header.flops_forward)}"),
        ("backward", f"{seconds(header.backward_s)}, {flops(header.flops_backward)}"),
    ]
    if header.recompute_s:
        rows.append(("recompute", f"{seconds(header.recompute_s)}: the forward once more"))
    rows[-1] = (rows[-1][0], rows[-1][1] + share)
    parts = " + ".join(
        f"{kind} {data(amount)}".replace(" ", _TIE) for kind, amount in header.memory if amount
    )
    memory = f"{data(total)} of {data(header.memory_limit)} = {parts}"
    first, *more = (line.replace(_TIE, " ") for line in wrapped(memory, WIDTH - 12))
    rows += [("memory", first), *(("", line) for line in more)]
    table = [f"{name:<10}  {text}".rstrip() for name, text in rows]
    wires = [line for wire in header.receives for line in _wire("receives", wire, "from")]
    wires += [line for wire in header.sends for line in _wire("sends", wire, "to")]
    opaque = [*_opaque(header)]
    packages = dict.fromkeys(library.partition(".")[0] for library in libraries)
    needs = f"Imports {' and '.join(('torch', *packages))}" if packages else "Imports only torch"
    if opaque:
        needs = f"Imports {', '.join(('torch', *packages))}, and p2bw for your own modules"
    needs += "; yours to change."
    lines = [*_title(header), "", *table, "", *opaque, *([""] if opaque else []), *wires]
    lines += [
        *([""] if wires else []),
        *wrapped(
            f"Written by p2bw {plain(header.version)} from {plain(header.origin)}. {needs}", WIDTH
        ),
        "",
    ]
    return "\n".join(lines)


def _opaque(header: StageHeader) -> Iterator[str]:
    """The modules that could not be traced, those of one class and reason together."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for path, *same in header.opaque:
        alike.setdefault((same[0], same[1], same[2]), []).append(path)
    for (kind, reason, costs), paths in alike.items():
        known = "counted in a run" if costs == "counted" else "declared"
        what = f"{plain(kind)} as it is, not traced, its costs {known}"
        text = f"{spans(paths, width=300)}: {what}: "
        first, *more = wrapped(text + plain(reason), WIDTH - 12)
        yield from (f"{'opaque':<10}  {first}", *(f"{'':<10}  {line}" for line in more))


def _title(header: StageHeader) -> list[str]:
    place = f"Stage {header.index} of {header.depth}"
    ranks = ", ".join(map(str, header.devices[:8])) + (", ..." if len(header.devices) > 8 else "")
    where = f"on rank{'s' if len(header.devices) > 1 else ''} {ranks}" if header.devices else ""
    first = f"{place}: {plain(header.model)} {where}".rstrip() + "."
    held = spans(_outermost(header.modules), width=2 * WIDTH - 40)
    return [first, *(["", *wrapped(held, WIDTH)] if held else [])]


def _outermost(modules: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(path for path in modules if path))


def _wire(verb: str, wire: Wire, direction: str) -> list[str]:
    way = f"passed on {direction}" if wire.passed_on else direction
    stages = f"stage{'s' if len(wire.peers) > 1 else ''} {', '.join(map(str, wire.peers))}"
    text = f"{wire.name}: {wire.type}, {data(wire.bytes)} {way} {stages}"
    first, *more = wrapped(text, WIDTH - 12)
    return [f"{verb:<10}  {first}", *(f"{'':<10}  {line}" for line in more)]
