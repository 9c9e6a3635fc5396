"""Profiles of PipeDream (SOSP 2019): graph.txt, a node or an edge in each line.

    node7 -- LSTM(2048, 1024) -- forward_compute_time=3.190, backward_compute_time=5.348, \\
        activation_size=[6291456.0; 131072.0], parameter_size=50364416.000
    <tab>node6 -- node7

Times are in ms, sizes in bytes. PipeDream's own objective, for straight pipelines: the busiest
stage or link, with links of `bandwidth` between neighbours that work beside the stages; a link
carries every output that is made before it and read after it, once, and its gradient back.
Inputs cost nothing: each stage could load them.
"""

import math

from p2bw.compiler.placement.loads import LoadProblem, Node, Transfer

NUMBERS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


def read_pipedream(text: str, bandwidth: float) -> LoadProblem:
    """The problem in a profile; ValueError names the line and the field that are not valid."""
    nodes: dict[str, Node] = {}
    outputs: dict[str, float] = {}
    edges: list[tuple[int, str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.strip().split(" -- ")
        if line.startswith("\t") and len(fields) == 2:
            edges.append((number, fields[0], fields[1]))
        elif len(fields) in (3, 4):
            name, description, costs = fields[:3]
            if name in nodes:
                raise ValueError(f"line {number}: a second node {name}")
            forward, backward, activation, parameters = _numbers(costs, number)
            given = description.startswith("Input")
            nodes[name] = Node(
                name=f"{name} {description}",
                time=0.0 if given else (forward + backward) / 1000,
                size=0.0 if given else activation + parameters,
            )
            outputs[name] = 0.0 if given else activation
        elif line.strip():
            raise ValueError(f"line {number}: neither 'id -- what -- costs' nor <tab>'id -- id'")
    if not nodes:
        raise ValueError("no nodes")
    place = {name: i for i, name in enumerate(nodes)}
    readers: dict[str, list[int]] = {}
    for number, source, target in edges:
        for end in (source, target):
            if end not in place:
                raise ValueError(f"line {number}: no node {end}")
        readers.setdefault(source, []).append(place[target])
    return LoadProblem(
        nodes=tuple(nodes.values()),
        transfers=tuple(
            Transfer((place[source], *targets), 2 * outputs[source] / bandwidth)
            for source, targets in readers.items()
        ),
        order=tuple((place[source], place[target]) for _, source, target in edges),
        devices=None,
        charge="boundaries",
        unit="s per minibatch",
    )


def _numbers(costs: str, line: int) -> list[float]:
    """The values of NUMBERS; a list of sizes counts as their sum."""
    values = dict(part.strip().partition("=")[::2] for part in costs.split(","))
    found = []
    for field in NUMBERS:
        if field not in values:
            raise ValueError(f"line {line}: no {field}")
        try:
            value = sum(float(size) for size in values[field].strip("[]").split(";"))
        except ValueError:
            raise ValueError(f"line {line}: {field}: no number: {values[field]!r}") from None
        if not 0 <= value < math.inf:
            raise ValueError(f"line {line}: {field}: {value:g}")
        found.append(value)
    return found
