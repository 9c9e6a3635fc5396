"""p2bw solve: problem files in, placements with proofs out."""

import itertools
import json
import subprocess
import sys

import pytest

from p2bw.compiler.problem import BlockCost, PlacementProblem, TensorCost
from p2bw.compiler.solve import solve_file
from p2bw.contract.errors import InputFileError, UsageError


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "p2bw", "solve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def chain(tmp_path):
    """Four blocks of 1, 2, 3 and 4 seconds in a row, on two devices."""
    from test_placement import topology

    names = "abcd"
    problem = PlacementProblem(
        microbatch=2,
        blocks=tuple(
            BlockCost(name=name, forward_s=i + 1.0, backward_s=0.0) for i, name in enumerate(names)
        ),
        tensors=tuple(
            TensorCost(
                name=a + b, producer=a, consumers=(b,), bytes=1, gradient_bytes=1, saved=False
            )
            for a, b in itertools.pairwise(names)
        ),
        topology=topology(2),
    )
    path = tmp_path / "chain.json"
    path.write_text(problem.to_json())
    return path


def test_our_own_problem_in_as_many_stages_as_asked(chain):
    found = solve_file(chain, stages=2)
    assert found.assignment == {"a": 0, "b": 0, "c": 0, "d": 1}
    assert (found.status, found.gap) == ("optimal", 0)
    assert found.objective == 3.0  # 6 s for two samples
    assert [stage.load for stage in found.stages] == [3.0, 2.0]


def test_the_command_prints_a_table_or_json(chain):
    printed = run(chain, "--stages", 2, "--json")
    assert printed.returncode == 0, printed.stderr
    result = json.loads(printed.stdout)
    assert set(result) >= {"status", "objective", "bound", "gap", "seconds", "assignment"}
    assert set(result["stages"][0]) >= {"load", "memory", "replicas"}
    table = run(chain, "--stages", 2).stdout
    assert "proven optimal" in table
    assert "3: a, b, c" in table


def test_bad_requests_name_what_is_wrong(chain, tmp_path):
    with pytest.raises(UsageError, match="at least one stage"):
        solve_file(chain, stages=0)
    bad = tmp_path / "bad.json"
    bad.write_text('{"schema": 1, "microbatch": 0}')
    with pytest.raises(InputFileError, match="microbatch"):
        solve_file(bad)
    assert run(bad).returncode == 6
    assert run(tmp_path / "none.json").returncode == 2
