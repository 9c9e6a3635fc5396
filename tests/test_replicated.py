"""Replicas chosen stage by stage: equal to brute force; no worse than PipeDream on its profiles."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2bw.compiler.placement.contract import contract_profile
from p2bw.compiler.placement.positions import Positions
from p2bw.compiler.placement.profile import Operator, Output, ProfileProblem, judge_profile
from p2bw.compiler.placement.profile_solver import solve_profile
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.reader_pipedream import read_pipedream
from p2bw.compiler.solve import solve_file
from p2bw.contract.errors import InfeasibleError, TimeLimitError, UsageError

SMALL = st.integers(0, 6)


@st.composite
def profiles(draw):
    """Up to 6 operators: free ones, ones without time but with parameters, skips, tight memory."""
    count = draw(st.integers(1, 6))
    operators = tuple(
        Operator(
            name=str(i),
            time=float(draw(SMALL)),
            parameters=float(draw(SMALL)),
            activation=float(draw(SMALL)),
        )
        for i in range(count)
    )
    outputs, order = [], []
    for producer in range(count - 1):
        readers = tuple(sorted(draw(st.sets(st.integers(producer + 1, count - 1), max_size=3))))
        if readers:
            outputs.append(Output(producer, readers, float(draw(SMALL))))
            order += [(producer, reader) for reader in readers]
    return ProfileProblem(
        operators=operators,
        outputs=tuple(outputs),
        order=tuple(order),
        bandwidth=draw(st.sampled_from([1.0, 4.0, 16.0])),
        memory=draw(st.sampled_from([math.inf, 12.0, 24.0, 48.0])),
    )


def period_of(problem, place, replicas):
    """PipeDream's recurrence, stage by stage from the front, written without our own code."""
    bandwidth = problem.bandwidth

    def live(k):
        crosses = [
            out.bytes
            for out in problem.outputs
            if place[out.producer] <= k and any(place[reader] > k for reader in out.readers)
        ]
        return sum(crosses)

    period = 0.0
    for k, m in enumerate(replicas):
        mine = [op for op, stage in zip(problem.operators, place, strict=True) if stage == k]
        time = sum(op.time for op in mine)
        parameters = sum(op.parameters for op in mine)
        period = max(period, (time + 4 * (m - 1) * parameters / (bandwidth * m)) / m)
        if k > 0:
            period = max(period, 2 * live(k - 1) / (bandwidth * m))
            if k < len(replicas) - 1:
                period = max(period, 2 * live(k) / (bandwidth * m))
    return period


def is_allowed(problem, place, replicas):
    idle = any(op.time for op in problem.operators)
    for k, m in enumerate(replicas):
        mine = [op for op, stage in zip(problem.operators, place, strict=True) if stage == k]
        if not mine or (idle and not any(op.time for op in mine)):
            return False
        flying = math.ceil(sum(replicas[k:]) / m)
        if flying * sum(op.parameters + op.activation for op in mine) > problem.memory:
            return False
    return all(place[u] <= place[v] for u, v in problem.order)


def by_brute_force(problem, workers, most):
    """(least period, fewest workers) over all placements and replicas, or None."""
    best = None
    for depth in range(1, min(workers, len(problem.operators)) + 1):
        vectors = [
            replicas
            for replicas in itertools.product(range(1, most + 1), repeat=depth)
            if sum(replicas) <= workers
        ]
        for place in itertools.product(range(depth), repeat=len(problem.operators)):
            for replicas in vectors:
                if is_allowed(problem, place, replicas):
                    found = (period_of(problem, place, replicas), sum(replicas))
                    if best is None or found[0] < best[0] * (1 - 1e-9):
                        best = found
                    elif found[0] < best[0] * (1 + 1e-9):
                        best = (best[0], min(best[1], found[1]))
    return best


@given(profiles(), st.integers(1, 4), st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_optimum_is_that_of_brute_force(problem, workers, replicated):
    most = workers if replicated else 1
    want = by_brute_force(problem, workers, most)
    if want is None:
        with pytest.raises(InfeasibleError, match="would be enough"):
            solve_profile(problem, workers, most)
        return
    found = solve_profile(problem, workers, most)
    replicas = [stage.replicas for stage in found.stages]
    assert is_allowed(problem, found.place, replicas)
    assert found.objective == pytest.approx(want[0], rel=1e-9)
    assert found.objective == pytest.approx(period_of(problem, found.place, replicas), rel=1e-12)
    assert found.bound == found.objective
    assert sum(replicas) == want[1]
    for stage in found.stages:
        assert stage.memory <= problem.memory


@given(profiles(), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_not_listed_is_still_bounded(problem, workers, replicated):
    most = workers if replicated else 1
    want = by_brute_force(problem, workers, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2bw.compiler.placement.profile_solver.MAX_IDEALS", 0)
        patch.setattr("p2bw.compiler.placement.positions.POSITIONS", 24)
        try:
            found = solve_profile(problem, workers, most)
        except InfeasibleError:
            assert want is None
            return
        except TimeLimitError:
            assert problem.memory < math.inf
            return
    assert want is not None
    assert found.bound <= want[0] * (1 + 1e-9)
    assert found.objective >= want[0] * (1 - 1e-9)
    assert is_allowed(problem, found.place, [stage.replicas for stage in found.stages])


@given(profiles())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_minimum_cuts_are_ideals_and_no_ideal_of_their_range_is_cheaper(problem):
    flow = contract_profile(problem, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("p2bw.compiler.placement.positions.POSITIONS", 24)
        positions = Positions(flow)
    groups = len(flow.time)
    for bits in range(1 << groups):
        inside = [bool(bits >> v & 1) for v in range(groups)]
        ideal = all(inside[u] for v in range(groups) if inside[v] for u in flow.predecessors[v])
        assert ideal or bits not in positions.ideals
        if ideal:
            time = sum(int(flow.time[v]) for v in range(groups) if inside[v])
            live = sum(cost for ends, cost in flow.cuts if len({inside[v] for v in ends}) > 1)
            for b, least in enumerate(positions.live):
                if positions.edges[b] <= time <= positions.edges[b + 1]:
                    assert least <= live


def test_a_vector_of_replicas_by_hand():
    problem = ProfileProblem(
        operators=(
            Operator(name="a", time=6.0, parameters=0.0, activation=2.0),
            Operator(name="b", time=2.0, parameters=9.0, activation=1.0),
        ),
        outputs=(Output(0, (1,), 1.0),),
        order=((0, 1),),
        bandwidth=2.0,
        memory=12.0,
    )
    found = solve_profile(problem, 4, 4)
    assert found.place == (0, 1)
    assert [stage.replicas for stage in found.stages] == [3, 1]
    assert found.objective == 2.0
    assert [stage.load for stage in found.stages] == [2.0, 2.0]
    assert [stage.memory for stage in found.stages] == [4.0, 10.0]  # ceil(4 / 3) and 1 in flight
    synced = judge_profile(problem, (0, 0), (4,))
    assert synced[0] == (8 + 4 * 3 * 9 / (2 * 4)) / 4


def published(name):
    folder = os.environ.get("P2BW_PROBLEMS")
    if folder is None:
        pytest.skip("P2BW_PROBLEMS names no folder of public problem files")
    path = Path(folder, "pipedream_profiles", f"{name}.txt")
    if not path.exists():
        pytest.skip(f"P2BW_PROBLEMS has no {path.name}")
    return path


# What PipeDream's own optimizer finds on 4, 8 and 16 machines (1 GB/s, transfers counted), as it
# prints it; Inception is its graph with the branches compressed.
PIPEDREAM = {
    "alexnet": (0.03422, 0.01887, 0.01887),
    "vgg16": (0.20552, 0.10383, 0.05653),
    "resnet18": (0.10000, 0.05078, 0.02569),
    "resnet50": (0.16288, 0.09201, 0.04780),
    "resnet101": (0.11656, 0.09659, 0.05138),
    "resnext50": (0.20141, 0.10276, 0.05575),
    "squeezenet1_0": (0.07441, 0.03769, 0.01888),
    "densenet121": (0.08998, 0.04712, 0.02455),
    "gnmt": (0.02587, 0.01929, 0.01929),
    "inception_v3": (0.22728, 0.11951, 0.06509),
}


@pytest.mark.parametrize("name", PIPEDREAM)
def test_no_worse_than_pipedream_with_its_own_objective(name):
    path = published(name)
    problem = read_pipedream(path.read_text(), 1e9)
    for workers, theirs in zip((4, 8, 16), PIPEDREAM[name], strict=True):
        found = solve_file(path, stages=workers, replication="per-stage")
        assert round(found.objective, 5) <= theirs
        assert found.status == "optimal"
        replicas = [stage.replicas for stage in found.stages]
        assert sum(replicas) <= workers
        place = tuple(found.assignment.values())
        assert is_allowed(problem, place, replicas)
        assert period_of(problem, place, replicas) == pytest.approx(found.objective, rel=1e-9)


@pytest.mark.parametrize(("workers", "gap"), [(4, 0.02), (8, 0.02), (16, 0.06)])
def test_nasnet_which_pipedream_does_not_finish(workers, gap):
    path = published("nasnetamobile")
    found = solve_file(path, stages=workers, replication="per-stage")
    assert found.gap < gap
    problem = read_pipedream(path.read_text(), 1e9)
    replicas = [stage.replicas for stage in found.stages]
    assert is_allowed(problem, tuple(found.assignment.values()), replicas)


def test_a_search_that_has_to_stop_keeps_a_plan_and_a_true_bound():
    path = published("nasnetamobile")
    found = solve_file(path, stages=16, replication="per-stage", stop=Stop(0.0))
    assert found.status == "feasible"
    assert found.objective < 0.045  # 0.584 on one worker
    assert "stopped by the limit of 0 s" in found.space
    assert found.bound <= 0.0389  # a period that is possible


def test_a_limit_that_pipedream_breaks_is_kept():
    path = published("vgg16")
    free = solve_file(path, stages=4, replication="per-stage")
    assert max(stage.memory for stage in free.stages) > 16e9
    found = solve_file(path, stages=4, replication="per-stage", memory=16_000_000_000)
    assert max(stage.memory for stage in found.stages) <= 16e9
    assert found.objective > free.objective
    with pytest.raises(InfeasibleError, match=r"4 workers fits into 8e\+09 bytes.*\(--memory\)"):
        solve_file(path, stages=4, replication="per-stage", memory=8_000_000_000)


def test_a_limit_on_inception_and_one_that_is_too_low():
    path = published("inception_v3")
    found = solve_file(path, stages=4, replication="per-stage", memory=16_000_000_000)
    assert found.status == "optimal"
    assert max(stage.memory for stage in found.stages) <= 16e9
    with pytest.raises(InfeasibleError, match="would be enough"):
        solve_file(path, stages=4, replication="per-stage", memory=1_000_000_000)
    with pytest.raises(InfeasibleError, match="would be enough"):
        solve_file(published("nasnetamobile"), stages=4, memory=1_000_000_000)


def test_the_error_names_a_memory_that_is_enough():
    problem = ProfileProblem(
        operators=tuple(
            Operator(name=str(i), time=1.0, parameters=1000.0 * (i + 1)) for i in range(4)
        ),
        outputs=(),
        order=((0, 1), (1, 2), (2, 3)),
        bandwidth=1.0,
        memory=3000.0,
    )
    with pytest.raises(InfeasibleError) as caught:
        solve_profile(problem, 2, 2)
    enough = float(str(caught.value).split("; ")[1].split()[0])
    assert solve_profile(replace(problem, memory=enough), 2, 2).stages
    with pytest.raises(InfeasibleError):
        solve_profile(replace(problem, memory=enough * 0.98), 2, 2)


CHAIN = """\
node1 -- Conv2d(1, 2) -- forward_compute_time=1000.0, backward_compute_time=5000.0, \
activation_size=1e9, parameter_size=0.000
node2 -- Linear -- forward_compute_time=2000.0, backward_compute_time=0.0, \
activation_size=1e9, parameter_size=1e9
\tnode1 -- node2
"""


def test_the_command_takes_replication_and_memory(tmp_path):
    path = tmp_path / "graph.txt"
    path.write_text(CHAIN)

    def run(*options):
        command = [sys.executable, "-m", "p2bw", "solve", str(path), "--json", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    found = json.loads(run("--stages", "4", "--replication", "per-stage").stdout)
    assert [stage["replicas"] for stage in found["stages"]] == [3, 1]
    assert found["status"] == "optimal"
    assert found["objective"] == 2.0
    tight = run("--stages", "4", "--replication", "per-stage", "--memory", "1GB")
    assert tight.returncode == 4
    assert "no placement on 4 workers fits into 1e+09 bytes" in tight.stderr
    assert run("--stages", "4", "--replication", "both").returncode == 2
    assert run("--stages", "4", "--memory", "much").returncode == 2


def test_other_formats_have_no_replicas_by_stage(tmp_path):
    path = tmp_path / "loads.json"
    node = {"id": 1, "supportedOnFpga": 1, "cpuLatency": 1, "fpgaLatency": 1, "size": 1}
    node |= {"isBackwardNode": 0}
    path.write_text(
        json.dumps({"maxSizePerFPGA": 1, "maxFPGAs": 1, "maxCPUs": 0, "nodes": [node], "edges": []})
    )
    assert solve_file(path).objective == 1
    with pytest.raises(UsageError, match="--replication per-stage: not for the format"):
        solve_file(path, replication="per-stage")
    with pytest.raises(UsageError, match="--memory: not for the format"):
        solve_file(path, memory=10)
