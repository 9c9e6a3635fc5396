"""Profiles of PipeDream (SOSP 2019): graph.txt, a node or an edge in each line.

    node7 -- LSTM(2048, 1024) -- forward_compute_time=3.190, backward_compute_time=5.348, \\
        activation_size=[6291456.0; 131072.0], parameter_size=50364416.000
    <tab>node6 -- node7

Times are in ms, sizes in bytes. The objective is PipeDream's own: see profile.py. Inputs cost
nothing: each stage could load them.
"""

import math

from p2bw.compiler.placement.profile import Operator, Output, ProfileProblem

NUMBERS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")


def read_pipedream(text: str, bandwidth: float) -> ProfileProblem:
    """The problem in a profile; ValueError names the line and the field that are not valid."""
    nodes: dict[str, Operator] = {}
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
            nodes[name] = Operator(
                name=f"{name} {description}",
                time=0.0 if given else (forward + backward) / 1000,
                parameters=0.0 if given else parameters,
                activation=0.0 if given else activation,
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
    return ProfileProblem(
        operators=tuple(nodes.values()),
        outputs=tuple(
            Output(place[source], tuple(targets), outputs[source])
            for source, targets in readers.items()
        ),
        order=tuple((place[source], place[target]) for _, source, target in edges),
        bandwidth=bandwidth,
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
