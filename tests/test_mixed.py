"""Devices and links that differ: equal to brute force, and what a topology can be."""

import pytest
from bruteforce import best_rate
from corpus import ROOT
from drawn import memories, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from p2bw.compiler.devices import GIB, Device
from p2bw.compiler.driver import compile_model
from p2bw.compiler.placement import Limits, solve
from p2bw.compiler.problem import (
    BlockCost,
    PlacementProblem,
    TensorCost,
    Times,
)
from p2bw.compiler.topology import Level, Others, Topology, Wire
from p2bw.compiler.verify import verify
from p2bw.contract.errors import InfeasibleError


def device(name, memory):
    return Device(
        name=name,
        memory_bytes=memory,
        flops={"float32": 1.0},
        bandwidth=1.0,
        link=1.0,
        context_bytes=0,
        lost_fraction=0.0,
    )


@st.composite
def topologies(draw):
    """Up to 4 devices of up to 3 kinds, in a tree of levels or a graph of wires."""
    gpus = draw(st.sampled_from([4, 4, 3, 3, 2, 1]))
    kinds = draw(st.integers(1, min(3, gpus)))
    runs = [1] * kinds
    for _ in range(gpus - kinds):
        runs[draw(st.integers(0, kinds - 1))] += 1
    devices = [device(f"kind{i}", draw(memories)) for i in range(kinds)]
    more = tuple(Others(device=d, gpus=n) for d, n in zip(devices[1:], runs[1:], strict=True))
    speed = st.sampled_from([20.0, 50.0, 200.0, 1e9])
    common = {"name": "toy", "device": devices[0], "gpus": gpus, "more": more}
    if draw(st.booleans()):
        node = draw(st.integers(1, gpus))
        levels = [Level(name="node", size=node, bandwidth=draw(speed))]
        if gpus > node:
            levels.append(Level(name="network", size=-(-gpus // node), bandwidth=draw(speed)))
        return Topology(**common, levels=tuple(levels))
    # Every device at one of two switches, and some wires between devices.
    wires = [Wire(a=gpus, b=gpus + 1, bandwidth=draw(speed))]
    wires += [
        Wire(a=rank, b=gpus + draw(st.integers(0, 1)), bandwidth=draw(speed))
        for rank in range(gpus)
    ]
    for a in range(gpus):
        for b in range(a + 1, gpus):
            if draw(st.integers(0, 2)) == 0:
                wires.append(Wire(a=a, b=b, bandwidth=draw(speed)))
    return Topology(**common, wires=tuple(wires), switches=("left", "right"))


def check(problem, policy, limits, proven=True):
    """What is found is right, and what is said of it; and that it is the best is `proven`."""
    widths = None if not problem.topology.uniform else range(1, problem.topology.gpus + 1)
    expected = best_rate(problem, policy)
    try:
        found = solve({problem.microbatch: problem}, recompute=policy, widths=widths, limits=limits)
    except InfeasibleError:
        assert expected is None
        return
    assert expected is not None
    assert found.samples_per_s <= expected * (1 + 1e-5)
    assert found.bound >= expected * (1 - 1e-5)
    if proven or found.status == "optimal":
        assert found.samples_per_s == pytest.approx(expected, rel=1e-5)
        assert found.status == "optimal"
        assert found.gap <= 1e-5


def row(times, sizes, topology, on=None):
    """Blocks in a row, forward and backward of `times` each, with tensors of `sizes` between."""
    return PlacementProblem(
        microbatch=1,
        blocks=tuple(
            BlockCost(
                name=f"b{i}",
                forward_s=time,
                backward_s=time,
                on={
                    k: Times(forward_s=f * time, backward_s=f * time) for k, f in (on or {}).items()
                },
            )
            for i, time in enumerate(times)
        ),
        tensors=tuple(
            TensorCost(
                name=f"t{i}",
                producer=f"b{i}",
                consumers=(f"b{i + 1}",),
                bytes=size,
                gradient_bytes=size,
                saved=True,
            )
            for i, size in enumerate(sizes)
        ),
        topology=topology,
    )


def test_a_faster_device_gets_more_of_the_work():
    slow, fast = device("slow", 10**9), device("fast", 10**9)
    pair = Topology(
        name="pair",
        device=slow,
        gpus=2,
        more=(Others(device=fast, gpus=1),),
        levels=(Level(name="node", size=2, bandwidth=1e9),),
    )
    problem = row([1.0] * 4, [1] * 3, pair, on={"fast": 1 / 3})
    found = solve({1: problem})
    # Three blocks at a third of the time beside one: 2 s each. The fast one alone needs 2.67.
    assert found.period_s == pytest.approx(2.0)
    assert found.status == "optimal"
    assert sorted(found.devices) == [(0,), (1,)]
    assert [numbers.forward_s for numbers in found.stages] == pytest.approx([1.0, 1.0])


def test_the_busiest_boundary_lies_on_the_widest_link():
    kind = device("gpu", 10**9)
    ring = Topology(
        name="ring",
        device=kind,
        gpus=4,
        wires=(
            Wire(a=0, b=1, bandwidth=10.0),
            Wire(a=1, b=2, bandwidth=10.0),
            Wire(a=2, b=3, bandwidth=100.0),
            Wire(a=3, b=0, bandwidth=10.0),
            *(Wire(a=rank, b=4, bandwidth=1.0) for rank in range(4)),
        ),
        switches=("slow",),
    )
    problem = row([1.0] * 4, [200, 10, 10], ring)
    found = solve({1: problem}, depths=(4,))
    assert found.period_s == pytest.approx(2.0)  # 200 bytes at 100 bytes/s
    assert {found.devices[0], found.devices[1]} == {(2,), (3,)}
    assert found.status == "optimal"


def test_a_model_is_compiled_for_a_mixed_cluster(tmp_path):
    compiled = compile_model(
        ROOT / "examples/gpt.py",
        factory="tiny",
        cluster="2xv100-16+1xa100-40",
        depth=3,
        out=tmp_path / "mixed",
    )
    plan = compiled.plan
    limits = {stage.devices: stage.memory.limit for stage in plan.stages}
    assert limits == {(0,): 16 * GIB, (1,): 16 * GIB, (2,): 40 * GIB}
    assert plan.optimality.status == "optimal"
    assert verify(tmp_path / "mixed").problems == ()


policies = st.sampled_from(["auto", "auto", "auto", "always", "never"])


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(problem=problems(topologies(), most=9), policy=policies)
def test_the_optimum_is_that_of_brute_force(problem, policy):
    check(problem, policy, Limits())


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(problem=problems(topologies(), most=6), policy=policies)
def test_nor_does_it_take_all_ideals(problem, policy):
    """Where devices differ, not all of their layouts are searched then, and the proof says so."""
    check(problem, policy, Limits(ideals=4, deterministic_s=5.0), proven=problem.topology.uniform)
