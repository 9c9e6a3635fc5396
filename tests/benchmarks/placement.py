"""Ours against the partitioners in use, on the same problems and by the same objective.

    python tests/benchmarks/placement.py             # the models below, at 4, 8 and 16 stages
    python tests/benchmarks/placement.py FILE...     # problem files, as p2bw solve reads them

Prints our objective, its proven gap and our seconds; then how many times worse each baseline's
placement is (baselines.py says how each is defined). A pipeline of d stages of one device each;
a stage recomputes its forward where its stash would not fit, and tensors that skip stages are
relayed where that helps, whoever placed it. "too big": no placement of that baseline fits the
memory; "-": it has none. Ends with 1 if a baseline is better.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
from baselines import BASELINES, Graph

from p2bw.compiler.placement import solve_fixed
from p2bw.compiler.placement.contract import components
from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.instance import PS, make_instance
from p2bw.compiler.placement.loads import LoadProblem, Node, Transfer, judge_loads
from p2bw.compiler.placement.profile import ProfileProblem, judge_profile
from p2bw.compiler.placement.relays import judge
from p2bw.compiler.problem import PlacementProblem
from p2bw.compiler.readers import read_any
from p2bw.compiler.solve import solve_file

STAGES = (4, 8, 16)
CLUSTER = "p4de:2"  # two nodes of 8 A100-80
EXAMPLES = Path(__file__).parents[2] / "examples"
# What is unbalanced in them: a head of 128,256 words; decoder layers that also read the encoder's
# output; few positions after many; skips across the model and layers of all sizes; images that
# shrink while channels grow; layers that read all before them.
MODELS = {
    "GPT, 128k vocabulary": ("gpt.py", "large_vocabulary", 1),
    "T5-large": ("hf_t5.py", "model", 4),
    "Whisper large": ("hf_whisper.py", "model", 1),
    "U-Net": ("unet.py", "model", 4),
    "ResNet-152": ("resnet.py", "resnet152", 32),
    "DenseNet-121": ("densenet.py", "densenet121", 32),
}
AS_GOOD = 1 + 1e-6  # ours is proven to about this


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem at one number of stages; a baseline has no placement, or how much worse it is."""

    problem: str
    stages: int
    objective: str
    gap: float
    seconds: float
    found: dict[str, tuple[float, bool] | None]  # times ours, and whether it fits

    @property
    def best(self) -> float | None:
        """Of the baselines."""
        fitting = [found[0] for found in self.found.values() if found is not None and found[1]]
        return min(fitting, default=None)

    def __str__(self) -> str:
        cells = [self.problem, str(self.stages), self.objective]
        cells += [f"{self.gap:.2%}", f"{self.seconds:.1f}"]
        for found in self.found.values():
            cells.append("-" if found is None else f"{found[0]:.3f}" if found[1] else "too big")
        cells.append("-" if self.best is None else f"{self.best:.3f}")
        return f"| {' | '.join(cells)} |"


HEADER = ["problem", "stages", "ours", "gap", "s", *BASELINES, "best"]


def best_of(tried: Iterator[tuple[float, bool]], ours: float) -> tuple[float, bool] | None:
    """The least objective among those that fit, else among all."""
    found = min(tried, key=lambda judged: (not judged[1], judged[0]), default=None)
    return None if found is None else (found[0] / ours, found[1])


# Models: PlacementProblem


def graph_of_blocks(problem: PlacementProblem, parts: int) -> Graph:
    if not problem.topology.uniform:
        raise SystemExit("baselines know one kind of device only, in a tree of links")
    instance = make_instance(problem)
    group_of = {block: i for i, members in enumerate(instance.groups) for block in members}
    number = {block.name: group_of[i] for i, block in enumerate(problem.blocks)}
    network = instance.network
    bandwidths = [
        min(network.bandwidth(port) for port in network.route(rank, rank + 1))
        for rank in range(parts - 1)
    ]
    return Graph(
        names=[problem.blocks[members[0]].name for members in instance.groups],
        seconds=[int(ps) / PS for ps in instance.forward_ps[0] + instance.backward_ps[0]],
        parameters=[
            (parameter.bytes, sorted({number[name] for name in parameter.blocks}))
            for parameter in problem.parameters
        ],
        tensors=[
            (2.0 * tensor.bytes, [number[name] for name in (tensor.producer, *tensor.consumers)])
            for tensor in problem.tensors
        ],
        predecessors=instance.predecessors,
        bandwidths=bandwidths,
    )


def compare_blocks(name: str, problem: PlacementProblem, parts: int) -> Row:
    instance, shape = make_instance(problem), Shape(parts, 1)
    started = time.monotonic()
    ours = solve_fixed(problem, parts)
    seconds = time.monotonic() - started
    graph = graph_of_blocks(problem, parts)

    def judged(place: Sequence[int]) -> tuple[float, bool]:
        found = judge(instance, shape, place, "auto").evaluation
        return found.period_s, found.feasible

    return Row(
        problem=name,
        stages=parts,
        objective=f"{ours.period_s * 1e3:.2f} ms",
        gap=ours.gap,
        seconds=seconds,
        found={
            baseline: best_of(map(judged, placed(graph, parts)), ours.period_s)
            for baseline, placed in BASELINES.items()
        },
    )


def problem_of(path: Path, factory: str, microbatch: int, cluster: str) -> PlacementProblem:
    """The placement problem of a model; traced once, for every number of stages."""
    from p2bw.compiler.lower import placement_problem
    from p2bw.compiler.optimizer_state import optimizer_bytes
    from p2bw.compiler.topology import make_topology
    from p2bw.compiler.trace import trace
    from p2bw.modelfile.load import load_model_file
    from p2bw.passes import pipeline, run_passes

    topology = make_topology(cluster=cluster)
    file = load_model_file(path, factory, {})
    program = run_passes(trace(file, microbatch), pipeline(topology.device))
    return placement_problem(
        program,
        topology=topology,
        schedule="2bw",
        microbatches=None,
        optimizer=optimizer_bytes(file, program.parameters.values()),
        on={},
    )


# Published problems: LoadProblem, ProfileProblem


def graph_of_nodes(problem: LoadProblem, parts: int) -> tuple[Graph, list[int]]:
    """What shares a device is one layer; and the layer of each node. A transfer costs its time."""
    leader = components(problem)
    order = nx.DiGraph()
    order.add_nodes_from(leader)
    order.add_edges_from((leader[u], leader[v]) for u, v in problem.order if leader[u] != leader[v])
    layers = list(nx.lexicographical_topological_sort(order))
    number = {first: i for i, first in enumerate(layers)}
    layer_of = [number[first] for first in leader]
    seconds = [0.0] * len(layers)
    for layer, node in zip(layer_of, problem.nodes, strict=True):
        seconds[layer] += node.time
    graph = Graph(
        names=[problem.nodes[first].name for first in layers],
        seconds=seconds,
        parameters=[
            (node.size, [layer]) for layer, node in zip(layer_of, problem.nodes, strict=True)
        ],
        tensors=[
            (transfer.cost, [layer_of[end] for end in transfer.ends])
            for transfer in problem.transfers
        ],
        predecessors=tuple(tuple(sorted(number[u] for u in order.pred[v])) for v in layers),
        bandwidths=[1.0] * (parts - 1),
    )
    return graph, layer_of


def as_loads(problem: ProfileProblem) -> LoadProblem:
    """For the baselines: what they are told of a profile."""
    return LoadProblem(
        nodes=tuple(
            Node(name=op.name, time=op.time, size=op.parameters + op.activation)
            for op in problem.operators
        ),
        transfers=tuple(
            Transfer((out.producer, *out.readers), 2 * out.bytes / problem.bandwidth)
            for out in problem.outputs
        ),
        order=problem.order,
        devices=1,
        unit="s per minibatch",
    )


def compare_nodes(path: Path, problem: LoadProblem | ProfileProblem, stages: int | None) -> Row:
    loads = problem if isinstance(problem, LoadProblem) else as_loads(problem)
    parts = stages or loads.devices
    ours = solve_file(path, stages=parts)
    graph, layer_of = graph_of_nodes(loads, parts)

    def judged(place: Sequence[int]) -> tuple[float, bool]:
        placed = [place[layer] for layer in layer_of]
        if isinstance(problem, ProfileProblem):
            return judge_profile(problem, placed, (1,) * parts)[0], True
        found, devices = judge_loads(problem, placed, ("accelerator",) * parts)
        return found, all(device.memory <= problem.memory for device in devices)

    return Row(
        problem=path.stem,
        stages=parts,
        objective=f"{ours.objective:.6g}",
        gap=ours.gap,
        seconds=ours.seconds,
        found={
            baseline: best_of(map(judged, placed(graph, parts)), ours.objective)
            for baseline, placed in BASELINES.items()
        },
    )


# The table


def compare_files(files: Sequence[Path], stages: Sequence[int] | None) -> Iterator[Row]:
    for path in files:
        say(path.name)
        problem = read_any(path)
        if isinstance(problem, LoadProblem | ProfileProblem):
            for parts in stages or (None,):
                yield compare_nodes(path, problem, parts)
        elif isinstance(problem, PlacementProblem):
            for parts in stages or STAGES:
                yield compare_blocks(path.stem, problem, parts)
        else:
            raise SystemExit(f"{path}: baselines do not choose among variants of a node")


def compare_models(
    names: Sequence[str], stages: Sequence[int] | None, cluster: str
) -> Iterator[Row]:
    for name in names:
        file, factory, microbatch = MODELS[name]
        say(f"{name}: tracing")
        problem = problem_of(EXAMPLES / file, factory, microbatch, cluster)
        for parts in stages or STAGES:
            say(f"{name}: {len(problem.blocks)} blocks on {parts} stages")
            yield compare_blocks(name, problem, parts)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--stages", type=int, nargs="+")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cluster", default=CLUSTER, help="for the models")
    options = parser.parse_args()
    if options.files:
        rows = compare_files(options.files, options.stages)
    else:
        rows = compare_models(options.models, options.stages, options.cluster)
    print(f"| {' | '.join(HEADER)} |")
    print("|---" * len(HEADER) + "|")
    worse = []
    for row in rows:
        print(row, flush=True)
        if row.best is not None and row.best * AS_GOOD < 1:
            worse.append(f"{row.problem} on {row.stages} stages")
    say(f"worse than a baseline: {', '.join(worse)}" if worse else "never worse than a baseline")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
