"""Large graphs: coarse placements are fine ones, and fine bounds are bounds."""

import itertools
from contextlib import contextmanager

import pytest
from drawn import problems
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_placement import best_by_brute_force, chain, topologies, topology

from p2bw.compiler.placement import Limits, candidates, coarsen, solve
from p2bw.compiler.placement.coarsen import (
    far_by_edges,
    far_in_order,
    finer_edges,
    finer_stages,
    merged,
    taken_apart,
)
from p2bw.compiler.placement.dp import least_by_depth, step_costs
from p2bw.compiler.placement.evaluate import Shape, choose_recompute, evaluate
from p2bw.compiler.placement.ideals import make_family, make_steps
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.relays import skips
from p2bw.compiler.placement.skeleton import skeleton, without
from p2bw.compiler.problem import BlockCost, PlacementProblem, TensorCost
from p2bw.contract.errors import InfeasibleError


@contextmanager
def few_groups(most):
    """Coarse groups however small the problem is, and at most so many if it can be cut so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "DIRECT", 0)
        patch.setattr(coarsen, "GRANULARITY", 4)
        patch.setattr(coarsen, "MAX_GROUPS", most)
        patch.setattr(coarsen, "COARSEST", 1)
        yield


def instance_of(problem):
    try:
        return make_instance(problem)
    except InfeasibleError:  # contradictory constraints
        assume(False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(topologies, most=6), data=st.data())
def test_a_coarse_placement_is_a_fine_one_with_the_same_numbers(problem, data):
    fine = instance_of(problem)
    with few_groups(data.draw(st.integers(1, 5))):
        sets = coarsen.coarsen(fine, data.draw(st.integers(2, 20)))
    assert sorted(itertools.chain(*sets)) == list(range(fine.size))
    coarse = merged(fine, sets)
    assert coarse.size == len(sets)  # no cycle had to be joined
    depth = data.draw(st.integers(1, min(coarse.size, problem.topology.gpus)))
    shape = Shape(depth, problem.topology.gpus // depth)
    stages = sorted(data.draw(st.integers(0, depth - 1)) for _ in range(coarse.size))
    edges = range(len(coarse.edges))
    relayed = frozenset(data.draw(st.sets(st.sampled_from(edges)))) if edges else frozenset()
    relayed &= set(skips(coarse, stages))
    again = choose_recompute(coarse, shape, stages, "auto", relayed)
    mine = evaluate(coarse, shape, stages, again, relayed)
    below = finer_edges(fine, coarse, relayed)
    theirs = evaluate(fine, shape, finer_stages(fine, coarse, stages), again, below)
    assert (mine.stages, mine.links) == (theirs.stages, theirs.links)
    assert mine.feasible == theirs.feasible


def optimum(problem, policy="auto", depths=None):
    try:
        return best_by_brute_force(problem, policy, depths)
    except InfeasibleError:
        return None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems(topologies, most=6), ideals=st.integers(2, 12), depth=st.integers(1, 3))
def test_the_bound_without_some_groups_is_no_higher_than_the_optimum(problem, ideals, depth):
    depth = min(depth, problem.topology.gpus)
    instance = instance_of(problem)
    bare = skeleton(instance, ideals)
    family = make_family(bare, ideals)
    assert family.complete
    steps = make_steps(bare, family)
    busiest_s = least_by_depth(step_costs(bare, steps, "auto"), depth, gaps=True)[-1]
    assume(depth <= instance.size and not (problem.microbatches or 9) < depth)
    best = optimum(problem, depths=(depth,))
    if best is None:
        return
    samples = problem.microbatch * (problem.topology.gpus // depth)
    assert busiest_s <= samples / best / instance.bubble(depth) * (1 + 1e-9)


def test_what_is_left_out_still_orders_the_rest():
    instance = make_instance(chain([1.0] * 4))
    assert without(instance, [1, 2]).predecessors == ((), (0,))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    problem=problems(topologies, most=6),
    policy=st.sampled_from(["auto", "auto", "always", "never"]),
    gap=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
)
@pytest.mark.parametrize("ideals", [10**4, 3])
def test_the_result_is_within_the_gap_of_the_optimum(ideals, problem, policy, gap):
    expected = optimum(problem, policy)
    limits = Limits(gap=gap, ideals=ideals, deterministic_s=5.0)
    try:
        with few_groups(3):
            found = solve({problem.microbatch: problem}, recompute=policy, limits=limits)
    except InfeasibleError:
        assert expected is None
        return
    assert expected is not None
    assert found.samples_per_s <= expected * (1 + 1e-9)
    assert found.bound >= expected * (1 - 1e-5)
    assert found.gap <= max(gap, 1e-5)


def two_towers(layers, gpus):
    """Two chains side by side and a head that joins them: about layers squared ideals."""
    names = [f"{tower}{i}" for tower in "ab" for i in range(layers)]
    times = {name: 1.0 + 0.1 * (i * 7 % 10) for i, name in enumerate(names)}
    edges = [(a, b) for a, b in itertools.pairwise(names) if a[0] == b[0]]
    edges += [(f"{tower}{layers - 1}", "head") for tower in "ab"]
    return PlacementProblem(
        microbatch=1,
        blocks=tuple(
            BlockCost(name=name, forward_s=times.get(name, 0.5), backward_s=0.0)
            for name in [*names, "head"]
        ),
        tensors=tuple(
            TensorCost(name=a, producer=a, consumers=(b,), bytes=1, gradient_bytes=1, saved=False)
            for a, b in edges
        ),
        topology=topology(gpus, links=(1e6, 1e6)),
    )


def test_too_many_ideals_to_list_are_bounded_without_some_groups_and_refined():
    problem = two_towers(100, 8)
    assert not make_family(make_instance(problem)).complete
    limits = Limits(gap=0.015, deterministic_s=0.0)  # 11 % without refinement
    found = solve({1: problem}, depths=(8,), limits=limits)
    assert found.gap <= 0.015
    work = sum(block.forward_s for block in problem.blocks)
    assert found.bound == pytest.approx(8 / work, rel=0.02)


def test_a_coarse_placement_within_the_gap_is_kept():
    problem = chain([1.0] * 400 + [1.3] * 200, gpus=8)
    fine = solve({1: problem}, depths=(8,))
    assert fine.status == "optimal"
    assert fine.gap == 0
    rough = solve({1: problem}, depths=(8,), limits=Limits(gap=0.05))
    assert rough.samples_per_s < fine.samples_per_s <= rough.bound
    assert 0 < rough.gap <= 0.05
    assert "a gap of 5 % allowed" in rough.search_space


def test_around_the_cuts_groups_are_taken_apart():
    instance = make_instance(chain([1.0] * 20))
    sets = tuple((i, i + 1) for i in range(0, 20, 2))
    second = 3 * 10**12  # a block's forward and backward, in ps
    for far in (far_in_order, far_by_edges):
        distance = far(instance, [0] * 10 + [1] * 10)
        assert distance.tolist() == [abs(i) * second for i in (*range(-9, 1), *range(10))]
        apart = taken_apart(sets, distance, 2 * second)
        assert [members for members in apart if len(members) == 1] == [(8,), (9,), (10,), (11,)]
        assert taken_apart(sets, far(instance, [0] * 20), 0.9) == sets


def test_beside_each_other_the_ends_of_both_towers_are_near_a_cut():
    instance = make_instance(two_towers(4, 2))
    stages = [int(instance.name(group)[1] >= "2") for group in range(instance.size)]
    far = far_by_edges(instance, stages)
    near = {instance.name(group) for group in range(instance.size) if far[group] == 0}
    assert near == {"a1", "a2", "b1", "b2"}


def residual_network(layers, inner=4):
    """x = x + f(x), where f has a wide tensor in the middle."""
    blocks, tensors, readers = ["stem"], [], {}
    x = "stem"
    for layer in range(layers):
        y = x
        for i in range(inner):
            blocks.append(f"h.{layer}.{i}")
            readers.setdefault(y, []).append(blocks[-1])
            y = blocks[-1]
        blocks.append(f"h.{layer}")
        for source in (x, y):
            readers.setdefault(source, []).append(blocks[-1])
        x = blocks[-1]
    for name, found in readers.items():
        size = 16 if name.count(".") == 2 and 0 < int(name[-1]) < inner - 1 else 4
        tensors.append(
            TensorCost(
                name=name,
                producer=name,
                consumers=tuple(found),
                bytes=size,
                gradient_bytes=size,
                saved=True,
            )
        )
    costs = [
        BlockCost(name=n, forward_s=1.0 if n.count(".") != 1 else 0.05, backward_s=0.0)
        for n in blocks
    ]
    return chain([1.0]).model_copy(update={"blocks": tuple(costs), "tensors": tuple(tensors)})


@pytest.mark.parametrize("granularity", [6, 12, 24, 192])
def test_the_narrow_cuts_between_layers_stay(granularity, monkeypatch):
    layers = 6
    instance = make_instance(residual_network(layers))
    monkeypatch.setattr(coarsen, "GRANULARITY", granularity)
    sets = coarsen.coarsen(instance, 10**4)
    assert merged(instance, sets).size == len(sets)
    # A layer's sum is the last of its set wherever sets are no larger than layers.
    for layer in range(layers - 1):
        end = [instance.name(group) for group in range(instance.size)].index(f"h.{layer}")
        (members,) = [found for found in sets if end in found]
        assert members[-1] == end


def test_a_chain_becomes_sets_of_the_limit(monkeypatch):
    instance = make_instance(chain([1.0] * 1000))
    monkeypatch.setattr(coarsen, "GRANULARITY", 100)
    sets = coarsen.coarsen(instance, 10**4)
    assert max(map(len, sets)) == 10
    assert len(sets) <= 120
    monkeypatch.setattr(coarsen, "MAX_GROUPS", 10)
    assert len(coarsen.coarsen(instance, 10**4)) <= 10
