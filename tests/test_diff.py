"""p2bw diff: what it says moved is what moved, block by block."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.difference import Move, compare, moves_between
from p2bw.compiler.drawing import module_of
from p2bw.compiler.driver import Compiled
from p2bw.compiler.plan import Plan
from p2bw.contract.errors import InputFileError
from p2bw.diff import with_ranges

GOLDENS = Path(__file__).parent / "goldens"
Homes = dict[str, int]


def golden_plan(name: str) -> Plan:
    return Plan.model_validate_json((GOLDENS / name / "plan.json").read_bytes())


def homes_of(plan: Plan) -> Homes:
    return {block: stage.index for stage in plan.stages for block in stage.blocks}


@st.composite
def two_homes(draw: st.DrawFn) -> tuple[Homes, Homes]:
    """Stages of some model's blocks, twice: cut in its order, and then a few moved anywhere."""
    blocks = list(homes_of(golden_plan(draw(st.sampled_from([a.name for a in CORPUS])))))

    def cut() -> Homes:
        ends = sorted(draw(st.lists(st.integers(0, len(blocks)), min_size=1, max_size=4)))
        return {block: sum(end <= i for end in ends) for i, block in enumerate(blocks)}

    before, after = cut(), cut()
    for block in draw(st.lists(st.sampled_from(blocks), max_size=3)):
        after[block] = draw(st.integers(0, 4))
    return before, after


def under(path: str, blocks: Homes) -> list[str]:
    return [block for block in blocks if f"{module_of(block)}.".startswith(f"{path}.")]


@given(two_homes())
@settings(max_examples=150, deadline=None)
def test_the_moves_say_where_every_block_has_gone(pair: tuple[Homes, Homes]) -> None:
    before, after = pair
    moves = list(moves_between(before, after))
    assert len(moves) == len(set(moves))
    told = set()
    for move in moves:
        (source,), (target,) = move.before, move.after
        assert source != target
        path = re.sub(r" \((glue|part)\)$", "", move.module)
        if path == move.module:  # all of it
            blocks = under(path, before)
            assert {(before[b], after[b]) for b in blocks} == {(source, target)}
            above = under(path.rpartition(".")[0], before)
            if "." in path:  # and not all of what it is a part of
                assert {(before[b], after[b]) for b in above} != {(source, target)}
        else:
            own = [b for b in under(path, before) if module_of(b) == path]
            blocks = [b for b in own if (before[b], after[b]) == (source, target)]
            assert blocks
        told |= {(block, source, target) for block in blocks}
    assert told == {(b, before[b], after[b]) for b in before if before[b] != after[b]}


def test_a_module_that_moved_as_a_whole_is_one_move() -> None:
    before = {"wte": 0, "h.0.a": 0, "h.0.b": 0, "h.0": 0, "h.1.a": 0, "h.1.b": 1, "h.1": 1}
    after = {**before, "h.0.a": 1, "h.0.b": 1, "h.0": 1, "h.1.a": 1}
    assert list(moves_between(before, after)) == [
        Move("h.0", (0,), (1,)),
        Move("h.1.a", (0,), (1,)),
    ]
    back = {**after, "h.0": 0}
    assert list(moves_between(after, back)) == [Move("h.0 (glue)", (1,), (0,))]


def test_what_came_or_went_has_no_stages_on_that_side() -> None:
    before, after = {"a": 0, "h.0": 0, "h.1": 1}, {"a": 0, "h.0": 0, "h.1": 1, "h.2.x": 2}
    assert list(moves_between(before, after)) == [Move("h.2", (), (2,))]
    assert list(moves_between(after, before)) == [Move("h.2", (2,), ())]


def test_ranges() -> None:
    paths = ("wte", "h.3", "h.4", "h.5", "h.7", "h.8.attn", "layer9", "layer10", "h.1 (glue)")
    assert with_ranges(paths) == "wte, h.3-5, h.7, h.8.attn, layer9-10, h.1 (glue)"


def test_a_diff_of_gpt(
    compiled: Callable[[str, int], Compiled], golden: Callable[[str, str], None]
) -> None:
    two, three = compiled("gpt", 2).artifact, compiled("gpt", 3).artifact
    done = CliRunner().invoke(app, ["diff", str(two), str(three)])
    assert done.exit_code == 0
    golden("gpt/diff.txt", done.stdout)

    found = json.loads(CliRunner().invoke(app, ["diff", str(two), str(three), "--json"]).stdout)
    plans = [json.loads((path / "plan.json").read_text()) for path in (two, three)]
    for name in ("period_s", "samples_per_s", "utilisation", "bytes_per_sample"):
        assert found[name] == [plan[name] for plan in plans]
    assert found["settings"]["depth"] == [2, 3]
    assert found["stages"][2]["seconds"][0] is None
    assert {"module": "head", "before": [1], "after": [2]} in found["moves"]


def test_the_exit_code_tells_if_asked(compiled: Callable[[str, int], Compiled]) -> None:
    artifact = str(compiled("gpt", 2).artifact)
    done = CliRunner().invoke(app, ["diff", artifact, artifact, "--exit-code"])
    assert (done.exit_code, done.stdout) == (0, "the same plan and the same code\n")
    other = str(compiled("gpt", 3).artifact)
    assert CliRunner().invoke(app, ["diff", artifact, other]).exit_code == 0
    assert CliRunner().invoke(app, ["diff", artifact, other, "--exit-code", "-q"]).exit_code == 1


def copy(plan: Plan, folder: Path, code: str = "") -> Path:
    (folder / "stages").mkdir(parents=True)
    (folder / "plan.json").write_text(plan.to_json())
    for k in range(plan.depth):
        (folder / "stages" / f"stage_{k}.py").write_text(code)
    return folder


def test_settings_numbers_and_code_that_changed(tmp_path: Path) -> None:
    plan = golden_plan("mlp")
    first = plan.stages[0]
    changed = plan.model_copy(
        update={
            "schedule": "gpipe",
            "period_s": 2 * plan.period_s,
            "model": plan.model.model_copy(update={"settings": {"width": 7}}),
            "stages": (first.model_copy(update={"recompute": True}), *plan.stages[1:]),
        }
    )
    old, new = copy(plan, tmp_path / "old"), copy(changed, tmp_path / "new", "x = 1\n")
    found = compare(old, new)
    assert found.settings == {"schedule": ("2bw", "gpipe"), "--set width": (None, 7)}
    assert [(s.index, s.recompute) for s in found.stages] == [(0, (False, True))]
    assert found.code == (0, 1)
    assert found.moves == ()
    text = CliRunner().invoke(app, ["diff", str(old), str(new)]).stdout
    assert re.search(r"period +\S+ us -> \S+ us \(\+100.0 %\)\n", text)
    assert re.search(r"stage 0 +recompute no -> yes\n", text)
    assert re.search(r"code +differs in stages 0-1\n", text)
    assert "moved" not in text

    # Of a device, its name, or what is different.
    for figure, said in (
        ({"memory_bytes": 5}, 'device +{"memory_bytes": 17179869184} -> {"memory_bytes": 5}\n'),
        ({"name": "h100"}, "device +v100-16 -> h100\n"),
    ):
        device = {**plan.topology["device"], **figure}
        other = plan.model_copy(update={"topology": {**plan.topology, "device": device}})
        folder = copy(other, tmp_path / next(iter(figure)))
        assert re.search(said, CliRunner().invoke(app, ["diff", str(old), str(folder)]).stdout)

    # Only edited code is a difference as well; a change that no line names is owned up to.
    edited = compare(old, copy(plan, tmp_path / "edited", "y = 2\n"))
    assert (edited.equal, edited.settings, edited.code) == (False, {}, (0, 1))
    quiet = plan.model_copy(update={"inputs": ()})
    text = CliRunner().invoke(app, ["diff", str(old), str(copy(quiet, tmp_path / "q"))]).stdout
    assert text == "the plans differ in details only; compare their plan.json\n"


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    good = copy(golden_plan("mlp"), tmp_path / "good")
    (tmp_path / "bad").mkdir()
    for pair in ((good, tmp_path / "bad"), (tmp_path / "none", good)):
        with pytest.raises(InputFileError, match="is no artifact"):
            compare(*pair)
    (tmp_path / "bad" / "plan.json").write_text("{}")
    done = CliRunner().invoke(app, ["diff", str(good), str(tmp_path / "bad")])
    assert done.exit_code == 6
    assert "plan.json" in done.output
