"""The simulation against closed forms, sums by hand, itself without shortcuts, and the proof."""

import json
import time
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from corpus import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import FREE, made_plan

import p2bw
from p2bw.compiler.devices import find_device
from p2bw.compiler.placement.evaluate import Shape, evaluate
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.plan import Plan, Schedule
from p2bw.compiler.problem import BlockCost, ParameterCost, PlacementProblem
from p2bw.compiler.simulation import symmetry
from p2bw.compiler.simulation.engine import Engine
from p2bw.compiler.simulation.job import PS, StageTimes, make_job
from p2bw.compiler.simulation.links import Links
from p2bw.compiler.simulation.simulate import _longest, run_whole, simulate
from p2bw.compiler.simulation.symmetry import Route, Symmetry
from p2bw.compiler.topology import Level, Topology, make_topology
from p2bw.compiler.trace import trace
from p2bw.contract.check import check
from p2bw.contract.errors import UsageError
from p2bw.contract.schedule import Action, most_extra
from p2bw.modelfile.load import load_model_file

ports = st.sets(st.integers(0, 3), min_size=1)
some = settings(max_examples=60, deadline=None)
node = Level(name="node", size=2, bandwidth=1e9, latency_s=1e-5)
network = Level(name="network", size=64, bandwidth=1e8, latency_s=1e-4)


@some
@given(
    depth=st.integers(1, 6),
    width=st.integers(1, 3),
    more=st.integers(0, 8),
    schedule=st.sampled_from(["2bw", "flush", "gpipe"]),
    backward_s=st.floats(1e-3, 4e-3),
    extra=st.integers(0, 1),
)
def test_equal_stages_take_what_the_closed_form_says(
    depth: int, width: int, more: int, schedule: Schedule, backward_s: float, extra: int
) -> None:
    """The plan's period: the longest stage's time under 2bw, (m + d - 1) / m of it with a flush."""
    plan = made_plan(
        depth,
        width,
        depth + more,
        schedule=schedule,
        backward_s=backward_s,
        update_s=1e-4,
        extra=min(extra, more),
    )
    found = simulate(plan)
    assert found.period_s == pytest.approx(plan.period_s, rel=0.01)
    assert found.samples_per_s == pytest.approx(plan.samples_per_s, rel=0.01)
    assert found.cycle_batches == 1


@some
@given(
    depth=st.integers(1, 6),
    width=st.integers(1, 4),
    more=st.integers(0, 8),
    schedule=st.sampled_from(["2bw", "flush", "gpipe", "stash"]),
    update_s=st.sampled_from([0.0, 1e-3, 6e-3]),
    gradients=st.sampled_from([0, 10**6, 10**7, 10**8]),
)
def test_an_update_takes_what_the_placement_says(
    depth: int, width: int, more: int, schedule: Schedule, update_s: float, gradients: int
) -> None:
    """A flush waits for the first stage's sum over the replicas and for its update; 2bw for a sum
    that takes longer than a batch. Here 10**8 bytes take two replicas 100 ms, a microbatch 3 ms.
    A microbatch is taken on early as `compile` decides, and no sum waits for it then.
    """
    m, level = depth + more, Level(name="node", size=depth * width, bandwidth=1e9)
    names = [f"b{k}" for k in range(depth)]
    problem = PlacementProblem(
        microbatch=1,
        schedule=schedule,
        microbatches=m,
        blocks=tuple(BlockCost(name=name, forward_s=1e-3, backward_s=2e-3) for name in names),
        parameters=tuple(
            ParameterCost(
                name=name,
                bytes=1,
                gradient_bytes=max(gradients, 1),
                optimizer_bytes=0,
                update_s=update_s,
                blocks=(name,),
            )
            for name in names
        ),
        topology=Topology(
            name="made", device=find_device("a100-80"), gpus=depth * width, levels=(level,)
        ),
    )
    shape = Shape(depth, width)
    said = evaluate(make_instance(problem), shape, range(depth), (False,) * depth)
    may_be_early = int(all(stage.early_s <= said.period_s for stage in said.stages))
    plan = made_plan(
        depth,
        width,
        m,
        schedule=schedule,
        update_s=update_s,
        gradients=gradients,
        levels=(level,),
        extra=min(may_be_early, most_extra(schedule, depth, m, width > 1)),
    )
    assert simulate(plan).period_s == pytest.approx(said.period_s, rel=0.01)


@some
@given(data=st.data(), depth=st.integers(2, 5), m=st.integers(5, 8))
def test_2bw_takes_as_long_as_its_slowest_stage(data: st.DataObject, depth: int, m: int) -> None:
    times = st.lists(st.floats(1e-4, 5e-3), min_size=depth, max_size=depth)
    forward_s, backward_s = data.draw(times), data.draw(times)
    plan = made_plan(depth, 1, m, forward_s=forward_s, backward_s=backward_s, extra=1)
    found = simulate(plan)
    assert found.period_s >= plan.period_s * (1 - 1e-9)
    busiest = max(found.devices, key=lambda device: device.busy)
    assert busiest.busy <= 1
    for device in found.devices:
        assert device.busy + sum(device.waits.values()) == pytest.approx(1, abs=1e-9)
    if found.cycle_batches is not None:
        assert busiest.busy == pytest.approx(plan.period_s / found.period_s, rel=1e-6)


def test_no_period_is_shorter_than_what_the_slowest_stage_computes() -> None:
    """Its microbatches pile up so slowly that the first stages seem to go on as they are."""
    forward_s = [0.826e-3, 5e-3, 1.953e-3, 4.1485e-3]
    plan = made_plan(
        4, 1, 5, forward_s=forward_s, backward_s=[3.906e-3, 1e-4, 1.953e-3, 1e-3], extra=1
    )
    assert simulate(plan).period_s == pytest.approx(5.1485e-3, rel=1e-6)
    assert simulate(plan, stragglers={3: 1.02}).period_s == pytest.approx(5.25147e-3, rel=1e-3)


def plans() -> st.SearchStrategy[Plan]:
    """All that the engine knows: skips, ties, clipping, replicas, shared and slow links."""

    @st.composite
    def made(draw: st.DrawFn) -> Plan:
        schedule: Any = draw(st.sampled_from(["2bw", "2bw", "flush", "gpipe", "stash"]))
        depth, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        m = depth + draw(st.integers(0, 3))
        times = st.lists(st.integers(1, 50), min_size=depth, max_size=depth)
        stash = schedule == "stash"
        return made_plan(
            depth,
            width,
            m,
            schedule=schedule,
            forward_s=[t * 1e-4 for t in draw(times)],
            backward_s=[t * 1e-4 for t in draw(times)],
            update_s=draw(st.sampled_from([0.0, 1e-3])),
            size=draw(st.sampled_from([0, 1000, 200_000])),
            skips=[(0, depth - 1)] if depth > 2 and draw(st.booleans()) else [],
            tied=None if stash else draw(st.sampled_from([None, 1000, 500_000])),
            gradients=draw(st.sampled_from([1000, 10**6])),
            clip_norm=None if stash else draw(st.sampled_from([None, 1.0])),
            extra=draw(st.integers(0, 1)),
            levels=draw(st.sampled_from([FREE, (node, network)])),
            replicas_together=draw(st.booleans()),
        )

    return made()


@some
@given(plan=plans(), batches=st.integers(1, 40))
def test_batches_that_only_repeat_need_not_be_simulated(plan: Plan, batches: int) -> None:
    found = simulate(plan, batches=batches)
    whole = run_whole(make_job(plan, batches=batches))
    assert found.total_s == whole.total / PS
    assert found.start_s == whole.start / PS
    assert found.drain_s == whole.drain / PS


def spans_of(plan: Plan, **options: Any) -> dict[tuple[int, int], list[tuple[str, int, int]]]:
    """What each replica does at each stage."""
    spans: dict[tuple[int, int], list[tuple[str, int, int]]] = defaultdict(list)

    def record(own: int, stage: int, action: Action, began: int, now: int) -> None:
        for replica in engine.symmetry.classes[own]:
            spans[replica, stage].append((str(action), began, now))

    engine = Engine(make_job(plan, batches=4, **options), record=record)
    engine.run()
    return spans


@settings(max_examples=120, deadline=None)
@given(plan=plans(), slow=st.one_of(st.none(), st.integers(0, 15)))
def test_one_replica_stands_for_all_that_do_the_same(plan: Plan, slow: int | None) -> None:
    ranks = plan.depth * plan.width
    options = {"stragglers": {slow % ranks: 1.5}} if slow is not None else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetry, "_start", lambda job, replica: replica)
        each = spans_of(plan, **options)
    assert spans_of(plan, **options) == each


def test_equal_replicas_are_one_class_and_a_slow_rank_is_its_own() -> None:
    plan = made_plan(4, 8, levels=(replace(node, size=8), network))
    assert {device.ranks for device in simulate(plan).devices} == {
        tuple(range(8 * k, 8 * k + 8)) for k in range(4)
    }
    slow = simulate(plan, stragglers={9: 2.0})
    assert len(slow.devices) == 8
    assert slow.period_s == pytest.approx(2 * plan.period_s)


@some
@given(plan=plans())
def test_memory_and_microbatches_in_flight_are_those_that_were_planned(plan: Plan) -> None:
    job = make_job(plan, batches=5)
    engine = Engine(job)
    engine.run()
    proof = check(job.pipe)
    for k in range(plan.depth):
        assert engine.peak_stash[k] == proof.stash[k]
        planned = plan.stages[k].memory.total
        # Less where a second set of gradients is allowed, but not needed.
        assert planned - job.memory[k].gradients <= engine.peak[k] <= planned
        assert engine.stash[k] == engine.sets[k] == 0


def test_a_message_takes_its_bytes_and_the_latency_of_the_levels_that_it_crosses() -> None:
    """One microbatch through two stages: forward, message, forward and backward, message, back."""
    for size, level in ((2, (node,)), (1, (replace(node, size=1), network))):
        plan = made_plan(2, 1, 1, schedule="flush", size=10**5, levels=level)
        rate, latency = (1e9, 1e-5) if size == 2 else (1e8, 1e-4)
        found = simulate(plan, batches=1)
        way = 10**5 / rate + latency
        assert found.total_s == pytest.approx(1e-3 + way + 3e-3 + way + 2e-3, rel=1e-9)


def test_a_core_that_runs_the_runtime_does_not_compute_meanwhile() -> None:
    size, own_s = 10**6, 1e-3
    plan = made_plan(2, 1, 4, size=size, extra=1)
    device = plan.topology["device"]
    assert "runtime_s" not in device
    slower = plan.model_copy(
        update={"topology": plan.topology | {"device": device | {"runtime_s": own_s}}}
    )
    copying_s = size / device["link"]
    found, before = simulate(slower), simulate(plan)
    assert found.period_s == pytest.approx(before.period_s + own_s + copying_s, rel=1e-6)
    assert _longest(make_job(slower, batches=1)) == round(4 * found.period_s * PS)
    computes = [use.busy * found.period_s for use in found.devices]
    assert computes == pytest.approx([use.busy * before.period_s for use in before.devices])


def test_replicas_share_the_port_of_their_node() -> None:
    """Two replicas send from one node to another at the same time: each has half of its port."""
    levels = (replace(node, latency_s=0.0), replace(network, latency_s=0.0))
    alone = made_plan(2, 1, 1, schedule="flush", size=10**6, levels=(replace(levels[0], size=1),
                      levels[1]))  # fmt: skip
    both = made_plan(2, 2, 1, schedule="flush", size=10**6, levels=levels)
    one, two = simulate(alone, batches=1), simulate(both, batches=1)
    assert one.total_s == pytest.approx(6e-3 + 2 * 0.01)
    assert two.total_s == pytest.approx(6e-3 + 2 * 0.02)


def test_a_sum_over_replicas_takes_a_ring_s_time() -> None:
    """Three replicas: each sends 4/3 of the gradients, in four steps."""
    level = Level(name="node", size=3, bandwidth=1e9, latency_s=1e-3)
    plan = made_plan(1, 3, 2, schedule="flush", gradients=3 * 10**6, levels=(level,))
    found = simulate(plan, batches=1)
    assert found.total_s == pytest.approx(6e-3 + 4e-3 + 4e-3)
    assert simulate(plan).devices[0].waits["replicas"] == pytest.approx(8 / 14)


def test_2bw_hides_the_sum_over_replicas_behind_the_next_batch() -> None:
    level = Level(name="node", size=4, bandwidth=1e9)
    plan = made_plan(2, 2, 4, gradients=8 * 10**6, levels=(level,))  # the sum takes 8 of 12 ms
    assert simulate(plan).period_s == pytest.approx(plan.period_s)
    flush = made_plan(2, 2, 4, gradients=8 * 10**6, levels=(level,), schedule="flush")
    assert simulate(flush).period_s == pytest.approx(flush.period_s + 2e-3)


@some
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20), st.integers(1, 10**6), st.sets(st.integers(0, 3), min_size=1)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_flows_share_ports_as_a_simple_reference_does(
    flows: list[tuple[int, int, set[int]]],
) -> None:
    bandwidth = (10**6, 2 * 10**6, 3 * 10**6, 5 * 10**6)
    routes = tuple(Route(tuple((q, 1) for q in sorted(ports)), 0) for _, _, ports in flows)
    links = Links(
        Symmetry((), (), (routes,), (), bandwidth, (), ()),
        lambda at, flow, stamp: events.append((at, flow, stamp)),
    )
    events: list[tuple[int, int, int]] = []
    events = [(start * PS // 100, flow, -1) for flow, (start, _, _) in enumerate(flows)]
    ends: dict[int, int] = {}
    while events:
        events.sort()
        now, flow, stamp = events.pop(0)
        if stamp < 0:
            links.begin(flow, flows[flow][1], now)
        elif links.valid(flow, stamp):
            ends[flow] = links.end(flow, now)
    for flow, end in enumerate(reference_ends(flows, bandwidth)):
        assert ends[flow] / PS == pytest.approx(float(end), rel=1e-4, abs=1e-9)


def reference_ends(
    flows: list[tuple[int, int, set[int]]], bandwidth: tuple[int, ...]
) -> list[Fraction]:
    """Everything anew at each change, in fractions."""
    now, ends = Fraction(0), [Fraction(-1)] * len(flows)
    left = {i: Fraction(size) for i, (_, size, _) in enumerate(flows)}
    while left:
        going = [i for i in left if Fraction(flows[i][0], 100) <= now]
        rate = {
            i: min(
                Fraction(bandwidth[q], sum(q in flows[j][2] for j in going)) for q in flows[i][2]
            )
            for i in going
        }
        starts = [t for i in left if (t := Fraction(flows[i][0], 100)) > now]
        step = min([*(left[i] / rate[i] for i in going), *(t - now for t in starts)])
        now += step
        for i in going:
            left[i] -= rate[i] * step
            if left[i] == 0:
                ends[i] = now
                del left[i]
    return ends


def test_jitter_is_the_seed_s_and_slows_down() -> None:
    plan = made_plan(4, 2, 6)
    first, again = (simulate(plan, jitter=0.2, seed=3) for _ in range(2))
    assert first == again
    assert first != simulate(plan, jitter=0.2, seed=4)
    assert plan.period_s < first.period_s < 1.2 * plan.period_s
    assert first.cycle_batches is None


def test_many_replicas_share_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """That decides how long the simulation takes, and next to nothing of what it finds."""
    plan = made_plan(4, 16, 16, schedule="flush", gradients=10**6)
    each = simulate(plan, jitter=0.1)
    assert len(each.devices) == 4 * 16
    monkeypatch.setattr(symmetry, "DRAWN", 32)
    shared = simulate(plan, jitter=0.1)
    assert {len(device.ranks) for device in shared.devices} == {2}
    assert shared.period_s == pytest.approx(each.period_s, rel=5e-3)
    monkeypatch.setattr(symmetry, "DRAWN", 1)
    fewest = simulate(plan, jitter=0.1)
    assert {len(device.ranks) for device in fewest.devices} == {4}
    assert fewest.period_s == pytest.approx(each.period_s, rel=1e-2)


def test_with_jitter_what_is_told_is_the_run_that_was_asked_for() -> None:
    plan = made_plan(3, 2, 64)
    found = simulate(plan, jitter=0.1, batches=20)
    whole = run_whole(make_job(plan, jitter=0.1, batches=20))
    assert found.total_s == whole.total / PS
    mean = (found.total_s - found.start_s - found.drain_s) / (20 * 64)
    assert found.period_s == pytest.approx(mean, rel=0.06)


def test_links_may_be_any_graph() -> None:
    """A DGX-1: neighbours have one or two wires, others go through the host's switches."""
    topology = make_topology(cluster="dgx-1")
    plan = made_plan(8, 1, size=10**8).model_copy(update={"topology": topology.to_json()})
    found = simulate(plan)
    assert found.period_s > plan.period_s
    assert {link.name for link in found.links if link.busy > 0} >= {"GPU0 to GPU1", "GPU1 to GPU0"}
    pairs = made_plan(4, 2, size=10**6, gradients=10**6)
    both = simulate(pairs.model_copy(update={"topology": topology.to_json()}))
    assert both.period_s >= pairs.period_s


def test_measured_times_take_the_place_of_the_plan_s() -> None:
    plan = made_plan(3)
    times = [StageTimes(2e-3, 3e-3, 3e-3), StageTimes(1e-3, 1e-3), StageTimes(1e-3, 1e-3)]
    assert simulate(plan, times=times).period_s == pytest.approx(6e-3)
    again = [s.model_copy(update={"recompute": True}) for s in plan.stages]
    found = simulate(plan.model_copy(update={"stages": tuple(again)}), times=times)
    assert found.utilisation == pytest.approx((3 + 1 + 1) / 3 / 6)  # only the backwards count
    with pytest.raises(UsageError, match="times of 2 stages were given; the plan has 3"):
        simulate(plan, times=times[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 0}, "0 batches"),
        ({"jitter": 1.0}, "jitter of 1"),
        ({"jitter": float("nan")}, "jitter of nan"),
        ({"stragglers": {2: 1.5}}, "no rank 2"),
        ({"stragglers": {0: 0.0}}, "rank 0 cannot take 0 times"),
        ({"stragglers": {0: float("inf")}}, "rank 0 cannot take inf times"),
        ({"seed": 1, "stragglers": {0: float("nan")}}, "rank 0 cannot take nan times"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        simulate(made_plan(2), **options)


@pytest.mark.slow
def test_3072_devices_take_less_time_than_tracing_the_model() -> None:
    """64 stages, 48 replicas, 100 batches: one replica stands for 48, a few batches for all."""
    levels = make_topology(gpus=3072, cluster="dgx-a100:384").levels
    plan = made_plan(
        64, 48, 64, size=10**8, gradients=10**9, forward_s=0.1, backward_s=0.2, levels=levels
    )
    file = load_model_file(ROOT / "examples" / "gpt.py", factory="gpt_1t")
    begin = time.process_time()
    trace(file, 1)
    tracing = time.process_time() - begin
    begin = time.process_time()
    found = simulate(plan, batches=100)
    assert time.process_time() - begin < tracing
    assert len(found.devices) == 64
    assert found.total_s > 100 * 64 * found.period_s


def test_the_trace_is_that_of_a_run_and_has_every_rank(tmp_path: Path) -> None:
    plan = made_plan(2, 2, size=1000, gradients=1000)
    p2bw.simulate(plan, batches=2, trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {f"rank {r}: stage {r // 2}, replica {r % 2}" for r in range(4)}
    for rank in range(4):
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        forwards = [e for e in spans if e["name"].startswith("F")]
        assert [e["name"] for e in forwards] == ["F0 w0", "F1 w0", "F2 w0", "F3 w0"]
        assert all(e["dur"] == pytest.approx(1000, abs=0.01) for e in forwards)
        memory = [e["args"]["bytes"] for e in events if e["ph"] == "C" and e["pid"] == rank]
        assert max(memory) <= plan.stages[rank // 2].memory.total
        assert memory[-1] == memory[0]
    begun = {e["id"] for e in events if e["ph"] == "s"}
    assert begun == {e["id"] for e in events if e["ph"] == "f"}
