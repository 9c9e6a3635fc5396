"""The printer's lines are those of ruff, and headers say what the plan says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2bw.compiler.emit.check import check
from p2bw.compiler.emit.comments import spans
from p2bw.compiler.emit.expr import (
    WIDTH,
    Attr,
    Binary,
    Call,
    Node,
    Num,
    Raw,
    Seq,
    Unary,
    call,
    flat,
    lay_out,
    quoted,
)
from p2bw.compiler.emit.header import StageHeader, Wire, format_header
from p2bw.compiler.emit.names import identifier
from p2bw.compiler.program import TensorType

NAMES = st.sampled_from(["x", "mask", "self.weight", "hidden_states", "self.norm.bias"])
NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([0.5, 1e-05, 2.0, -3.4e38, 1e30]))
ATOMS = st.one_of(NAMES.map(Raw), NUMBERS.map(Num))


def _larger(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    operators = st.sampled_from(["+", "-", "*", "/", "@", "**", "==", "<", "&", "|", "//", "%"])
    listed = st.lists(inner, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(Binary, operators, inner, inner),
        st.builds(lambda op, x: Unary(op, x), st.sampled_from("-~"), NAMES.map(Raw)),
        st.builds(lambda args: Call(Raw("F.function"), args), listed),
        st.builds(lambda x, args: Call(Attr(x, "view"), args), NAMES.map(Raw), listed),
        st.builds(lambda items: call("torch.cat", Seq("()", items), dim=Num(1)), listed),
    )


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(expressions=st.lists(st.recursive(ATOMS, _larger, max_leaves=6), min_size=40, max_size=60))
def test_lines_are_as_ruff_formats_them(
    expressions: list[Node], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("ruff")
    path: Path = tmp_path_factory.mktemp("lines") / "lines.py"
    lines = [line for e in expressions for line in lay_out("y = ", e, 0) if _is_laid_out(e)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--config"]
    result = subprocess.run(
        [*command, ROOT / "pyproject.toml", path], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _is_laid_out(expression: Node) -> bool:
    """Emission keeps expressions that are no plain call short enough for one line."""
    return len(flat(expression)) < WIDTH - 20


def test_strings_are_quoted_as_ruff_does() -> None:
    assert quoted("h.3") == '"h.3"'
    assert quoted('say "x"') == "'say \"x\"'"
    assert quoted("it's") == '"it\'s"'
    assert quoted("a\nb\\") == '"a\\nb\\\\"'


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h.3.attn", "h_3_attn"),
        ("3", "x_3"),
        ("class", "class_"),
        ("torch", "torch_"),
        ("print", "print_"),
        ("a'b\n", "a_b"),
        ("", "x2"),
        ("x", "x2"),
        ("conv1", "conv1_2"),
    ],
)
def test_identifiers_are_safe(text: str, name: str) -> None:
    assert identifier(text, {"x", "conv1"}) == name


def test_paths_are_told_as_spans() -> None:
    assert spans(["h.3", "h.4", "h.5", "ln_f"], width=60) == "h.3-5, ln_f"
    assert spans(["a.0.b", "a.1.b", 'x"""'], width=60) == "a.0-1.b, x???"
    assert spans([f"layer{i}" for i in range(20)], width=20) == "layer0, layer1 and 18 more"


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from torch import load",
        "x = eval('1')",
        "x = torch.__dict__",
        "x = [a for a in ()]",
        "lambda: 0",
    ],
)
def test_code_that_emission_never_writes_is_refused(line: str) -> None:
    stage = f"class Stage(nn.Module):\n    def forward(self):\n        {line}\n"
    with pytest.raises(AssertionError):
        check(stage)


def test_a_header_tells_the_stages_numbers() -> None:
    wire = Wire(name="h_2", type=TensorType((8, 64), torch.float32), bytes=2048, peers=(0,))
    header = StageHeader(
        index=1,
        depth=4,
        model="GPT",
        modules=("h.3", "h.4", "h.5"),
        devices=(2, 3),
        parameters=21_200_000,
        flops_forward=4_000_000_000,
        flops_backward=8_000_000_000,
        forward_s=4.12e-3,
        backward_s=8.31e-3,
        recompute_s=0.0,
        period_s=13e-3,
        memory=(("weights", 162 << 20), ("stash", 144 << 20)),
        memory_limit=16 << 30,
        receives=(wire,),
        sends=(),
        origin="examples/gpt.py:model",
        version="0.1.0",
    )
    text = format_header(header)
    for words in (
        "Stage 1 of 4: GPT on ranks 2, 3.",
        "h.3-5",
        "parameters  21.2 M",
        "forward     4.12 ms, 4.00 GFLOP",
        "busy 95.6 % of the period",
        "memory      306 MiB of 16.0 GiB",
        "= weights 162 MiB + stash 144 MiB",
        "receives    h_2: f32[8, 64], 2.00 KiB from stage 0",
        "Written by p2bw 0.1.0 from examples/gpt.py:model.",
    ):
        assert words in text
    assert all(len(line) <= WIDTH for line in text.splitlines())
