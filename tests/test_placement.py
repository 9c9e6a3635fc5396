"""Placement: equal to brute force on small problems, right and quick on large ones."""

import itertools
import math

import pytest
from drawn import memories, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from p2bw.compiler.devices import Device
from p2bw.compiler.placement import Limits, solve, solve_fixed
from p2bw.compiler.placement.candidates import make_models, make_shapes
from p2bw.compiler.placement.evaluate import evaluate
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.levels import search_models
from p2bw.compiler.problem import (
    BlockCost,
    Constraints,
    ParameterCost,
    PlacementProblem,
    TensorCost,
)
from p2bw.compiler.topology import Level, Topology
from p2bw.contract.errors import InfeasibleError, TimeLimitError, UsageError


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


topologies = st.builds(
    topology,
    st.integers(2, 4),
    memory=memories,
    links=st.sampled_from([(1e9, 1e9), (50.0, 20.0), (200.0, 30.0)]),
    node=st.sampled_from([None, 2]),
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
            far = [
                i
                for i, edge in enumerate(instance.edges)
                if max(stages[c] for c in edge.consumers) > stages[edge.producer] + 1
            ]
            relayed = itertools.chain.from_iterable(
                itertools.combinations(far, count) for count in range(len(far) + 1)
            )
            for again, relays in itertools.product(
                itertools.product(choices, repeat=shape.depth), relayed
            ):
                found = evaluate(instance, shape, stages, again, relays)
                if found.feasible:
                    rate = shape.width * problem.microbatch / found.period_s
                    best = max(best or 0.0, rate)
    return best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    problem=problems(topologies, most=6),
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


def chain(times, *, bytes=1, gpus=2, microbatch=1, parameters=(), memory=10**6, **changes):
    """Blocks b0, b1, .. in a row; forward of `times` seconds and a backward of twice that."""
    names = [f"b{i}" for i in range(len(times))]
    return PlacementProblem(
        microbatch=microbatch,
        blocks=tuple(
            BlockCost(name=name, forward_s=time, backward_s=2 * time, stash_bytes=10)
            for name, time in zip(names, times, strict=True)
        ),
        tensors=tuple(
            TensorCost(
                name=f"t{i}",
                producer=a,
                consumers=(b,),
                bytes=bytes,
                gradient_bytes=bytes,
                saved=True,
            )
            for i, (a, b) in enumerate(itertools.pairwise(names))
        ),
        parameters=parameters,
        topology=topology(gpus, memory),
        **changes,
    )


def stages(placement):
    return list(placement.stage_of_block.values())


def test_the_numbers_of_a_small_placement_by_hand():
    problem = chain(
        [1.0, 2.0, 3.0],
        bytes=500,
        parameters=(
            ParameterCost(
                name="w",
                bytes=100,
                gradient_bytes=50,
                optimizer_bytes=200,
                update_s=0.5,
                blocks=("b0", "b2"),
            ),
        ),
    )
    placement = solve_fixed(problem, 2)
    assert stages(placement) == [0, 0, 1]
    first, last = placement.stages
    assert (first.forward_s, first.backward_s, first.update_s) == (3.0, 6.0, 0.25)
    assert (first.weights, first.gradients, first.optimizer) == (200, 50, 200)
    assert first.stash == 2 * 20  # two microbatches of two blocks' storages
    assert first.buffers == 500 + 500  # sent; gradient received
    assert last.stash == 10 + 500  # own; received and saved
    assert last.buffers == 500 + 500  # received; gradient sent
    out = next(link for link in placement.links if link.name.endswith("out"))
    assert out.bytes == 500 + 50 / 2  # the tied gradient goes once per update of two microbatches
    assert out.seconds == pytest.approx(0.525)
    assert placement.period_s == pytest.approx(9.25)
    assert placement.samples_per_s == pytest.approx(1 / 9.25)
    assert placement.utilisation == pytest.approx(18 / 18.5)
    assert placement.bytes_per_sample == pytest.approx(1000 + 50)
    assert placement.devices == ((0,), (1,))


def test_replicas_all_reduce_once_per_update():
    weights = ParameterCost(
        name="w", bytes=8, gradient_bytes=900, optimizer_bytes=8, blocks=("b0",)
    )
    problem = chain([1.0], gpus=3, parameters=(weights,), microbatches=2)
    placement = solve_fixed(problem, 1, 3)
    assert {link.bytes for link in placement.links} == {900 * 4 / 3 / 2}
    assert placement.samples_per_s == pytest.approx(3 / 3.0)


@pytest.mark.parametrize(
    ("schedule", "block", "batch_s"),
    [
        ("flush", "b0", 5 * 3.0 + 0.9 + 0.5),  # all in the way: five slots, the sum, the update
        ("flush", "b1", 5 * 3.0),  # the first stage's backward and forward take longer
        ("gpipe", "b0", 5 * 3.0 + 0.9 + 0.5),
        ("2bw", "b0", 4 * 3.0 + 0.5),  # the sum takes less time than the next batch's
        ("2bw", "b1", 4 * 3.0 + 0.5),
        ("stash", "b0", 4 * 3.0 + 0.9 + 0.5),  # the next batch waits for it
    ],
)
def test_what_an_update_takes_with_the_sum_over_replicas(schedule, block, batch_s):
    weights = ParameterCost(
        name="w", bytes=8, gradient_bytes=900, optimizer_bytes=8, update_s=0.5, blocks=(block,)
    )
    problem = chain(
        [1.0, 1.0], gpus=4, parameters=(weights,), schedule=schedule, microbatches=4, bytes=0
    )
    assert solve_fixed(problem, 2, 2).period_s == pytest.approx(batch_s / 4)


def test_a_sum_longer_than_the_next_batch_holds_up_2bw():
    """The next batch's sum cannot begin before the microbatches in flight have ended."""
    weights = ParameterCost(
        name="w", bytes=8, gradient_bytes=9000, optimizer_bytes=8, blocks=("b0",)
    )
    problem = chain([1.0, 1.0], gpus=4, parameters=(weights,), microbatches=4, bytes=0)
    for m in (2, 4):
        problem = problem.model_copy(update={"microbatches": m})
        placement = solve_fixed(problem, 2, 2)
        # One is in flight behind the first stage; were one taken on early, it would be two.
        assert placement.period_s == pytest.approx((9.0 + 3.0) / m)
        assert placement.stages[0].early_s == pytest.approx((9.0 + 2 * 3.0) / m)


def test_a_flush_costs_bubbles_and_keeps_one_version():
    weights = ParameterCost(name="w", bytes=8, gradient_bytes=8, optimizer_bytes=8, blocks=("b0",))
    flush = solve_fixed(chain([1.0, 1.0], schedule="flush", microbatches=4), 2)
    assert flush.period_s == pytest.approx(3.0 * 5 / 4)
    problem = chain([1.0, 1.0], parameters=(weights,), schedule="gpipe", microbatches=4)
    gpipe = solve_fixed(problem, 2)
    assert gpipe.stages[0].weights == 8
    assert gpipe.stages[1].stash == 4 * 11
    problem = chain([1.0, 1.0], parameters=(weights,), schedule="stash")
    assert solve_fixed(problem, 2).stages[0].weights == 2 * 8


def test_equal_periods_are_broken_by_bytes_then_balance():
    # The last block alone sets the period: the others fit anywhere.
    problem = chain([1, 1, 1, 1, 9], gpus=3)
    assert stages(solve_fixed(problem, 3)) == [0, 0, 1, 1, 2]
    heavy = problem.model_copy(
        update={
            "tensors": tuple(
                t.model_copy(update={"bytes": 1 + 8 * (t.name == "t1")}) for t in problem.tensors
            )
        }
    )
    assert stages(solve_fixed(heavy, 3)) == [0, 0, 0, 1, 2]  # as even as 0 1 1 1 2, and earlier


def test_a_search_prefers_what_amortises_overheads_and_fits():
    def at(microbatch):
        problem = chain([1 + microbatch] * 4, gpus=4, microbatch=microbatch)
        blocks = tuple(
            block.model_copy(update={"stash_bytes": 1000 * microbatch}) for block in problem.blocks
        )
        return problem.model_copy(update={"blocks": blocks, "topology": topology(4, 9000)})

    placement = solve(at, microbatches=(1, 2, 4, 8), recompute="never")
    assert placement.microbatch == 2  # 4 blocks x 1000 x 2 = 8000 bytes on each replica
    assert (placement.depth, placement.width) == (1, 4)
    assert placement.status == "optimal"
    assert "microbatch" in placement.search_space


def test_the_same_problem_gives_the_same_placement():
    problem = chain([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], gpus=4)
    assert solve({1: problem}) == solve({1: problem})
    parallel = branches(3, 4)
    limits = Limits(ideals=8)  # CP-SAT has to prove it
    assert solve({1: parallel}, limits=limits) == solve({1: parallel}, limits=limits)


def branches(count, length):
    """Parallel chains between one first and one last block."""
    problem = chain([1.0 + i % 3 for i in range(count * length + 2)], gpus=4)
    last = count * length + 1
    edges = [(0, 1 + i * length) for i in range(count)]
    edges += [
        (1 + i * length + j, 2 + i * length + j) for i in range(count) for j in range(length - 1)
    ]
    edges += [((i + 1) * length, last) for i in range(count)]
    tensors = tuple(
        TensorCost(
            name=f"t{n}",
            producer=f"b{u}",
            consumers=(f"b{v}",),
            bytes=3,
            gradient_bytes=3,
            saved=True,
        )
        for n, (u, v) in enumerate(edges)
    )
    return problem.model_copy(update={"tensors": tensors})


def test_branches_are_proven_with_all_ideals_and_with_few():
    problem = branches(3, 4)
    complete = solve({1: problem}, depths=(4,))
    few = solve({1: problem}, depths=(4,), limits=Limits(ideals=8))
    assert complete.status == few.status == "optimal"
    assert complete.samples_per_s == pytest.approx(few.samples_per_s, rel=1e-6)
    assert "CP-SAT" in few.search_space


def test_constraints_are_kept():
    problem = chain([1, 1, 1, 1, 1, 1], gpus=3)

    def placed(depth=3, **constraints):
        again = problem.model_copy(update={"constraints": Constraints(**constraints)})
        return stages(solve_fixed(again, depth))

    assert placed() == [0, 0, 1, 1, 2, 2]
    assert placed(pin={"b1": 1})[1] == 1
    found = placed(together=(("b1", "b3"),))
    assert found[1] == found[2] == found[3]  # b2 lies between
    assert placed(never_cut=("t1",))[1:3] in ([0, 0], [1, 1])
    assert placed(apart=(("b0", "b1"),)) == [0, 1, 1, 1, 2, 2]
    again = problem.model_copy(update={"constraints": Constraints(max_stages=2)})
    assert solve({1: again}, widths=(1,)).depth == 2
    with pytest.raises(InfeasibleError, match="pinned"):
        placed(together=(("b0", "b1"),), pin={"b0": 0, "b1": 1})
    with pytest.raises(InfeasibleError, match="apart"):
        placed(together=(("b0", "b1"),), apart=(("b0", "b1"),))
    with pytest.raises(InfeasibleError, match="constraints"):
        placed(pin={"b0": 2})


def weighty(sizes, **options):
    parameters = tuple(
        ParameterCost(
            name=f"w{i}", bytes=s, gradient_bytes=s, optimizer_bytes=2 * s, blocks=(f"b{i}",)
        )
        for i, s in enumerate(sizes)
    )
    return chain([1.0] * len(sizes), parameters=parameters, **options)


def test_a_block_that_is_too_large_is_named():
    problem = weighty([10, 400, 10], memory=1000)
    with pytest.raises(InfeasibleError, match=r"block b1 needs 1.96 KiB .* 2 weight versions"):
        solve({1: problem})


def test_cures_that_are_named_work():
    problem = weighty([40] * 6, memory=500)
    with pytest.raises(InfeasibleError) as error:
        solve({1: problem})
    message = str(error.value)
    assert "cut into 1 to 2 stages, the fullest device needs at least" in message
    assert "toy offers 500 B" in message
    assert "--memory 633B (133 B more)" in message
    assert "--gpus 3" in message
    assert solve({1: weighty([40] * 6, memory=500, gpus=3)}).depth == 3


def test_a_single_pipeline_is_taken_where_the_second_gradients_of_several_do_not_fit():
    for memory, width in ((250, 1), (255, 2)):  # 40 B more
        placement = solve({1: weighty([40, 40], memory=memory, gpus=4)}, depths=[2])
        assert (placement.depth, placement.width) == (2, width)


def test_the_bounds_know_the_second_gradients_of_replicas():
    """Where no shape can be held, none is searched: each may take long."""
    models = make_models([weighty([40] * 2, memory=250, gpus=4)], "auto")
    search = search_models(models, [2], [2], Limits())
    assert [candidate.closed_by for candidate in search.candidates] == ["bounds"]


def test_recomputation_is_a_cure_and_is_chosen_only_where_needed():
    problem = chain([1.0] * 8, memory=75, gpus=4)
    stashing = tuple(block.model_copy(update={"stash_bytes": 20}) for block in problem.blocks)
    problem = problem.model_copy(update={"blocks": stashing})
    with pytest.raises(InfeasibleError, match="--recompute auto"):
        solve({1: problem}, depths=(4,), recompute="never")
    placement = solve({1: problem}, depths=(4,))
    assert any(placement.recompute)
    assert not placement.recompute[-1]
    assert all(stage.total <= 75 for stage in placement.stages)
    assert all(solve({1: problem}, depths=(4,), recompute="always").recompute)


def test_what_cannot_be_asked_for():
    problem = chain([1.0, 1.0, 1.0], gpus=4)
    with pytest.raises(InfeasibleError, match="4 stages asked for, but the model has 3"):
        solve_fixed(problem, 4)
    with pytest.raises(UsageError, match="3 stages x 2 replicas do not fit 4 devices"):
        solve_fixed(problem, 3, 2)
    with pytest.raises(UsageError, match="5 stages"):
        solve({1: problem}, depths=(5,))
    with pytest.raises(UsageError, match="0 stages"):
        solve({1: problem}, depths=(0,))
    few = problem.model_copy(update={"microbatches": 2})
    with pytest.raises(UsageError, match="at least one per stage"):
        solve_fixed(few, 3)
    assert solve({1: few}, widths=(1,)).depth == 2


def test_without_an_answer_in_time_nothing_is_called_infeasible(monkeypatch):
    problem = branches(4, 1).model_copy(
        update={"constraints": Constraints(pin={"b1": 0, "b2": 1, "b3": 0, "b4": 1})}
    )
    limits = Limits(ideals=1)
    assert solve({1: problem}, depths=(2,), limits=limits).status == "optimal"
    monkeypatch.setattr("p2bw.compiler.placement.cpsat.MAX_PAIRS", -1)
    with pytest.raises(TimeLimitError, match="none ruled out"):
        solve({1: problem}, depths=(2,), limits=limits)


def test_blocks_without_cost_have_a_finite_rate():
    problem = chain([0.0, 0.0], bytes=0)
    placement = solve({1: problem})
    assert 0 < placement.samples_per_s < math.inf
    assert placement.gap == 0


def test_skipping_tensors_wait_in_buffers():
    problem = chain([1.0] * 4, gpus=4)
    skip = TensorCost(
        name="skip", producer="b0", consumers=("b3",), bytes=100, gradient_bytes=10, saved=False
    )
    problem = problem.model_copy(update={"tensors": (*problem.tensors, skip)})
    placement = solve_fixed(problem, 4)
    assert placement.stages[3].buffers == 1 + 1 + 3 * 100 + 10
    assert placement.stages[0].buffers == 1 + 1 + 100 + 3 * 10
    tight = problem.model_copy(update={"topology": topology(4, 250)})
    with pytest.raises(InfeasibleError, match="skip stages"):
        solve_fixed(tight, 4)


def test_progress_is_told():
    told = []
    solve({1: chain([1.0, 2.0, 3.0])}, progress=told.append)
    assert told
    assert told[0].total == 3  # 1 x 1, 1 x 2 and 2 x 1
    assert told[0].bound >= 1 / 9


def transformer(layers, gpus):
    """Four blocks a layer with two residual skips each, tied embedding, as large as GPT-3's."""
    problem = chain([0.02] * (4 * layers + 2), bytes=50 << 20, gpus=gpus, memory=80 << 30)
    last = 4 * layers + 1
    skips = [(4 * i + j, 4 * i + j + 2) for i in range(layers) for j in (0, 2)]
    tensors = tuple(
        TensorCost(
            name=f"skip{u}",
            producer=f"b{u}",
            consumers=(f"b{v}",),
            bytes=50 << 20,
            gradient_bytes=50 << 20,
            saved=False,
        )
        for u, v in skips
    )
    weights = [((f"b{i}",), 450_000_000 + i) for i in range(1, last)]
    weights.append((("b0", f"b{last}"), 620_000_000))
    parameters = tuple(
        ParameterCost(
            name=blocks[0],
            bytes=2 * n,
            gradient_bytes=2 * n,
            optimizer_bytes=12 * n,
            update_s=1e-3,
            blocks=blocks,
        )
        for blocks, n in weights
    )
    device = problem.topology.device
    levels = (
        Level(name="node", size=8, bandwidth=300e9),
        Level(name="network", size=8, bandwidth=50e9),
    )
    return problem.model_copy(
        update={
            "tensors": problem.tensors + tensors,
            "parameters": parameters,
            "topology": Topology(name="large", device=device, gpus=gpus, levels=levels),
        }
    )


def test_a_model_of_400_blocks_on_64_devices_is_proven():
    placement = solve({1: transformer(96, 64)})
    assert placement.status == "optimal"
    assert placement.depth * placement.width == 64
    assert placement.utilisation > 0.85
