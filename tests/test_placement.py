"""Placement: equal to brute force on small problems, right and quick on large ones."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2bw.compiler.devices import Device
from p2bw.compiler.placement import Limits, solve
from p2bw.compiler.placement.candidates import make_shapes
from p2bw.compiler.placement.evaluate import evaluate
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.problem import (
    BlockCost,
    Constraints,
    ParameterCost,
    PlacementProblem,
    TensorCost,
)
from p2bw.compiler.topology import Level, Topology
from p2bw.runtime.errors import InfeasibleError


def topology(gpus, memory=10**6, links=(1e3, 1e3), node=None):
    device = Device(
        name="toy",
        memory_bytes=memory,
        flops={"float32": 1.0},
        bandwidth=1.0,
        link=1.0,
        context_bytes=0,
        lost_fraction=0.0,
    )
    node = node or gpus
    levels = [Level(name="node", size=node, bandwidth=links[0])]
    if gpus > node:
        levels.append(Level(name="network", size=-(-gpus // node), bandwidth=links[1]))
    return Topology(name="toy", device=device, gpus=gpus, levels=tuple(levels))


small = st.integers(0, 9)
size = st.integers(0, 20)


@st.composite
def problems(draw):
    """Up to 6 blocks with skips, fan-out, ties, and limits on memory and links that bind."""
    count = draw(st.integers(2, 6))
    names = [f"b{i}" for i in range(count)]
    blocks = tuple(
        BlockCost(
            name=name,
            forward_s=draw(small) / 10,
            backward_s=draw(small) / 10,
            stash_bytes=draw(size),
            transient_bytes=draw(size),
            buffer_bytes=draw(small),
        )
        for name in names
    )
    tensors = []
    for producer in range(count - 1):
        readers = draw(
            st.sets(st.integers(producer + 1, count - 1), min_size=0, max_size=3).map(sorted)
        )
        if readers:
            tensors.append(
                TensorCost(
                    name=f"t{producer}",
                    producer=names[producer],
                    consumers=tuple(names[reader] for reader in readers),
                    bytes=draw(size),
                    gradient_bytes=draw(size),
                    saved=draw(st.booleans()),
                )
            )
    parameters = tuple(
        ParameterCost(
            name=f"w{i}",
            bytes=draw(size),
            gradient_bytes=draw(size),
            optimizer_bytes=draw(size),
            update_s=draw(small) / 10,
            blocks=tuple(draw(st.sets(st.sampled_from(names), min_size=1, max_size=2))),
        )
        for i in range(draw(st.integers(0, 4)))
    )
    gpus = draw(st.integers(2, 4))
    constraints = Constraints()
    if draw(st.integers(0, 3)) == 0:
        pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
        constraints = Constraints(
            pin=draw(st.dictionaries(st.sampled_from(names), st.integers(0, 1), max_size=1)),
            together=tuple(draw(st.lists(pairs, max_size=1))),
            apart=tuple(p for p in draw(st.lists(pairs, max_size=1)) if p[0] != p[1]),
            never_cut=tuple(
                draw(st.lists(st.sampled_from([t.name for t in tensors]), max_size=1))
                if tensors
                else ()
            ),
        )
    return PlacementProblem(
        microbatch=draw(st.integers(1, 3)),
        schedule=draw(st.sampled_from(["2bw", "2bw", "flush", "gpipe", "stash"])),
        microbatches=draw(st.sampled_from([None, None, 4])),
        blocks=blocks,
        tensors=tuple(tensors),
        parameters=parameters,
        topology=topology(
            gpus,
            memory=draw(st.sampled_from([150, 200, 300, 10**6])),
            links=draw(st.sampled_from([(1e9, 1e9), (50.0, 20.0), (200.0, 30.0)])),
            node=draw(st.sampled_from([None, 2])),
        ),
        constraints=constraints,
    )


def best_by_brute_force(problem, policy, depths):
    """Samples per second of the best placement of all shapes, or None."""
    instance = make_instance(problem)
    choices = {"auto": (False, True), "always": (True,), "never": (False,)}[policy]
    best = None
    for shape in make_shapes(instance, depths, None):
        for stages in itertools.product(range(shape.depth), repeat=instance.size):
            if len(set(stages)) < shape.depth or any(
                stages[c] < stages[e.producer] for e in instance.edges for c in e.consumers
            ):
                continue
            for again in itertools.product(choices, repeat=shape.depth):
                found = evaluate(instance, shape, stages, again)
                if found.feasible:
                    rate = shape.width * problem.microbatch / found.period_s
                    best = max(best or 0.0, rate)
    return best


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    policy=st.sampled_from(["auto", "auto", "always", "never"]),
    depths=st.sampled_from([None, (2,), (2, 3)]),
)
@pytest.mark.parametrize("ideals", [10**4, 4])
def test_the_optimum_is_that_of_brute_force(ideals, problem, policy, depths):
    depths = depths and [d for d in depths if d <= problem.topology.gpus]
    try:
        expected = best_by_brute_force(problem, policy, depths)
    except InfeasibleError:  # contradictory constraints
        expected = None
    limits = Limits(ideals=ideals, deterministic_s=5.0)
    try:
        placement = solve(
            {problem.microbatch: problem}, depths=depths, recompute=policy, limits=limits
        )
    except InfeasibleError:
        assert expected is None
        return
    assert expected is not None
    assert placement.samples_per_s == pytest.approx(expected, rel=1e-5)
    assert placement.status == "optimal"
    assert placement.gap <= 1e-5
