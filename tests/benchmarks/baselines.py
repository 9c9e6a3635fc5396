"""The partitioners in use, from the definitions in their papers and packages.

Each takes a Graph and a number of parts and yields the placements that it may be given credit for:
what its user calls a layer is open, so those that cut a list of layers cut three lists, and the
best placement counts. The lists: our blocks; the outermost numbered modules (h.3 of a GPT,
encoder.block.3 of T5) with what lies between them; the innermost numbered modules
(encoder.block.3.layer.0). They hold the blocks in one topological order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np

from p2bw.compiler.placement.ideals import make_family

Cut = Callable[
    [Sequence[float], int], list[int]
]  # weights, parts -> where each part starts, the end
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
STATES = 3000  # of PipeDream's dynamic program


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A model as partitioners see it; blocks in a topological order."""

    names: Sequence[str]
    seconds: Sequence[float]  # forward and backward of a microbatch
    parameters: Sequence[tuple[float, Sequence[int]]]  # bytes, the blocks that use them
    tensors: Sequence[tuple[float, Sequence[int]]]  # bytes there and back, the blocks at its ends
    predecessors: tuple[tuple[int, ...], ...]
    bandwidths: Sequence[float]  # between stages k and k + 1, bytes per second


Baseline = Callable[[Graph, int], Iterator[list[int]]]  # -> the stage of each block


# Lists of layers


def _path(name: str, innermost: bool) -> tuple[str, bool]:
    """The module that a block belongs to, as a user would list it, and whether it is numbered."""
    parts = name.partition("#")[0].split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbered:
        return ".".join(parts), False
    return ".".join(parts[: numbered[-1 if innermost else 0] + 1]), True


def _module_lists(graph: Graph) -> Iterator[list[tuple[int, bool]]]:
    """Where each module starts and whether it is numbered; the end."""
    for innermost in (False, True):
        paths = enumerate(_path(name, innermost) for name in graph.names)
        starts = [next(blocks) for _, blocks in groupby(paths, key=lambda found: found[1])]
        yield [*((i, numbered) for i, (_, numbered) in starts), (len(graph.names), False)]


def _lists(graph: Graph) -> Iterator[list[int]]:
    """Where each layer starts, and the end."""
    modules = [[i for i, _ in found] for found in _module_lists(graph)]
    yield from {
        tuple(found): found for found in ([*range(len(graph.names) + 1)], *modules)
    }.values()


def _times(graph: Graph, layers: Sequence[int]) -> list[float]:
    return [sum(graph.seconds[first:last]) for first, last in pairwise(layers)]


def _sizes(graph: Graph, layers: Sequence[int]) -> list[float]:
    """Parameter bytes; a tied parameter counts in each layer that uses it."""
    layer_of = _stages(layers)
    sizes = [0.0] * (len(layers) - 1)
    for size, users in graph.parameters:
        for layer in {layer_of[user] for user in users}:
            sizes[layer] += size
    return sizes


def _stages(bounds: Sequence[int]) -> list[int]:
    return [k for k, (first, last) in enumerate(pairwise(bounds)) for _ in range(first, last)]


def _cutting(cut: Cut, weigh: Callable[[Graph, Sequence[int]], list[float]]) -> Baseline:
    def place(graph: Graph, parts: int) -> Iterator[list[int]]:
        for layers in _lists(graph):
            if len(layers) > parts:
                yield _stages([layers[i] for i in cut(weigh(graph, layers), parts)])

    return place


# Cuts of a list


def uniform(weights: Sequence[float], parts: int) -> list[int]:
    """As many layers each; the first parts take one more."""
    size, rest = divmod(len(weights), parts)
    return [k * size + min(k, rest) for k in range(parts + 1)]


def deepspeed(weights: Sequence[float], parts: int) -> list[int]:
    """partition_balanced: least difference of the largest and the smallest part, by its recurrence.

    The recurrence keeps one choice for each prefix, which is not always the best: as published.
    """
    n = len(weights)
    if n <= parts:
        return [min(k, n) for k in range(parts + 1)]
    sums = _running(weights)
    largest, smallest = sums, sums
    came = []
    for _ in range(1, parts):
        best, high, low = np.zeros(n + 1, np.int64), np.zeros(n + 1), np.zeros(n + 1)
        for i in range(n + 1):
            part = sums[i] - sums[: i + 1]
            highs, lows = np.maximum(largest[: i + 1], part), np.minimum(smallest[: i + 1], part)
            best[i] = i - (highs - lows)[::-1].argmin()  # the latest of equals
            high[i], low[i] = highs[best[i]], lows[best[i]]
        came.append(best)
        largest, smallest = high, low
    return _walk(came, n)


def chain(weights: Sequence[float], parts: int) -> list[int]:
    """The least maximum, exact; no part is empty unless there are too few layers."""
    n = len(weights)
    sums = _running(weights)
    largest = sums
    came = []
    for k in range(1, parts):
        best, high = np.arange(n + 1), largest.copy()
        for i in range(k + 1, n + 1):
            highs = np.maximum(largest[k:i], sums[i] - sums[k:i])
            best[i] = k + highs.argmin()
            high[i] = highs[best[i] - k]
        came.append(best)
        largest = high
    return _walk(came, n)


def _running(weights: Sequence[float]) -> Floats:
    """Sums of the first 0, 1, .. weights."""
    return np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])


def _walk(came: Sequence[Sequence[int]], n: int) -> list[int]:
    """The bounds of the parts: `came[k][i]` is where the part that ends at i starts."""
    bounds = [n]
    for row in reversed(came):
        bounds.append(int(row[bounds[-1]]))
    return [0, *bounds[::-1]]


def torchgpipe(weights: Sequence[float], parts: int) -> list[int]:
    """blockpartition: from equal counts, move layers until parts differ by less than a layer.

    Of several emptiest parts the one nearest the fullest gains a layer, as in the paper that it
    follows (arXiv:1308.2452); the package takes the first, which may take from an empty part.
    """
    n, low, high = len(weights), min(weights), max(weights)
    if n <= parts:
        return [min(k, n) for k in range(parts + 1)]
    layer = 1 << 40  # the range of the weights, in whole numbers: sums are exact
    scale = layer / (high - low) if high > low else 0.0
    sums = np.array([0, *accumulate(round((weight - low) * scale) for weight in weights)])
    bounds = [n // parts * k for k in range(parts)] + [n]
    while True:
        found = np.diff(sums[bounds])
        most, fullest = max(zip(found, range(parts), strict=True))
        while True:
            found = np.diff(sums[bounds])
            least, _, emptiest = min((size, abs(k - fullest), k) for k, size in enumerate(found))
            if most <= least + layer:
                return bounds
            if fullest < emptiest:
                donor = emptiest - 1
                bounds[emptiest] -= 1
            else:
                donor = emptiest + 1
                bounds[emptiest + 1] += 1
            if donor == fullest:
                break


# Placements that are more than cuts of a list


def equal_blocks(graph: Graph, parts: int) -> Iterator[list[int]]:
    """PipeDream-2BW's planner at a fixed depth: as many repeated modules in each stage.

    What precedes the first goes with it, all else with the module before it. The published code
    refuses counts that the depth does not divide; here the modules that are left over go to the
    first stages, to the last, or are spread.
    """
    for modules in _module_lists(graph):
        starts = [i for i, numbered in modules if numbered]
        if len(starts) < parts:
            continue
        layers = [0, *starts[1:], len(graph.names)]
        count = len(starts)
        first = uniform([0.0] * count, parts)
        last = [count - i for i in reversed(first)]
        spread = [k * count // parts for k in range(parts + 1)]
        for bounds in dict.fromkeys((tuple(first), tuple(last), tuple(spread))):
            yield _stages([layers[i] for i in bounds])


def pipedream(graph: Graph, parts: int) -> Iterator[list[int]]:
    """PipeDream's dynamic program for a straight pipeline, exact over its antichain states.

    A[j] of k stages is the least over the states i before j of the greatest of A[i] of k - 1
    stages, the time between i and j, and what is alive at i, there and back, over the link's
    bandwidth. The last term is an option of the published tool: with it, then without. A level of
    links is a row of consecutive stages, as the tool's levels are.
    """
    inside = _states(graph)
    times = inside @ np.array(graph.seconds)
    alive = np.zeros(len(inside))
    for size, ends in graph.tensors:
        count = inside[:, sorted(set(ends))].sum(axis=1)
        alive += size * ((count > 0) & (count < len(set(ends))))
    outside = inside @ (1 - inside).T  # blocks of i that j has not
    step = np.where((outside == 0) & (outside.T > 0), times[None, :] - times[:, None], np.inf)
    for charged in (1, 0):
        best, came = step[0], []
        for k in range(1, parts):
            reached = np.maximum(best, charged * alive / graph.bandwidths[k - 1])
            found = np.maximum(reached[:, None], step)
            came.append(found.argmin(axis=0))
            best = np.take_along_axis(found, came[-1][None, :], axis=0)[0]
        if math.isfinite(best[-1]):
            states = [len(inside) - 1]
            for row in reversed(came):
                states.append(int(row[states[-1]]))
            yield [int(stage) for stage in (inside[states[1:]] == 0).sum(axis=0)]


def _states(graph: Graph) -> Floats:
    """State x block: what lies before each antichain; where they are too many (the published tool
    does not finish then), what lies before each block of the list.
    """
    family = make_family(graph, STATES)
    if family.complete:
        return family.members.astype(np.float64)
    count = len(graph.names)
    return np.tri(count + 1, count, -1)


BASELINES: dict[str, Baseline] = {
    "uniform": _cutting(uniform, _times),
    "DS params": _cutting(deepspeed, _sizes),
    "DS time": _cutting(deepspeed, _times),
    "torchgpipe": _cutting(torchgpipe, _times),
    "PipeDream": pipedream,
    "2BW": equal_blocks,
    "chain": _cutting(chain, _times),
}
