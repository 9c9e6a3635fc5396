"""Problem files: what compile --problem writes, and the example of docs/problem.md."""

import json
import re

import pytest
from corpus import ROOT

from p2bw.compiler.driver import compile_model
from p2bw.compiler.problem import PlacementProblem, read_problem
from p2bw.compiler.solve import solve_file
from p2bw.contract.errors import UsageError


@pytest.mark.parametrize("shape", [{"gpus": 2}, {"gpus": 3, "depth": 3, "microbatch": 4}])
def test_solve_finds_the_plan_again_in_the_problem_that_compile_wrote(shape, tmp_path):
    path = tmp_path / "new" / "problem.json"
    plan = compile_model(
        ROOT / "examples" / "gpt.py",
        factory="tiny",
        device="v100-16",
        out=tmp_path / "out",
        problem=path,
        **shape,
    ).plan
    assert read_problem(path).microbatch == plan.microbatch
    assert [file.name for file in path.parent.iterdir()] == ["problem.json"]
    found = solve_file(path, stages=shape.get("depth"), gap="0.1%")  # compile's default
    assert found.assignment == {
        block: stage.index for stage in plan.stages for block in stage.blocks
    }
    assert found.objective == pytest.approx(1 / plan.samples_per_s, rel=1e-12)
    assert found.stages[0].replicas == plan.width


def test_a_problem_file_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "taken").write_text("")
    for bad, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "taken" / "problem.json", "taken is not a writable folder"),
    ):
        with pytest.raises(UsageError, match=message):
            compile_model("no_such_model.py", gpus=2, problem=bad)


def test_a_failed_compile_leaves_the_old_problem(tmp_path):
    old = tmp_path / "problem.json"
    old.write_text("old")
    with pytest.raises(UsageError, match="stages"):
        compile_model(
            ROOT / "examples" / "mlp.py",
            factory="tiny",
            gpus=2,
            depth=3,
            microbatch=1,
            out=tmp_path / "out",
            problem=old,
        )
    assert old.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["problem.json"]


def example(kind):
    text = (ROOT / "docs" / "problem.md").read_text()
    return re.search(rf"<!-- example: {kind} -->\n```json\n(.*?)```", text, re.DOTALL)[1]


def test_the_example_of_the_documentation_is_solved_as_it_says(tmp_path):
    path = tmp_path / "example.json"
    path.write_text(example("problem"))
    found = solve_file(path, stages=2).to_json()
    said = json.loads(example("solution"))
    assert said.pop("seconds") > 0
    assert found.pop("seconds") > 0
    assert found == said


def test_the_documentation_names_every_field():
    text = (ROOT / "docs" / "problem.md").read_text()
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", text))))
    schema = PlacementProblem.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        assert not model["properties"].keys() - named
