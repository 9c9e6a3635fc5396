"""Cuts of a row of groups: starts for the search that no later phase may lose."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import topology

from p2bw.compiler.placement import Limits, solve_fixed
from p2bw.compiler.placement.evaluate import Shape
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.relays import judge
from p2bw.compiler.placement.rows import row_placements
from p2bw.compiler.problem import BlockCost, PlacementProblem, TensorCost


def problem(times, edges, gpus, node=None, links=(1e3, 1e3)):
    """Blocks of so many seconds and tensors (producer, readers, bytes)."""
    return PlacementProblem(
        microbatch=1,
        blocks=tuple(
            BlockCost(name=f"b{i}", forward_s=time / 2, backward_s=time / 2)
            for i, time in enumerate(times)
        ),
        tensors=tuple(
            TensorCost(
                name=f"t{i}",
                producer=f"b{producer}",
                consumers=tuple(f"b{reader}" for reader in readers),
                bytes=size,
                gradient_bytes=size,
                saved=False,
            )
            for i, (producer, readers, size) in enumerate(edges)
        ),
        topology=topology(gpus, node=node, links=links),
    )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=14), st.integers(2, 6), st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_stage_has_groups_and_the_first_is_as_even_as_a_row_can_be(times, depth, data):
    edges = [(i, (i + 1,), data.draw(st.integers(0, 9))) for i in range(len(times) - 1)]
    instance = make_instance(problem(times, edges, depth, node=2))
    found = list(row_placements(instance, Shape(depth, 1)))
    assert bool(found) == (depth <= len(times))
    for stages in found:
        assert list(stages) == sorted(stages)
        assert set(stages) == set(range(depth))

    def least(start, parts):  # by trying all
        if parts == 1:
            return sum(times[start:])
        ends = range(start + 1, len(times) - parts + 2)
        return min(max(sum(times[start:end]), least(end, parts - 1)) for end in ends)

    if found:
        busiest = max(sum(t for t, k in zip(times, found[0], strict=True) if k == own)
                      for own in range(depth))  # fmt: skip
        assert busiest == least(0, depth)


def test_a_slow_link_is_crossed_where_little_is_alive():
    # Even halves would send 80 bytes each way from node to node; after b2 it is 1.
    edges = [(0, (1,), 1), (1, (2,), 80), (2, (3,), 1), (3, (4, 5, 6, 7), 80)]
    edges += [(i, (i + 1,), 1) for i in range(4, 7)]
    given = problem([4, 4, 3, 4, 4, 4, 4, 4], edges, gpus=4, node=2, links=(1e3, 1.0))
    instance = make_instance(given)
    rates = {
        stages: judge(instance, Shape(4, 1), stages, "auto").evaluation.busiest_s
        for stages in row_placements(instance, Shape(4, 1))
    }
    best = min(rates, key=rates.__getitem__)
    assert best[2] < 2 <= best[3]
    assert rates[best] == 12.0


def test_a_search_without_time_is_no_worse_than_a_row():
    """An encoder, and a decoder each of whose layers reads it through a block of its own: far too
    many ideals, coarse groups that cut nowhere even, and CP-SAT has no time.
    """
    draw = random.Random(1)
    encoder, layers, per_layer = 72, 24, 6
    times = [draw.randint(1, 9) for _ in range(encoder)]
    edges = [(i, (i + 1,), 2) for i in range(encoder - 1)]
    readers, before = [encoder + 1], None
    for _ in range(layers):
        reader = len(times)
        readers.append(reader)
        times += [draw.randint(5, 20), *(draw.randint(1, 9) for _ in range(per_layer))]
        own = range(reader + 1, len(times))
        edges += [(i, (i + 1,), 2) for i in own[:-1]]
        edges.append((reader, (own[per_layer // 2],), 2))
        if before is not None:
            edges.append((before, (own[0],), 2))
        before = own[-1]
    edges.append((encoder - 1, tuple(sorted(readers)), 2))
    given = problem(times, edges, gpus=16)
    instance, shape = make_instance(given), Shape(16, 1)
    rows = row_placements(instance, shape)
    best = min(judge(instance, shape, row, "auto").evaluation.busiest_s for row in rows)
    assert solve_fixed(given, 16, limits=Limits(deterministic_s=0.01)).period_s <= best
