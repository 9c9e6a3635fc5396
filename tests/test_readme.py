"""What the README shows is what its command prints."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from corpus import ROOT

from p2bw.compiler.driver import compile_model
from p2bw.tables import print_plan


@pytest.mark.slow
def test_the_plan_in_the_readme_is_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = re.search(r"<!-- output: compile -->\n```text\n(.*?)```", _readme(), re.DOTALL)
    assert shown is not None
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)
    made = compile_model("examples/gpt.py", gpus=8, cluster="p3.16xlarge", out=tmp_path / "gpt")
    with redirect_stdout(io.StringIO()) as printed:
        print_plan(made.plan, "build/gpt")
    lines = [line.rstrip() for line in printed.getvalue().splitlines()]
    assert shown[1].splitlines() == lines


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")
