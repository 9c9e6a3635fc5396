"""Ours against the partitioners in use: python tests/benchmarks/placement.py FILE...

For each file, on the devices that it names (or --stages): our objective, its proven gap and our
seconds; then how many times worse each baseline's placement is by the same objective. Baselines
take what shares a device as one layer, in the order of the file, and cut the list of layers:

    uniform      the same number of layers each
    DS params    DeepSpeed's partition_balanced by bytes (of parameters, where a file has no other)
    DS time      the same by time
    torchgpipe   balance_by_time: blockpartition of the times
    chain        the least maximum of the times, exact: a chain without the graph
"""

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import networkx as nx

from p2bw.compiler.placement.contract import components
from p2bw.compiler.placement.loads import LoadProblem, judge_loads
from p2bw.compiler.readers import read_any
from p2bw.compiler.solve import solve_file

Cut = Callable[
    [Sequence[float], int], list[int]
]  # weights, parts -> where each part starts, the end


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
    sums = [0.0, *accumulate(weights)]
    largest, smallest = list(sums), list(sums)
    came = []
    for _ in range(1, parts):
        best = [(math.inf, 0, 0.0, 0.0)] * (n + 1)
        for i in range(n + 1):
            for m in range(i + 1):
                part = sums[i] - sums[m]
                high, low = max(largest[m], part), min(smallest[m], part)
                if high - low <= best[i][0]:
                    best[i] = (high - low, m, high, low)
        came.append([choice[1] for choice in best])
        largest, smallest = [c[2] for c in best], [c[3] for c in best]
    return _walk(came, n)


def chain(weights: Sequence[float], parts: int) -> list[int]:
    """The least maximum."""
    n = len(weights)
    sums = [0.0, *accumulate(weights)]
    largest = list(sums)
    came = []
    for _ in range(1, parts):
        best = [
            min((max(largest[m], sums[i] - sums[m]), m) for m in range(i + 1)) for i in range(n + 1)
        ]
        came.append([m for _, m in best])
        largest = [high for high, _ in best]
    return _walk(came, n)


def _walk(came: list[list[int]], n: int) -> list[int]:
    bounds = [n]
    for row in reversed(came):
        bounds.append(row[bounds[-1]])
    return [0, *bounds[::-1]]


def torchgpipe(weights: Sequence[float], parts: int) -> list[int]:
    """blockpartition: from equal counts, move layers until parts differ by less than a layer."""
    n, low, high = len(weights), min(weights), max(weights)
    if n <= parts:
        return [min(k, n) for k in range(parts + 1)]
    x = [(weight - low) / (high - low) if high > low else 0.0 for weight in weights]
    bounds = [n // parts * k for k in range(parts)] + [n]

    def sums() -> list[float]:
        return [sum(x[first:last]) for first, last in pairwise(bounds)]

    while True:
        found = sums()
        fullest = max(range(parts), key=lambda k: (found[k], k))
        while True:
            found = sums()
            emptiest = min(range(parts), key=lambda k: (found[k], k))
            if max(found) <= min(found) + 1:
                return bounds
            if fullest < emptiest:
                donor = emptiest - 1
                bounds[emptiest] -= 1
            else:
                donor = emptiest + 1
                bounds[emptiest + 1] += 1
            if donor == fullest:
                break


BASELINES: dict[str, tuple[str, Cut]] = {
    "uniform": ("time", uniform),
    "DS params": ("size", deepspeed),
    "DS time": ("time", deepspeed),
    "torchgpipe": ("time", torchgpipe),
    "chain": ("time", chain),
}


def place(problem: LoadProblem, parts: int, by: str, cut: Cut) -> list[int]:
    """Device of each node when a list of layers is cut."""
    leader = components(problem)
    graph = nx.DiGraph()
    graph.add_nodes_from(leader)
    graph.add_edges_from((leader[u], leader[v]) for u, v in problem.order if leader[u] != leader[v])
    layers = list(nx.lexicographical_topological_sort(graph))
    weight = dict.fromkeys(layers, 0.0)
    for own, node in zip(leader, problem.nodes, strict=True):
        weight[own] += getattr(node, by)
    bounds = cut([weight[own] for own in layers], parts)
    stage_of = {
        own: k for k, (first, last) in enumerate(pairwise(bounds)) for own in layers[first:last]
    }
    return [stage_of[own] for own in leader]


def compare(path: Path, stages: int | None) -> list[str]:
    """One row of the table."""
    problem = read_any(path)
    if not isinstance(problem, LoadProblem):
        raise SystemExit(f"{path}: baselines read the published formats only")
    ours = solve_file(path, stages=stages)
    parts = stages or problem.devices or 1
    row = [path.stem, str(parts), f"{ours.objective:.6g}", f"{ours.gap:.2%}", f"{ours.seconds:.1f}"]
    for by, cut in BASELINES.values():
        found, devices = judge_loads(
            problem, place(problem, parts, by, cut), ("accelerator",) * parts
        )
        fits = all(device.memory <= problem.memory for device in devices)
        row.append(f"{found / ours.objective:.3f}" + ("" if fits else " (too big)"))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--stages", type=int)
    options = parser.parse_args()
    print("| problem | devices | ours | gap | s |", " | ".join(BASELINES), "|")
    print("|---" * (5 + len(BASELINES)) + "|")
    for path in options.files:
        print("|", " | ".join(compare(path, options.stages)), "|", flush=True)


if __name__ == "__main__":
    main()
