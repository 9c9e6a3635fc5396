"""Constraints by globs over module paths: what they mean for the model's own parameters."""

import json
import re
from functools import cache
from itertools import pairwise

import networkx as nx
import pytest
from annotated import annotated
from bruteforce import assignments
from corpus import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import GOOD
from test_placement import chain
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.lower import placement_problem
from p2bw.compiler.placement.solver import solve_fixed
from p2bw.compiler.problem import Constraints, TensorCost
from p2bw.compiler.rules import Rules, check_rules, constraints_of, pairs_apart, parse_rules
from p2bw.compiler.topology import make_topology
from p2bw.contract.errors import InfeasibleError, UsageError


@cache
def traced(name):
    _, program = annotated(next(a for a in CORPUS if a.name == name))
    problem = placement_problem(
        program,
        topology=make_topology(gpus=4, device="a100-80"),
        schedule="2bw",
        microbatches=None,
        optimizer={},
        on={},
    )
    return program, problem


def constrained(name="gpt", **rules):
    program, problem = traced(name)
    constraints = constraints_of(parse_rules(**rules), program, problem)
    return problem.model_copy(update={"constraints": constraints})


def placed(depth, name="gpt", **rules):
    """The best placement, and by parameter the stages that use it."""
    problem = constrained(name, **rules)
    placement = solve_fixed(problem, depth)
    stages = {
        parameter.name: {placement.stage_of_block[block] for block in parameter.blocks}
        for parameter in problem.parameters
    }
    return placement, stages


def stages_of(stages, *prefixes):
    """Of all parameters under these module paths."""
    return set().union(*(own for name, own in stages.items() if name.startswith(prefixes)))


def test_without_rules_there_is_no_constraint():
    assert constrained().constraints == Constraints()
    assert parse_rules() == Rules()


def test_a_pin_puts_all_that_matches_in_its_stage():
    assert stages_of(placed(3)[1], "h.1.") != {0}
    _, stages = placed(3, pin=["h.[01]=0", "h.3.mlp=2"])
    assert stages_of(stages, "h.0.", "h.1.") == {0}
    assert stages_of(stages, "h.3.mlp.") == {2}
    # `**` is any number of names, and `*` is one.
    assert stages_of(placed(3, pin=["**.attn=1"])[1], *(f"h.{i}.attn." for i in range(4))) == {1}
    with pytest.raises(UsageError, match="matches no module"):
        constrained(pin=["*.attn=1"])


def test_together_is_one_stage_for_all_that_matches_any_glob():
    _, stages = placed(3, together=["h.0.mlp, h.2.*"])
    assert len(stages_of(stages, "h.0.mlp.", "h.1.", "h.2.")) == 1  # h.1 lies between them


@pytest.mark.parametrize("depth", [2, 3])
def test_apart_leaves_no_stage_with_some_of_both(depth):
    _, stages = placed(depth, apart=["h.1,h.2"])
    assert not stages_of(stages, "h.1.") & stages_of(stages, "h.2.")
    _, stages = placed(depth, apart=["h.2,h.1"])
    assert not stages_of(stages, "h.1.") & stages_of(stages, "h.2.")


@pytest.mark.parametrize("glob", ["h.*", "h.*.attn", "h.*.mlp", "h.2"])
def test_never_cut_keeps_every_call_whole(glob):
    program, _ = traced("gpt")
    for depth in (2, 3, 4):
        placement, _ = placed(depth, never_cut=[glob])
        calls = {}
        for block in program.blocks:
            for node in block.nodes:
                for scope in program.facts[node].scopes:
                    calls.setdefault((scope.path, scope.call), set()).add(
                        placement.stage_of_block[block.name]
                    )
        layers = range(4) if "*" in glob else [2]
        for i in layers:
            assert len(calls[glob.replace("*", str(i)), 0]) == 1


def test_the_free_placement_cuts_what_never_cut_keeps_whole():
    """Otherwise the test above could not fail."""
    stages = placed(3)[1]
    assert any(len(stages_of(stages, f"h.{i}.")) > 1 for i in range(4))


def test_a_module_that_is_called_twice_may_be_cut_between_its_calls():
    (whole,) = constrained("seq2seq", together=["encoder.drop"]).constraints.together
    assert len(whole) > 1
    for blocks in constrained("seq2seq", never_cut=["encoder.drop"]).constraints.together:
        assert not set(whole) <= set(blocks)


def test_a_container_may_have_no_block_of_its_own():
    """The whole of decoder.rest runs in blocks that are named after the decoder."""
    program, _ = traced("seq2seq")
    inside = {
        block.name
        for block in program.blocks
        for node in block.nodes
        for scope in program.facts[node].scopes
        if scope.path.startswith("decoder.rest.")
    }
    assert not any(name.startswith("decoder.rest") for name in inside)
    (blocks,) = constrained("seq2seq", together=["decoder.rest"]).constraints.together
    assert set(blocks) == inside


def test_cuts_are_the_stages_with_the_numbers_of_the_solver():
    found, stages = placed(3, never_cut=["h.*"])
    last = [max(i for i in range(4) if k in stages_of(stages, f"h.{i}.")) for k in range(2)]
    placement, mine = placed(3, cut_after=[f"h.{i}" for i in last])
    assert mine == stages
    assert placement.stages == found.stages
    assert (placement.period_s, placement.links) == (found.period_s, found.links)


def test_a_cut_in_a_layer_is_where_it_was_asked_for():
    placement, stages = placed(2, cut_after=["h.1.attn.qkv"])
    assert stages_of(stages, "wpe", "h.0.", "h.1.ln_1", "h.1.attn.qkv") == {0}
    assert stages_of(stages, "h.1.attn.proj", "h.1.ln_2", "h.1.mlp.", "h.2.", "h.3.", "ln_f") == {1}
    assert placement.status == "optimal"


def test_cuts_that_do_not_fit_say_what_would():
    problem = constrained(cut_after=["h.2"])

    def with_memory(memory):
        topology = make_topology(gpus=4, device="a100-80", memory=memory)
        return problem.model_copy(update={"topology": topology})

    with pytest.raises(InfeasibleError, match=r"wpe .. h.2#2 needs .* offers") as error:
        solve_fixed(with_memory("532MiB"), 2)
    cure = re.search(r"--memory (\w+) \(", str(error.value))
    assert cure is not None
    assert solve_fixed(with_memory(cure[1]), 2).depth == 2


WRONG = {
    "nothing matches": ({"pin": ["h.9=0"]}, "--pin h.9 matches no module .* near it are h."),
    "nothing is near": ({"never_cut": ["zzzzzzzz"]}, "at the top are .*wte"),
    "two pins": (
        {"pin": ["h.*=0", "h.3.mlp=1"]}, r"--pin h\.\*=0 and --pin h.3.mlp=1 contradict .*h.3.mlp"
    ),
    "backwards": ({"pin": ["head=0", "wte=1"]}, r"wte=1 and --pin head=0 .* \(head needs"),
    "a pin against a set": (
        {"pin": ["h.0=0", "h.3=1"], "together": ["h.*"]}, r"--together h\.\* is contradicted by"
    ),
    "a pin against a cut": (
        {"pin": ["h.0=1"], "cut_after": ["h.1"]}, "--cut-after h.1 and --pin h.0=1 contradict"
    ),
    "a cut of what is never cut": (
        {"never_cut": ["h.*.attn"], "cut_after": ["h.1.attn.qkv"]},
        r"--never-cut h\.\*\.attn is contradicted by --cut-after h.1.attn.qkv",
    ),
    "apart from itself": ({"apart": ["h.*,h.1"]}, r"h\.\*,h.1: both have h.1.ln_1, h.1.attn.qkv"),
    "cuts in disorder": ({"cut_after": ["h.2", "h.1"]}, "h.1 is not behind --cut-after h.2"),
    "one cut twice": ({"cut_after": ["h.2", "h.2"]}, "is not behind"),
    "a cut behind all": ({"cut_after": ["h.1", "loss"]}, "nothing for a stage behind it"),
    "a cut behind many": ({"cut_after": ["h.*"]}, r"matches 4 modules \(h.0, h.1, h.2, ...\)"),
    "a pin without a stage": ({"pin": ["wte"]}, "--pin 'wte=0'"),
    "a negative stage": ({"pin": ["wte=-1"]}, "--pin 'wte=0'"),
    "one module apart": ({"apart": ["h.0"]}, "two modules"),
    "an empty name": ({"together": ["h.0,,h.1"]}, "with commas"),
    "an empty cut": ({"cut_after": [""]}, "want a module"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_gets_one_message(case):
    rules, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        constrained(**rules)


def test_what_needs_no_model_is_refused_before_it_is_traced():
    check_rules(parse_rules(pin=["a=3"]), 4, None)
    for rules, gpus, depth, message in (
        (parse_rules(pin=["a=4"]), 4, None, "the last stage can be 3"),
        (parse_rules(pin=["a=2"]), 4, 2, "the last stage can be 1"),
        (parse_rules(cut_after=["a", "b"]), 4, 2, "make 3 stages, not 2"),
        (parse_rules(cut_after=["a", "b"]), 2, None, "more than 2 devices"),
    ):
        with pytest.raises(UsageError, match=message):
            check_rules(rules, gpus, depth)


@st.composite
def graphs(draw):
    """A small problem of any shape, and two sets of its blocks."""
    problem = chain([1.0] * 6)
    names = [block.name for block in problem.blocks]
    pairs = st.lists(st.sampled_from([(a, b) for a in names for b in names if a < b]), unique=True)
    tensors = [
        TensorCost(name=f"x{i}", producer=a, consumers=(b,), bytes=1, gradient_bytes=0, saved=False)
        for i, (a, b) in enumerate(draw(pairs))
    ]
    sides = draw(st.lists(st.sampled_from("abn"), min_size=6, max_size=6))
    first, second = ([n for n, s in zip(names, sides, strict=True) if s == side] for side in "ab")
    return problem.model_copy(update={"tensors": tuple(tensors)}), first, second


@given(graphs(), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_the_pairs_that_are_kept_apart_keep_all_apart(graph, depth):
    problem, first, second = graph
    flow = nx.DiGraph((t.producer, c) for t in problem.tensors for c in t.consumers)
    flow.add_nodes_from(block.name for block in problem.blocks)

    def allowed(pairs):
        constraints = Constraints(apart=tuple(pairs))
        changed = problem.model_copy(update={"constraints": constraints})
        return assignments(changed, depth).tolist()

    assert allowed(pairs_apart(flow, first, second)) == allowed(
        (a, b) for a in first for b in second
    )


def test_in_a_chain_one_pair_is_enough():
    flow = nx.DiGraph(pairwise("abcdef"))
    assert list(pairs_apart(flow, "bc", "de")) == [("c", "d")]


def test_constraints_come_from_the_file_and_stand_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(GOOD)
    (tmp_path / "p2bw.toml").write_text(
        "[compile]\ngpus = 2\nmicrobatch = 2\npin = ['0=0']\ncut-after = 1\n"
    )
    done = CliRunner().invoke(app, ["compile", "model.py", "--quiet"])
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "build" / "model" / "plan.json").read_text())
    assert plan["constraints"] == ["pin 0=0", "cut-after 1"]
    assert [stage["modules"] for stage in plan["stages"]] == [["0", "1"], ["2", "loss"]]
    shown = CliRunner().invoke(app, ["show", "build/model"]).output
    assert "constraints pin 0=0; cut-after 1\n" in shown

    # What the command line gives takes the place of what the file gives.
    done = CliRunner().invoke(app, ["compile", "model.py", "--cut-after", "0", "--json"])
    assert json.loads(done.stdout)["constraints"] == ["pin 0=0", "cut-after 0"]
    done = CliRunner().invoke(app, ["compile", "model.py", "--cut-after", "9", "--quiet"])
    assert done.exit_code == 2
    assert "--cut-after 9 matches no module" in done.output
