"""Emitted stages compute what the model computes, bit for bit, and read like a person's code."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from annotated import annotated
from corpus import CORPUS, ROOT
from staged import compare, cut, load, texts_of

from p2bw.compiler.emit import emit_stage, tensor_names
from p2bw.compiler.program import Program
from p2bw.modelfile.load import ModelFile
from p2bw.passes.group_blocks import group_blocks

PATHS = {architecture.name: architecture for architecture in CORPUS}


@functools.cache
def example(name: str) -> tuple[ModelFile, Program]:
    """A program of the session in blocks as small as they can be, to cut anywhere."""
    file, program = annotated(PATHS[name])
    return file, group_blocks(program)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("depth", "seed"), [(1, None), (3, None), (4, 1)])
def test_the_stages_compute_what_the_model_computes(
    name: str, depth: int, seed: int | None
) -> None:
    file, program = example(name)
    compare(file, program, cut(program, depth, seed))


def test_emitted_code_is_as_ruff_wants_it(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    for name in PATHS:
        _, program = example(name)
        for depth, seed in ((1, None), (3, 0)):
            for k, text in enumerate(texts_of(program, cut(program, depth, seed))):
                (tmp_path / f"{name}_{depth}_{k}.py").write_text(text, encoding="utf-8")
    for command in (["format", "--check"], ["check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", tmp_path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_one_class_serves_all_layers() -> None:
    _, program = example("gpt")
    (text,) = texts_of(program, cut(program, 1))
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert classes == ["Attention", "MLP", "Block", "Stage"]
    assert "self.h = nn.ModuleList(Block() for _ in range(4))" in text
    assert "for block in self.h:" in text
    assert "self.head.weight = self.wte.weight" in text


def test_a_stage_holds_the_parameters_that_it_uses_under_the_models_names() -> None:
    for name in PATHS:
        file, program = example(name)
        known = {
            n: a for a in (*program.parameters.values(), *program.buffers.values()) for n in a.names
        }
        used: set[str] = set()
        for stage, text in zip(cut(program, 3), texts_of(program, cut(program, 3)), strict=True):
            module = load(text, file)
            state = module.state_dict()
            assert {n for n in state if not known[n].persistent} == set()
            used |= {known[n].name for n, _ in module.named_parameters()}
            wanted = {program.node(a).target for a in stage.attributes}
            assert {known[n].name for n in state} <= wanted
            for parameter, tensor in module.named_parameters():
                assert tensor.shape == known[parameter].type.shape
                assert tensor.requires_grad == known[parameter].trainable
        assert used == {p for p in program.parameters if _is_read(program, p)}


def _is_read(program: Program, target: str) -> bool:
    return any(n.op == "get_attr" and n.target == target and n.users for n in program.graph.nodes)


def test_emission_is_deterministic() -> None:
    _, program = example("hf_t5")
    stages = cut(program, 3)
    assert texts_of(program, stages) == texts_of(program, stages)


def test_boundary_names_are_unique_and_identifiers() -> None:
    for name in PATHS:
        _, program = example(name)
        names = list(tensor_names(program).values())
        assert len(set(names)) == len(names)
        assert all(n.isidentifier() for n in names)


def test_a_layer_cut_in_the_middle_says_which_part_it_is() -> None:
    _, program = example("gpt")
    assert program.blocks is not None
    position = next(i for i, b in enumerate(program.blocks) if "h.2.mlp" in b.name)
    stages = cut_at(program, position)
    first, second = (emit_stage(program, stage, 2) for stage in stages)
    assert "class BlockHead(nn.Module):  # the beginning of h.2 (" in first
    assert "class BlockTail(nn.Module):  # the end of h.2 (" in second


def cut_at(program: Program, position: int):
    from p2bw.compiler.split import split

    assert program.blocks is not None
    return split(program, {b.name: int(i >= position) for i, b in enumerate(program.blocks)})
