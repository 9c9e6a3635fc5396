"""The baselines of the placement benchmark do what their papers and packages define."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from baselines import chain, deepspeed, torchgpipe, uniform
from hypothesis import given
from hypothesis import strategies as st


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


def test_the_table_has_a_row_for_each_file(tmp_path):
    pytest.importorskip("ortools")
    from test_loads import file

    path = tmp_path / "small.json"
    path.write_text(json.dumps(file()))
    script = Path(__file__).parent / "benchmarks" / "placement.py"
    printed = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, timeout=120, check=True
    )
    row = printed.stdout.splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[1:5]] == ["small", "2", "9", "0.00%"]
    assert all(float(cell) >= 1 for cell in row[6:-1])
