"""The benchmarks: baselines do what their papers and packages define, and the scripts run."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from baselines import (
    BASELINES,
    Graph,
    chain,
    deepspeed,
    equal_blocks,
    pipedream,
    torchgpipe,
    uniform,
)
from hypothesis import given
from hypothesis import strategies as st
from pipelining import judge
from pipelining_ranks import OURS, PEERS
from processes import alive, children, wait_until


def test_cuts_by_hand():
    assert uniform([1.0] * 7, 3) == [0, 3, 5, 7]
    assert chain([1, 2, 3, 4, 5], 2) == [0, 3, 5]
    assert deepspeed([1, 2, 3, 4, 5], 2) == [0, 3, 5]
    assert deepspeed([1, 2], 3) == [0, 1, 2, 2]
    assert torchgpipe([1, 1, 1, 1, 1, 1, 9, 9], 2) == [0, 7, 8]


@given(st.lists(st.integers(1, 9), min_size=4, max_size=12), st.integers(1, 4))
def test_cuts_cover_all_layers_and_the_chain_is_best(weights, parts):
    def largest(cut):
        bounds = cut(weights, parts)
        assert bounds == sorted(bounds)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(weights), parts + 1)
        return max(sum(weights[a:b]) for a, b in pairwise(bounds))

    best = largest(chain)
    assert best <= min(map(largest, (uniform, deepspeed, torchgpipe)))


def row_of(seconds, names=None, tensors=(), bandwidths=(10.0,), parameters=()):
    """A row of blocks, each of which reads the one before."""
    return Graph(
        names=names or [f"block{i}" for i in range(len(seconds))],
        seconds=seconds,
        parameters=parameters,
        tensors=tensors,
        predecessors=tuple((i - 1,) if i else () for i in range(len(seconds))),
        bandwidths=bandwidths,
    )


def test_pipedream_charges_links_or_not():
    # 1 + 2 + 3 | 4 is best by time; what crosses there takes 100 / 10 s, and 10 / 10 s before 3.
    graph = row_of([1, 2, 3, 4], tensors=[(10, (1, 2)), (100, (2, 3))])
    assert list(pipedream(graph, 2)) == [[0, 0, 1, 1], [0, 0, 0, 1]]
    # Of three stages, only the second link is slow: 1 | 2 + 3 | 4 and 1 + 2 | 3 | 4 take 5 and 4.
    graph = row_of([1, 2, 3, 4], tensors=[(100, (1, 2)), (100, (2, 3))], bandwidths=(1e9, 10.0))
    assert next(pipedream(graph, 3)) == [0, 1, 2, 2]


def test_pipedream_splits_branches_that_a_list_cannot():
    diamond = Graph(
        names="abcd",
        seconds=[1, 3, 2, 0],
        parameters=(),
        tensors=(),
        predecessors=((), (0,), (0,), (1, 2)),
        bandwidths=(1.0,),
    )
    assert list(pipedream(diamond, 2)) == [[0, 1, 0, 1]] * 2
    assert next(BASELINES["chain"](diamond, 2)) == [0, 0, 1, 1]


def test_equal_blocks_counts_numbered_modules_and_nothing_else():
    names = ["wte", "h.0.attn", "h.0.mlp", "h.0.mlp#2", "h.1", "h.2", "h.3.mlp", "ln_f", "loss"]
    graph = row_of([1] * 9, names)
    assert list(equal_blocks(graph, 2)) == [[0, 0, 0, 0, 0, 1, 1, 1, 1]] * 2
    three = list(equal_blocks(graph, 3))[:2]  # the module left over: in the first stage, the last
    assert three == [[0, 0, 0, 0, 0, 1, 2, 2, 2], [0, 0, 0, 0, 1, 2, 2, 2, 2]]
    assert not list(equal_blocks(graph, 5))


def test_layers_are_blocks_or_modules_and_tied_parameters_count_in_each():
    names = ["emb", "h.0.a.0", "h.0.a.1", "h.1.a.0", "head"]
    graph = row_of(
        [1, 1, 1, 1, 6], names, parameters=[(9, (0, 4)), (1, (1,)), (1, (2,)), (1, (3,))]
    )
    # As blocks: 3 + 2. As outermost modules emb, h.0, h.1, head: 2 + 2. As innermost: blocks again.
    assert list(BASELINES["uniform"](graph, 2)) == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert list(BASELINES["uniform"](graph, 4))[1] == [0, 1, 1, 2, 3]
    # 9 1 1 1 9 in three parts: the middle has little, whoever takes a layer from it.
    assert next(BASELINES["DS params"](graph, 3)) == [0, 1, 1, 1, 2]


def problem_file(path, optimizer_bytes):
    """Blocks of 1, 1, 1 and 3 s in a row, and two devices of 70 bytes."""
    from test_placement import topology

    from p2bw.compiler.problem import BlockCost, ParameterCost, PlacementProblem, TensorCost

    names = "abcd"
    problem = PlacementProblem(
        microbatch=1,
        blocks=tuple(
            BlockCost(name=name, forward_s=time / 4, backward_s=time * 3 / 4)
            for name, time in zip(names, (1, 1, 1, 3), strict=True)
        ),
        parameters=tuple(
            ParameterCost(
                name=f"w{name}", bytes=1, gradient_bytes=1, optimizer_bytes=size, blocks=(name,)
            )
            for name, size in zip(names, optimizer_bytes, strict=True)
        ),
        tensors=tuple(
            TensorCost(name=a, producer=a, consumers=(b,), bytes=1, gradient_bytes=1, saved=False)
            for a, b in pairwise(names)
        ),
        topology=topology(2, memory=70),
    )
    path.write_text(problem.to_json())
    return path


def test_a_row_by_hand(tmp_path):
    """Ours 3 | 3; half of the blocks each: 2 | 4; nothing is numbered."""
    pytest.importorskip("ortools")
    cells = last_row(problem_file(tmp_path / "row.json", (50, 0, 0, 0)), "--stages", "2")
    assert cells[:4] == ["row", "2", "3000.00 ms", "0.00%"]
    found = dict(zip(BASELINES, cells[5:], strict=False))
    assert found == {
        "uniform": "1.333",
        "DS params": "1.333",
        "DS time": "1.000",
        "torchgpipe": "1.333",
        "PipeDream": "1.000",
        "2BW": "-",
        "chain": "1.000",
    }
    assert cells[-1] == "1.000"


def test_what_does_not_fit_the_memory_is_no_win(tmp_path):
    """a and b do not fit one device: 1 | 5 is the best that does, and no baseline finds it."""
    pytest.importorskip("ortools")
    cells = last_row(problem_file(tmp_path / "row.json", (50, 40, 0, 0)), "--stages", "2")
    assert cells[2] == "5000.00 ms"
    assert set(cells[5:-1]) == {"too big", "-"}
    assert cells[-1] == "-"


def last_row(*arguments):
    script = Path(__file__).parent / "benchmarks" / "placement.py"
    printed = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [cell.strip() for cell in printed.stdout.splitlines()[-1].split("|")[1:-1]]


def test_the_table_has_a_row_for_each_file(tmp_path):
    pytest.importorskip("ortools")
    from test_loads import file

    path = tmp_path / "small.json"
    path.write_text(json.dumps(file()))
    cells = last_row(path)
    assert cells[:4] == ["small", "2", "9", "0.00%"]
    assert all(cell == "-" or float(cell) >= 1 for cell in cells[5:])


def test_the_pipelining_benchmark_runs_every_schedule_of_both():
    """How fast they are here says nothing."""
    script = Path(__file__).parent / "benchmarks" / "pipelining.py"
    line = [sys.executable, script, "--stage-ms", "1", "--microbatches", "4", "--rounds", "1"]
    printed = subprocess.run(
        [*line, "--seconds", "0.01", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    (row,) = json.loads(printed.stdout)
    assert (row["m"], row["stage_ms"]) == (4, 1)
    assert set(row["utilisation"]) == {*OURS, *PEERS}
    assert all(share > 0 for share in row["utilisation"].values())


def test_the_pipelining_benchmark_says_what_is_behind():
    """Seconds per update; the ideal took 1 s."""
    took_s = {"2bw": 1.02, "2bw, all on": 1.06, "flush": 1.6, "1F1B": 1.5, "ZBVZeroBubble": 1.01}
    row = judge(100, 4, {name: [(s, 1.0), (s, 1.0)] for name, s in took_s.items()})
    assert row["missed"] == [
        "2bw is 0.990 of ZBVZeroBubble, not 1",
        "flush is 0.938 of 1F1B, not 1",
        "2bw, all on is 0.962 of 2bw, not 0.97",
    ]
    (missed,) = judge(10, 2, {"2bw": [(1.0, 0.9)], "1F1B": [(1.5, 0.9)]})["missed"]
    assert missed == "2bw is 0.900 of the ideal, not 0.93"
    (missed,) = judge(10, 2, {"2bw": [(1.0, 1.0)], "1F1B": [(1.4, 1.0)]})["missed"]
    assert missed == "2bw is 1.400 of 1F1B, not 1.45"


def test_a_killed_pipelining_benchmark_leaves_no_rank():
    script = Path(__file__).parent / "benchmarks" / "pipelining.py"
    short = [
        "--stage-ms",
        "1",
        "--only",
        "2bw",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--microbatches",
        "2",
        "40000",
    ]
    with subprocess.Popen([sys.executable, script, *short], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()  # m = 2 is done; the other takes long
        ranks = children(process.pid)
        process.kill()
    assert len(ranks) >= 2
    wait_until(lambda: not any(map(alive, ranks)), 10)
