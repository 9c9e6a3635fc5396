"""Published placement problems: equal to brute force, and to the optima that others found."""

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2bw.compiler.placement.additive import solve_loads
from p2bw.compiler.placement.loads import LoadProblem, Node, Transfer, judge_loads
from p2bw.compiler.reader_device_placement import read_device_placement
from p2bw.compiler.solve import solve_file
from p2bw.contract.errors import InfeasibleError, InputFileError, UsageError

small = st.integers(0, 6)


@st.composite
def load_problems(draw):
    """Up to 6 nodes, free and weightless ones too, classes, tensors both ways, tight memory."""
    count = draw(st.integers(1, 6))
    nodes = tuple(
        Node(
            name=str(i),
            time=draw(small),
            size=draw(small),
            cpu_time=draw(small) * 2,
            accelerated=draw(st.integers(0, 9)) > 0,
        )
        for i in range(count)
    )
    transfers, order = [], []
    for producer in range(count):
        readers = draw(st.sets(st.integers(0, count - 1), max_size=3)) - {producer}
        if readers:
            transfers.append(Transfer((producer, *sorted(readers)), draw(small)))
            order += [(producer, reader) for reader in sorted(readers) if reader > producer]
    pair = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    return LoadProblem(
        nodes=nodes,
        transfers=tuple(transfers),
        order=tuple(order),
        together=tuple(draw(st.lists(pair, max_size=1))),
        memory=draw(st.sampled_from([6.0, 12.0, math.inf])),
        devices=3,
        unit="s",
    )


def by_brute_force(problem, devices, cpus):
    """The least objective over all placements, or None."""
    best = None
    for used in range(1, devices + cpus + 1):
        for kinds in itertools.product(("accelerator", "cpu"), repeat=used):
            if kinds.count("cpu") > cpus or kinds.count("accelerator") > devices:
                continue
            for place in itertools.product(range(used), repeat=len(problem.nodes)):
                if is_allowed(problem, place, kinds):
                    objective, _ = judge_loads(problem, place, kinds)
                    best = objective if best is None else min(best, objective)
    return best


def is_allowed(problem, place, kinds):
    if any(place[u] > place[v] for u, v in problem.order):
        return False
    if any(len({place[node] for node in nodes}) > 1 for nodes in problem.together):
        return False
    for k, kind in enumerate(kinds):
        own = [node for node, own in zip(problem.nodes, place, strict=True) if own == k]
        if kind == "accelerator" and not all(node.accelerated for node in own):
            return False
        if kind == "accelerator" and sum(node.size for node in own) > problem.memory:
            return False
    return True


@given(load_problems(), st.integers(1, 3), st.integers(0, 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_optimum_is_that_of_brute_force(problem, devices, cpus):
    want = by_brute_force(problem, devices, cpus)
    if want is None:
        with pytest.raises(InfeasibleError, match=r"no placement fits|only on a CPU"):
            solve_loads(problem, devices, cpus)
        return
    found = solve_loads(problem, devices, cpus)
    kinds = [device.kind for device in found.devices]
    assert is_allowed(problem, found.place, kinds)
    assert judge_loads(problem, found.place, kinds) == (found.objective, found.devices)
    assert found.objective == found.bound == want
    assert kinds.count("cpu") <= cpus
    assert kinds.count("accelerator") <= devices


def file(**changes):
    """Two classes of a forward and a backward node, and a loss of its own."""
    latency = {1: 4, 2: 3, 3: 1, 4: 3, 5: 4}
    colour = {1: 7, 2: 8, 4: 8, 5: 7}
    nodes = [
        {
            "id": i,
            "supportedOnFpga": 1,
            "cpuLatency": 10 * time,
            "fpgaLatency": time,
            "isBackwardNode": int(i > 3),
            "size": 1.0,
            **({"colorClass": colour[i]} if i in colour else {}),
        }
        for i, time in latency.items()
    ]
    edges = [{"sourceId": i, "destId": i + 1, "cost": 0.5, "size": 9.0} for i in range(1, 5)]
    return {
        "maxSizePerFPGA": 10.0,
        "maxFPGAs": 2,
        "maxCPUs": 1,
        "nodes": nodes,
        "edges": edges,
        **changes,
    }


@pytest.fixture
def write(tmp_path):
    def to_file(content):
        path = tmp_path / "problem"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to_file


def test_device_placement_colocates_classes_and_adds_transfers_to_both_ends(write):
    found = solve_file(write(file()))
    # 1 and 5 | 2, 3 and 4; between them the outputs of 1 and of 4.
    assert found.assignment == {"1": 0, "2": 1, "3": 1, "4": 1, "5": 0}
    assert [stage.load for stage in found.stages] == [9.0, 8.0]
    assert [stage.memory for stage in found.stages] == [2.0, 3.0]
    assert (found.status, found.objective, found.bound) == ("optimal", 9.0, 9.0)
    assert solve_file(write(file()), stages=1).objective == 15.0


def test_too_little_memory_is_infeasible_with_numbers(write):
    with pytest.raises(InfeasibleError, match=r"fullest of 2 devices .* 3, .* only 2"):
        solve_file(write(file(maxSizePerFPGA=2.0)))
    helped = solve_file(write(file(maxSizePerFPGA=2.0)), cpus=1)
    assert "cpu" in [stage.device for stage in helped.stages]


BAD = {
    "maxFPGAs": file(maxFPGAs=0),
    r"nodes: two of one id": file(nodes=file()["nodes"] * 2),
    r"edges.0.destId: no node has the id 9": file(
        edges=[{"sourceId": 1, "destId": 9, "cost": 1.0}]
    ),
    r"edges.1.cost: another edge of node 1": file(
        edges=[
            {"sourceId": 1, "destId": 2, "cost": 1.0},
            {"sourceId": 1, "destId": 3, "cost": 2.0},
        ]
    ),
    r"edges.0.cost: .*greater than or equal": file(
        edges=[{"sourceId": 1, "destId": 2, "cost": -1.0}]
    ),
    r"nodes.0.fpgaLatency: Field required": file(nodes=[{"id": 1, "cpuLatency": 1}]),
    r"no JSON object": "[]",
    r"not JSON": "hello",
}


@pytest.mark.parametrize("message", BAD)
def test_an_invalid_file_names_its_field(message, write):
    with pytest.raises(InputFileError, match=message):
        solve_file(write(BAD[message]))


# "Efficient Algorithms for Device Placement of DNN Graph Operators": the optimum of ordered stages
# on the file's accelerators, and with its one CPU.
OPTIMA = {
    "layer_bert24_inference": (17.7899, 17.7899),
    "layer_bert24_training": (41.7458, 41.7458),
    "layer_gnmt_inference": (32.9107, 32.9107),
    "layer_inceptionv3_inference": (52.2016, 51.5519),
    "layer_resnet50_inference": (34.2229, 33.7747),
    "layer_resnet50_training": (80.4549, 78.6318),
    "operator_bert_l-12_inference": (147.478, 147.478),
    "operator_bert_l-3_inference": (27.9186, 27.9186),
    "operator_bert_l-3_training": (65.3031, 65.3031),
    "operator_bert_l-6_training": (79.5009, 72.865),
    "operator_resnet50_inference": (128.0735, 124.3488),
    "operator_resnet50_training": (263.0353, 255.1944),
}


def published(*parts):
    folder = os.environ.get("P2BW_PROBLEMS")
    if folder is None:
        pytest.skip("P2BW_PROBLEMS names no folder of public problem files")
    path = Path(folder, *parts)
    if not path.exists():
        pytest.skip(f"P2BW_PROBLEMS has no {'/'.join(parts)}")
    return path


@pytest.mark.parametrize("name", OPTIMA)
def test_published_workloads_have_their_known_optimum(name):
    path = published("device_placement", f"{name}.json")
    for cpus, want in enumerate(OPTIMA[name]):
        found = solve_file(path, cpus=cpus)
        assert found.objective == pytest.approx(want, rel=1e-5)
        assert found.status == "optimal"
        kinds = [stage.device for stage in found.stages]
        problem = read_device_placement(path.read_bytes())
        assert is_allowed(problem, tuple(found.assignment.values()), kinds)


# The same layer graphs with transfers in the unit of the times, as the package's latency files have
# them: 1000 times dearer. The CPU saves nothing then.
CORRECTED = {
    "layer_bert24_inference": 20.591,
    "layer_bert24_training": 46.608,
    "layer_gnmt_inference": 44.782,
    "layer_inceptionv3_inference": 158.502,
    "layer_resnet50_inference": 181.900,
    "layer_resnet50_training": 479.038,
}


@pytest.mark.parametrize("name", CORRECTED)
def test_layer_graphs_with_corrected_transfers_have_their_known_optimum(name):
    problem = read_device_placement(published("device_placement", f"{name}.json").read_bytes())
    transfers = tuple(Transfer(t.ends, 1000 * t.cost) for t in problem.transfers)
    problem = replace(problem, transfers=transfers)
    for cpus in (0, 1):
        found = solve_loads(problem, problem.devices, cpus)
        assert found.objective == pytest.approx(CORRECTED[name], abs=1e-3)
        assert found.bound == found.objective
        assert is_allowed(problem, found.place, [device.kind for device in found.devices])


@st.composite
def blocks_in_a_row(draw):
    """Up to 5 diamonds, some with a tensor past their end; tight memory, nodes for a CPU alone."""
    nodes, transfers, order = [Node(name="0", time=1.0)], [], []
    for _ in range(draw(st.integers(2, 5))):
        first, branches = len(nodes) - 1, draw(st.integers(1, 3))
        last = first + branches + 1
        nodes += [
            Node(
                name=str(first + i + 1),
                time=float(draw(small)),
                size=float(draw(small)),
                cpu_time=float(draw(small)),
                accelerated=draw(st.integers(0, 7)) > 0,
            )
            for i in range(branches + 1)
        ]
        inner = tuple(range(first + 1, last))
        past = (first - 1,) if first and draw(st.integers(0, 3)) == 0 else ()
        transfers.append(Transfer((first, *inner), float(draw(small))))
        transfers += [Transfer((v, last), float(draw(small))) for v in (*inner, *past)]
        order += [(first, v) for v in inner] + [(v, last) for v in (*inner, *past)]
    return LoadProblem(
        nodes=tuple(nodes),
        transfers=tuple(transfers),
        order=tuple(order),
        memory=draw(st.sampled_from([8.0, 16.0, math.inf])),
        devices=3,
        unit="s",
    )


def one_block(loads, members):
    yield slice(0, len(members))


@given(blocks_in_a_row(), st.integers(1, 4), st.integers(0, 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_leaps_between_blocks_find_what_pairs_find(problem, devices, cpus):
    def outcome():
        try:
            return solve_loads(problem, devices, cpus).objective
        except InfeasibleError:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2bw.compiler.placement.additive.blocks", one_block)
        want = outcome()
    assert outcome() == want


def test_a_tensor_that_passes_a_stage_by_costs_it_nothing():
    problem = LoadProblem(
        nodes=tuple(Node(name=name, time=10.0) for name in "abc"),
        transfers=(Transfer((0, 2), 12.0),),
        order=((0, 1), (1, 2)),
        devices=3,
        unit="s",
    )
    assert solve_loads(problem, 3).objective == 22.0  # 30 in one stage; b does not pay


def test_cpus_need_their_times(tmp_path):
    from test_placement import topology

    from p2bw.compiler.problem import BlockCost, PlacementProblem

    block = BlockCost(name="a", forward_s=1.0, backward_s=1.0)
    problem = PlacementProblem(microbatch=1, blocks=(block,), topology=topology(1))
    path = tmp_path / "ours.json"
    path.write_text(problem.to_json())
    with pytest.raises(UsageError, match="how long blocks take on a CPU"):
        solve_file(path, cpus=1)


# A diamond: node3 and node4 read node2's output; the cheap place to cut is in front of node5.
PROFILE = """\
node1 -- Input -- forward_compute_time=100.0, backward_compute_time=0.0, activation_size=9e9, \
parameter_size=0.000
node2 -- Conv2d(1, 2) -- forward_compute_time=1000.0, backward_compute_time=2000.0, \
activation_size=4e9, parameter_size=8.000
node3 -- LSTM(2, 2) -- forward_compute_time=1000.0, backward_compute_time=0.0, \
activation_size=[1e9; 5e8], parameter_size=0.000
node4 -- ReLU -- forward_compute_time=0.0, backward_compute_time=0.0, activation_size=1e9, \
parameter_size=0.000
node5 -- Linear -- forward_compute_time=2000.0, backward_compute_time=2000.0, activation_size=0.0, \
parameter_size=0.000 -- stage_id=1
\tnode1 -- node2
\tnode2 -- node3
\tnode2 -- node4
\tnode3 -- node5
\tnode4 -- node5
"""


def test_pipedream_links_carry_each_live_output_and_its_gradient(write):
    with pytest.raises(UsageError, match="give --stages"):
        solve_file(write(PROFILE))
    found = solve_file(write(PROFILE), stages=2)
    assert list(found.assignment.values()) == [0, 0, 0, 0, 1]
    assert "node3 LSTM(2, 2)" in found.assignment
    assert [stage.load for stage in found.stages] == [4.0, 4.0]
    assert found.objective == 5.0  # 2 * (1.5 + 1) GB over the link
    assert solve_file(write(PROFILE), stages=2, bandwidth=1e10).objective == 4.0
    assert solve_file(write(PROFILE), stages=1).objective == 8.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("forward_compute_time=2000.0", "forward=1", "line 5: no forward_compute_time"),
        ("parameter_size=8.000", "parameter_size=x", "line 2: parameter_size: no number: 'x'"),
        ("parameter_size=8.000", "parameter_size=nan", "line 2: parameter_size: nan"),
        ("\tnode4 -- node5", "\tnode4 -- node6", "line 10: no node node6"),
        ("\tnode4 -- node5", "node4", "line 10: neither"),
        ("node5 -- Linear", "node4 -- Linear", "line 5: a second node node4"),
    ],
)
def test_an_invalid_profile_names_its_line(old, new, message, write):
    with pytest.raises(InputFileError, match=message):
        solve_file(write(PROFILE.replace(old, new)), stages=2)


def test_bandwidth_is_for_profiles_alone(write):
    with pytest.raises(UsageError, match="has its own bandwidth"):
        solve_file(write(file()), bandwidth=1e9)


# What PipeDream's own optimizer finds (--straight_pipeline, 4 machines, 1 GB/s, transfers counted).
STRAIGHT = {"vgg16": 0.41104, "resnet50": 0.25815, "gnmt": 0.02587}


@pytest.mark.parametrize("name", STRAIGHT)
def test_no_worse_than_pipedream_on_its_profiles(name):
    found = solve_file(published("pipedream_profiles", f"{name}.txt"), stages=4)
    assert found.status == "optimal"
    assert found.objective < STRAIGHT[name] * (1 + 1e-4)


@given(load_problems(), st.integers(1, 3), st.integers(0, 1))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_integer_program_agrees(problem, devices, cpus):
    want = by_brute_force(problem, devices, cpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2bw.compiler.placement.additive.MAX_IDEALS", 0)
        if want is None:
            with pytest.raises(InfeasibleError):
                solve_loads(problem, devices, cpus)
            return
        found = solve_loads(problem, devices, cpus)
    assert found.objective == pytest.approx(want, rel=1e-6)
    assert found.bound == pytest.approx(want, rel=1e-6)
