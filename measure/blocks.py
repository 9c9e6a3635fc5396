"""Seconds of a program's blocks: in a run of the whole, or layer by layer if that is too large."""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median

import torch
from torch import Tensor, fx

from p2bw.compiler.kinds import block_kind
from p2bw.compiler.measured import Check, Kind, Timing
from p2bw.compiler.plan import Data
from p2bw.compiler.program import Block, Program
from p2bw.measure.cache import Cache
from p2bw.measure.device import clock, free_bytes, synchronize
from p2bw.measure.segment import Segment, Spans
from p2bw.measure.tensors import Tensors
from p2bw.measure.training import VERSIONS, Training
from p2bw.modelfile.load import ModelFile
from p2bw.runtime.memory import keep_memory

_WARM_UP = 2
_LEAST_RUNS, _MOST_RUNS = 8, 40
_SECONDS = 2.0  # of runs, if that many do
_SHARE = 0.5  # of the free memory that a model may take


class _Found(Data):
    """A segment's blocks, in order; of the whole program, also the user's own model beside it."""

    forward: tuple[Timing, ...]
    backward: tuple[Timing, ...]
    check: Check | None


@dataclass(frozen=True, slots=True)
class Measured:
    """The kind of each block by its name, the kinds' times, and how these compare to the whole."""

    blocks: dict[str, str]
    kinds: dict[str, Kind]
    check: Check | None


def fits(program: Program, device: torch.device, processes: int) -> bool:
    """Whether a whole step of the model has room on the device, and in those beside it."""
    # Of what is trained also a gradient, another version and what an optimizer such as Adam keeps.
    copies = 1 + VERSIONS + 2
    weights = sum(
        p.type.bytes * (copies if p.trainable else 1) for p in program.parameters.values()
    )
    buffers = sum(b.type.bytes for b in program.buffers.values())
    stash = sum(s.bytes for node in program.compute_nodes for s in program.fact(node, "saved"))
    sharing = processes if device.type == "cpu" else 1
    needed: int = (weights + buffers + stash) * sharing
    return needed < _SHARE * free_bytes(device)


def measure_blocks(
    file: ModelFile,
    program: Program,
    device: torch.device,
    cache: Cache,
    beside: Callable[[], AbstractContextManager[None]],
    *,
    whole: bool,
) -> Measured:
    """Measure what the cache does not know; blocks and layers that are equal, once.

    `beside` is what goes on at the same time, while the whole model is measured.
    """
    assert program.blocks is not None, "group_blocks has not run"
    kinds = {block.name: block_kind(program, block) for block in program.blocks}
    pieces = [program.blocks] if whole else list(_layers(program.blocks))
    found: dict[tuple[str, ...], _Found] = {}
    tensors: Tensors | None = None
    code = (file.sha256(), str(dict(file.settings))) if program.opaque else ()
    with ExitStack() as stack:
        for piece in pieces:
            key = tuple(kinds[block.name] for block in piece)
            if key in found:
                continue
            place = ("segment between updates", whole, *code, *key)
            kept = cache.get(_Found, place)
            if kept is None or len(kept.forward) != len(piece):
                if tensors is None:
                    tensors = Tensors(file, program, device, whole=whole)
                    if whole:
                        stack.enter_context(beside())
                kept = _measure(Segment(program, piece, tensors.owner, device), tensors)
                cache.put(place, kept)
            found[key] = kept
    timings: dict[str, list[tuple[Timing, Timing]]] = {}
    for piece in pieces:
        result = found[tuple(kinds[block.name] for block in piece)]
        for block, *pair in zip(piece, result.forward, result.backward, strict=True):
            timings.setdefault(kinds[block.name], []).append((pair[0], pair[1]))
    check = found[tuple(kinds.values())].check if whole else None
    return Measured(kinds, {kind: _pooled(pairs) for kind, pairs in timings.items()}, check)


def _layers(blocks: Sequence[Block]) -> Iterator[tuple[Block, ...]]:
    """Neighbours of one layer: the module path as far as its first number, h.3 of h.3.attn."""

    def layer(block: Block) -> str:
        numbered = re.match(r"(?:[^.#]+\.)*?\d+(?=[.#]|$)", block.name)
        return numbered[0] if numbered else block.name.split(".")[0]

    for _, members in groupby(blocks, layer):
        yield tuple(members)


def _measure(segment: Segment, tensors: Tensors) -> _Found:
    keep_memory(segment.device)  # as a rank does
    given = tensors.given(segment)
    training = Training(tensors.file, tensors.model) if tensors.model else None

    def next_update() -> Mapping[fx.Node, Tensor]:
        """What the segment is given, of the next version; gradients are gone."""
        if training:
            training.update()
            return tensors.given(segment)
        for tensor in given.values():
            tensor.grad = None
        return given

    spans: list[Spans] = []
    wholes: list[float] = []
    for _ in range(_WARM_UP):
        start_s = time.perf_counter()
        segment.run(next_update())
        synchronize(segment.device)
        once_s = time.perf_counter() - start_s
        if tensors.model:
            _own_step_s(tensors, segment.device)
    for _ in range(max(_LEAST_RUNS, min(_MOST_RUNS, round(_SECONDS / max(once_s, 1e-6)))) // 2):
        # Twice each, as in an update of two microbatches: the second one's gradients are added.
        now = next_update()
        spans += [segment.run(now), segment.run(now)]
        if training:
            training.update()
            wholes += [_own_step_s(tensors, segment.device), _own_step_s(tensors, segment.device)]
    forward = _timings([run.forward for run in spans])
    backward = _timings([run.backward for run in spans])
    if not wholes:
        return _Found(forward=forward, backward=backward, check=None)
    blocks_s = sum(timing.median_s for timing in (*forward, *backward))
    check = Check(whole_s=median(wholes), blocks_s=blocks_s)
    return _Found(forward=forward, backward=backward, check=check)


def _own_step_s(tensors: Tensors, device: torch.device) -> float:
    """Forward and backward of the user's model as the user wrote it."""
    inputs, targets = tensors.on_device()
    assert tensors.model is not None
    now = clock(device)
    synchronize(device)
    start_s = now()
    tensors.file.call(tensors.model, inputs, targets).backward()  # type: ignore[no-untyped-call]
    synchronize(device)
    return now() - start_s


def _timings(runs: Sequence[tuple[float, ...]]) -> tuple[Timing, ...]:
    """Of each block, scaled so that they add up to the median run.

    What disturbs a block now and then is in no block's median, but in most runs it is somewhere.
    """
    every = [_timing(values) for values in zip(*runs, strict=True)]
    total = sum(timing.median_s for timing in every)
    scale = median(map(sum, runs)) / total if total else 1.0
    return tuple(
        Timing(median_s=scale * timing.median_s, spread_s=timing.spread_s) for timing in every
    )


def _timing(values: Sequence[float]) -> Timing:
    middle = median(values)
    return Timing(median_s=middle, spread_s=median(abs(value - middle) for value in values))


def _pooled(pairs: Sequence[tuple[Timing, Timing]]) -> Kind:
    """Equal blocks in different places, by their mean: so the sum over all blocks is kept."""

    def mean(timings: Iterable[Timing]) -> Timing:
        every = list(timings)
        return Timing(
            median_s=fmean(timing.median_s for timing in every),
            spread_s=fmean(timing.spread_s for timing in every),
        )

    return Kind(forward=mean(f for f, _ in pairs), backward=mean(b for _, b in pairs))
