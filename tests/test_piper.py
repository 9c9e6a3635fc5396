"""Problems of Piper: equal to brute force, and to the values that its authors' code gives."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2bw.compiler.devices import parse_bytes
from p2bw.compiler.placement import hybrid
from p2bw.compiler.placement.hybrid import solve_hybrid
from p2bw.compiler.placement.knapsack import Knapsack, Option, staircase
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.reader_piper import read_piper
from p2bw.compiler.solve import solve_file
from p2bw.contract.errors import InfeasibleError, InputFileError, TimeLimitError, UsageError

GIB = 2**30
BANDWIDTH = 25 * GIB  # of the published runs

small = st.integers(0, 6)


def variant(draw, name, sources, targets, sync):
    return {
        "id": name,
        "timePerSample": draw(small),
        "parameterSize": draw(small) * 2,
        "memoryUsageA": draw(small),
        "memoryUsageB": draw(small),
        "syncTimeFw": {str(v): sync for v in sources},
        "syncTimeBw": {str(v): sync for v in targets},
    }


@st.composite
def files(draw):
    """Up to 5 nodes with up to 3 variants at 1 or 2 devices, and memory that may bind."""
    count = draw(st.integers(1, 5))
    pairs = list(itertools.combinations(range(count), 2))
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    # Not in the order of the numbers: the file need not be sorted.
    names = draw(st.permutations(range(10, 10 + count)))
    nodes = []
    for v in range(count):
        sources = [names[a] for a, b in edges if b == v]
        targets = [names[b] for a, b in edges if a == v]
        nodes.append({"id": names[v], "name": "node", "TMPCs": {}})
        for degree in draw(st.sampled_from([[1], [1], [1, 2], [2]])):
            own = [
                variant(draw, f"way {i}", sources, targets, degree - 1)
                for i in range(draw(st.integers(1, 3)))
            ]
            nodes[v]["TMPCs"][str(degree)] = own
    return {
        "maxDevices": draw(st.integers(1, 4)),
        "maxMemoryPerDevice": draw(st.sampled_from([5, 10, 15, 20, 40, 1000])),
        "bandwidth": 2,
        draw(st.sampled_from(["mbsInBatch", "maxBatchSize"])): draw(st.sampled_from([1, 2, 4, 6])),
        "nodes": nodes,
        "edges": [
            {"sourceId": names[a], "destId": names[b], "communicationCost": draw(small)}
            for a, b in edges
        ],
    }


def stage_cost(file, nodes, replicas, degree, in_flight):
    """The least time of a stage over all choices of variants, or None; from the definition."""
    own = [node for node in file["nodes"] if node["id"] in nodes]
    batch = file.get("mbsInBatch") or file["maxBatchSize"]
    best = None
    for choice in itertools.product(*(node["TMPCs"].get(str(degree), []) for node in own)):
        held = sum(v["memoryUsageA"] * in_flight + v["memoryUsageB"] for v in choice)
        if held > file["maxMemoryPerDevice"]:
            continue
        sent = Fraction(0)
        for node, way in zip(own, choice, strict=True):
            for edge in file["edges"]:
                ends, size = (edge["sourceId"], edge["destId"]), edge["communicationCost"]
                if ends[0] == node["id"] and ends[1] not in nodes:
                    sent += 2 * (size + way["syncTimeBw"][str(ends[1])])
                if ends[1] == node["id"] and ends[0] not in nodes:
                    sent += 2 * (size + way["syncTimeFw"][str(ends[0])])
            sent += Fraction(4 * (replicas - 1) * way["parameterSize"], batch)
        time = sum(way["timePerSample"] for way in choice)
        load = (time + sent / file["bandwidth"]) / replicas
        best = load if best is None else min(best, load)
    return best


def by_brute_force(file, replicated):
    """The least busiest stage over all plans, or None."""
    best = None
    ids = [node["id"] for node in file["nodes"]]
    batch = file.get("mbsInBatch") or file["maxBatchSize"]
    shapes = [(1, 1)]
    if replicated:
        shapes = [(d, t) for d in (1, 2, 3, 4) for t in (1, 2) if batch % d == 0]
    for depth in range(1, min(len(ids), file["maxDevices"], batch) + 1):
        for place in itertools.product(range(depth), repeat=len(ids)):
            at = dict(zip(ids, place, strict=True))
            if len(set(place)) < depth:
                continue
            if any(at[edge["sourceId"]] > at[edge["destId"]] for edge in file["edges"]):
                continue
            cuts = [{v for v in ids if at[v] == k} for k in range(depth)]
            for plan in itertools.product(shapes, repeat=depth):
                if (
                    sum(d * t for d, t in plan) > file["maxDevices"]
                    or sum(d for d, _ in plan) > batch
                ):
                    continue
                loads = []
                for k, (d, t) in enumerate(plan):
                    in_flight = -(-sum(other for other, _ in plan[k:]) // d)
                    loads.append(stage_cost(file, cuts[k], d, t, in_flight))
                if None not in loads:
                    best = max(loads) if best is None else min(best, max(loads))
    return best


@given(files(), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_brute_force_finds_nothing_better(file, replicated):
    problem = read_piper(json.dumps(file).encode())
    best = by_brute_force(file, replicated)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve_hybrid(problem, problem.devices, replicated=replicated)
        return
    found = solve_hybrid(problem, problem.devices, replicated=replicated)
    assert found.objective == pytest.approx(float(best), rel=1e-12, abs=1e-12)
    assert found.bound == found.objective
    assert max(cost.memory for cost in found.costs) <= problem.memory
    assert sum(stage.replicas * stage.degree for stage in found.stages) <= problem.devices
    assert sorted(v for stage in found.stages for v in stage.nodes) == [*range(len(file["nodes"]))]


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_knapsacks_are_exact_and_their_bounds_hold(data):
    value = st.integers(0, 2**20)
    ways = data.draw(
        st.lists(st.lists(st.tuples(value, value), min_size=1, max_size=4), max_size=6)
    )
    stairs = [staircase([Option(t, s, i) for i, (t, s) in enumerate(own)]) for own in ways]
    capacity = data.draw(st.integers(0, 2**21))
    choices = [
        sum(t for t, _ in choice)
        for choice in itertools.product(*ways)
        if sum(s for _, s in choice) <= capacity
    ]
    sack, nodes = Knapsack(stairs, capacity), list(range(len(ways)))
    found = sack.fastest(nodes, 2**30)
    if not choices:
        assert found is None
        return
    assert found is not None
    time, places = found
    assert time == min(choices) == sum(ways[v][i][0] for v, i in enumerate(places))
    assert sum(ways[v][i][1] for v, i in enumerate(places)) <= capacity
    assert sack.fastest(nodes, time - 1) is None
    excess = sack.fast_size.sum() - capacity
    if excess > 0:
        bounds = sack.bounds(np.ones((1, len(ways)), bool), np.array([excess]))
        fastest = sack.fast_time.sum()
        assert fastest + bounds.below[0] <= time <= fastest + bounds.above[0]


def test_equal_layers_are_no_harder():
    """Many ways to choose the same: a search that tries them in turn does not end."""
    layers = [staircase([Option(300 + i % 7, 10, 0), Option(400 + i % 5, 3, 1)]) for i in range(60)]
    found = Knapsack(layers, 401).fastest(range(60), 10**6)
    assert found is not None
    assert sum(found[1]) == 29  # 60 * 10 - 29 * 7 = 397
    assert found[0] == sum(layer[0].time for layer in layers) + sum(
        sorted(layer[1].time - layer[0].time for layer in layers)[:29]
    )


def test_sums_that_come_near_to_each_other_end():
    """What a node saves is what it costs: 2**40 choices, and no bound tells them apart."""
    random = np.random.default_rng(1)
    held = random.integers(1, 10**12, 40).tolist()
    layers = [staircase([Option(0, size, 0), Option(size, 0, 1)]) for size in held]
    found = Knapsack(layers, sum(held) // 3).fastest(range(40), 2**52)
    assert found is not None
    least = sum(held) - sum(held) // 3
    assert least <= found[0] <= least * (1 + 1e-6)


CHAIN = {
    "maxDevices": 2,
    "maxMemoryPerDevice": 100.0,
    "bandwidth": 4.0,
    "mbsInBatch": 8,
    "nodes": [
        {
            "id": v,
            "name": "layer",
            "TMPCs": {
                "1": [
                    {
                        "id": name,
                        "timePerSample": time,
                        "parameterSize": 0.0,
                        "memoryUsageA": held,
                        "memoryUsageB": 30.0 - held,
                        "syncTimeFw": {str(v - 1): 0.0} if v else {},
                        "syncTimeBw": {str(v + 1): 0.0} if v < 3 else {},
                    }
                    for name, time, held in (
                        ("vanilla", 3.0, 28.0),
                        ("activation recomp", 4.0, 8.0),
                    )
                ]
            },
        }
        for v in range(4)
    ],
    "edges": [{"sourceId": v, "destId": v + 1, "communicationCost": 1.0} for v in range(3)],
}


@pytest.fixture
def chain(tmp_path):
    """Four equal layers; two of them with two microbatches in flight hold 116 of 100 bytes."""
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(CHAIN))
    return path


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "p2bw", "solve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_only_the_nodes_that_have_to_recompute(chain):
    printed = run(chain, "--json")
    assert printed.returncode == 0, printed.stderr
    result = json.loads(printed.stdout)
    assert (result["status"], result["objective"], result["gap"]) == ("optimal", 7.5, 0.0)
    assert result["assignment"] == {"0": 0, "1": 0, "2": 1, "3": 1}
    first, last = result["stages"]
    assert (first["load"], first["memory"], first["recompute"]) == (7.5, 96.0, ["0"])
    assert first["variants"] == {"0": "activation recomp", "1": "vanilla"}
    assert (last["load"], last["memory"], last["recompute"]) == (6.5, 60.0, [])
    assert "0, 1" in run(chain).stdout


def test_replicas_need_no_transfers_and_less_in_flight(chain):
    found = solve_file(chain, replication="per-stage", memory=120)
    assert [(stage.replicas, stage.memory) for stage in found.stages] == [(2, 120.0)]
    assert found.objective == 6.0
    assert solve_file(chain, replication="per-stage").objective == 7.5  # 120 bytes do not fit


def test_infeasible_names_the_memory_that_would_do(chain):
    refused = run(chain, "--memory", "60B")
    assert refused.returncode == 4
    needed = int(re.search(r"needs (\d+) bytes", refused.stderr)[1])
    assert run(chain, "--memory", f"{needed}B").returncode == 0
    assert run(chain, "--memory", f"{needed - 1}B").returncode == 4
    chain.write_text(json.dumps(CHAIN).replace('"1": [', '"2": ['))
    with pytest.raises(InfeasibleError, match="try --replication per-stage"):
        solve_file(chain)
    with pytest.raises(InfeasibleError, match="no more than 1; offer more"):
        solve_file(chain, replication="per-stage", stages=1)


def test_too_many_ideals_leave_an_honest_gap(chain, monkeypatch):
    monkeypatch.setattr(hybrid, "MAX_IDEALS", 2)
    found = solve_file(chain)
    assert (found.status, found.objective, found.bound) == ("feasible", 7.5, 6.0)
    with pytest.raises(TimeLimitError, match="none ruled out"):
        solve_file(chain, memory=60.5)
    with pytest.raises(InfeasibleError):
        solve_file(chain, memory=59)  # four times 30 bytes, on two devices


class After(Stop):
    """Stops a search when it has been asked so often."""

    def __init__(self, questions):
        super().__init__(limit_s=1.0)
        self.left = questions

    def __call__(self):
        self.left -= 1
        return self.left < 0


def test_a_stopped_search_keeps_its_plan_and_an_honest_bound():
    problem = read_piper(json.dumps(CHAIN).encode())
    seen = set()
    for questions in range(40):
        try:
            found = solve_hybrid(problem, 2, replicated=False, stop=After(questions))
        except TimeLimitError:
            assert questions < 10
            seen.add("none")
            continue
        assert found.bound <= 7.5 <= found.objective
        seen.add("proven" if found.bound == found.objective else "stopped")
    assert seen == {"none", "stopped", "proven"}


def test_more_stages_than_nodes_are_no_cure(chain):
    with pytest.raises(InfeasibleError, match=r"\(--memory\)$"):
        solve_file(chain, stages=9, memory=20)
    with pytest.raises(InfeasibleError, match="devices"):
        solve_file(chain, stages=2, memory=20)


def test_bad_requests_name_what_is_wrong(chain):
    with pytest.raises(UsageError, match="uniform, per-stage"):
        solve_file(chain, replication="all")
    with pytest.raises(UsageError, match="no size of a memory"):
        parse_bytes("60")
    assert run(chain, "--replication", "all").returncode == 2
    assert run(chain, "--bandwidth", "1").returncode == 2


def put(path, value):
    """CHAIN with another value at a dotted path; None: without it."""
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    found = file = copy.deepcopy(CHAIN)
    for key in way:
        found = found[str(key) if isinstance(found, dict) else key]
    last = str(last) if isinstance(found, dict) else last
    if value is None:
        del found[last]
    else:
        found[last] = value
    return file


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mbsInBatch", None, "mbsInBatch"),
        ("maxDevices", 0, "maxDevices"),
        ("maxMemoryPerDevice", "much", "maxMemoryPerDevice"),
        ("bandwidth", 0, "bandwidth"),
        ("nodes", [], "nodes"),
        ("nodes.1.id", 0, "two of one id"),
        ("nodes.0.TMPCs", {}, "nodes.0.TMPCs"),
        ("nodes.0.TMPCs.1", [], "nodes.0.TMPCs.1"),
        ("nodes.0.TMPCs", {"0": CHAIN["nodes"][0]["TMPCs"]["1"]}, "nodes.0.TMPCs.0"),
        ("nodes.0.TMPCs.1.0.timePerSample", -1, "nodes.0.TMPCs.1.0.timePerSample"),
        ("nodes.0.TMPCs.1.1.memoryUsageA", None, "nodes.0.TMPCs.1.1.memoryUsageA"),
        ("nodes.0.TMPCs.1.1.id", "vanilla", "nodes.0.TMPCs.1: two variants of one id"),
        ("nodes.1.TMPCs.1.0.syncTimeFw", {}, "nodes.1.TMPCs.1.0.syncTimeFw: nothing for"),
        ("nodes.1.TMPCs.1.0.syncTimeBw.0", 0, "nodes.1.TMPCs.1.0.syncTimeBw: no edge"),
        ("nodes.1.TMPCs.1.1.syncTimeFw.0", 1, "nodes.1.TMPCs.1.1.syncTimeFw: .* not supported"),
        ("edges.1.destId", 9, "edges.1.destId: no node has the id 9"),
        ("edges.1", CHAIN["edges"][0], "edges.1: a second edge"),
        ("edges.1.destId", 0, "edges: nodes depend on each other"),
        ("edges.0.communicationCost", None, "edges.0.communicationCost"),
    ],
)
def test_malformed_files_name_the_field(chain, path, value, message):
    chain.write_text(json.dumps(put(path, value)))
    with pytest.raises(InputFileError, match=message):
        solve_file(chain)


def published(name):
    """A public file with the bandwidth of the published runs."""
    folder = os.environ.get("P2BW_PROBLEMS")
    path = Path(folder or "") / "piper" / name
    if not folder or not path.exists():
        pytest.skip(f"P2BW_PROBLEMS has no piper/{name}")
    return replace(read_piper(path.read_bytes()), bandwidth=BANDWIDTH)


@pytest.mark.parametrize(
    ("devices", "memory", "objective"),
    [(2, 2.5, 263.354), (2, 3.5, 260.227), (4, 1.2, 137.131), (4, 2.5, 131.677)],
)
def test_gnmt_in_replicated_stages(devices, memory, objective):
    problem = replace(published("gnmt.json"), memory=memory * GIB)
    found = solve_hybrid(problem, devices, replicated=True)
    assert found.objective == pytest.approx(objective, abs=5e-4)
    assert found.bound == found.objective


# Seconds per microbatch of BERT-32 on 2, 4, 8, 16, 32 devices in a row, by memory in GiB, with and
# without recomputation; None: nothing fits.
BERT = {
    4: ((None, None, None, 0.110673, 0.0739063), (None, None, None, None, None)),
    6: ((None, None, 0.192357, 0.100427, 0.0739063), (None, None, None, None, None)),
    8: ((None, None, 0.165856, 0.100427, 0.0739063), (None, None, None, None, None)),
    12: (
        (None, 0.325018, 0.165856, 0.100427, 0.0739063),
        (None, None, 0.229778, 0.105514, 0.100427),
    ),
    16: (
        (0.631738, 0.295221, 0.164516, 0.100427, 0.0739063),
        (None, 0.327871, 0.165729, 0.100576, 0.0739063),
    ),
    24: ((0.525824, 0.295221, 0.164516, 0.100413, 0.0739063),) * 2,
    40: ((0.525824, 0.295221, 0.164516, 0.0997485, 0.0739063),) * 2,
    80: ((0.525824, 0.295221, 0.164516, 0.0997485, 0.0739063),) * 2,
}


@pytest.mark.parametrize("memory", BERT)
@pytest.mark.parametrize("recompute", [True, False])
def test_bert_in_a_row(memory, recompute):
    problem = replace(published("bert32a100.json"), memory=memory * GIB, microbatches=1920)
    if not recompute:
        plain = [{d: own[:1] for d, own in node.variants.items()} for node in problem.nodes]
        nodes = zip(problem.nodes, plain, strict=True)
        problem = replace(problem, nodes=tuple(replace(n, variants=own) for n, own in nodes))
    for devices, objective in zip((2, 4, 8, 16, 32), BERT[memory][not recompute], strict=True):
        if objective is None:
            with pytest.raises(InfeasibleError, match="no plan fits"):
                solve_hybrid(problem, devices, replicated=False)
            continue
        found = solve_hybrid(problem, devices, replicated=False)
        assert found.objective == pytest.approx(objective, rel=1e-5)
        assert found.bound == found.objective
