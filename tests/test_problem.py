"""PlacementProblem: validation, JSON, interpolation between two microbatch sizes."""

import json

import pytest
from pydantic import ValidationError

from p2bw.compiler.problem import (
    BlockCost,
    Constraints,
    ParameterCost,
    PlacementProblem,
    TensorCost,
    interpolate,
    read_problem,
)
from p2bw.compiler.topology import make_topology
from p2bw.contract.errors import InputFileError, UsageError


def problem(microbatch=1, scale=1, **changes):
    fields = {
        "microbatch": microbatch,
        "blocks": (
            BlockCost(name="a", forward_s=0.25 * scale, backward_s=0.5, stash_bytes=10 * scale),
            BlockCost(name="b", forward_s=1.0, backward_s=2.0),
        ),
        "parameters": (
            ParameterCost(
                name="w", bytes=8, gradient_bytes=8, optimizer_bytes=16, blocks=("a", "b")
            ),
        ),
        "tensors": (
            TensorCost(
                name="t", producer="a", consumers=("b",), bytes=scale, gradient_bytes=4, saved=True
            ),
        ),
        "topology": make_topology(2, device="v100-16"),
    }
    return PlacementProblem(**fields | changes)


def test_json_round_trip(tmp_path):
    path = tmp_path / "problem.json"
    path.write_text(problem().to_json())
    assert read_problem(path) == problem()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(blocks=[]), "blocks"),
        (lambda d: d["blocks"].append(d["blocks"][0]), "two entries of one block name"),
        (lambda d: d["blocks"][0].update(forward_s=float("nan")), "blocks.0.forward_s"),
        (lambda d: d["blocks"][0].update(stash_bytes=-1), "blocks.0.stash_bytes"),
        (lambda d: d["tensors"][0].update(consumers=["z"]), "tensor 't' names no block: 'z'"),
        (lambda d: d["tensors"][0].update(extra=1), "tensors.0.extra"),
        (lambda d: d["topology"].update(gpus=0), "topology.gpus"),
        (lambda d: d["constraints"].update(pin={"z": 0}), "names no block"),
        (lambda d: d["constraints"].update(never_cut=["z"]), "names no tensor"),
        (
            lambda d: d["tensors"].append(
                d["tensors"][0] | {"name": "u", "producer": "b", "consumers": ["a"]}
            ),
            "depend on each other",
        ),
    ],
)
def test_an_invalid_file_is_refused_by_field(tmp_path, change, message):
    data = json.loads(problem().to_json())
    change(data)
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputFileError, match=message):
        read_problem(path)


def test_files_that_are_no_json_or_missing(tmp_path):
    path = tmp_path / "problem.json"
    with pytest.raises(UsageError, match="No such file"):
        read_problem(path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputFileError):
        read_problem(path)


def test_interpolation_is_linear_and_rounds_bytes_up():
    first, second = problem(2, 1), problem(4, 4)
    middle = interpolate(first, second, 3)
    assert middle.microbatch == 3
    assert middle.blocks[0].forward_s == pytest.approx(0.625)
    assert middle.blocks[0].stash_bytes == 25
    assert middle.tensors[0].bytes == 3  # 2.5 rounded up
    assert middle.parameters == first.parameters
    assert interpolate(second, first, 4) == second
    assert interpolate(first, second, 8).blocks[0].stash_bytes == 100
    assert interpolate(problem(2, 3), problem(3, 1), 9).tensors[0].bytes == 0


def test_apart_and_together_are_kept_in_json():
    constraints = Constraints(pin={"a": 0}, apart=(("a", "b"),), never_cut=("t",))
    again = PlacementProblem.model_validate_json(problem(constraints=constraints).to_json())
    assert again.constraints == constraints
    with pytest.raises(ValidationError):
        problem(constraints=Constraints(apart=(("a", "z"),)))
