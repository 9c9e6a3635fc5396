"""The stage files of known models are short, and say nothing twice."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import ROOT

from p2bw.compiler.driver import compile_model

README = ROOT / "README.md"
MODELS: dict[str, dict[str, object]] = {
    "hf_gpt2": {"width": 768, "heads": 12},
    "hf_bert": {"width": 768, "heads": 12},
    "hf_vit": {"width": 768, "heads": 12},
    "hf_llama": {"width": 512, "hidden": 1536, "heads": 8, "kv_heads": 4, "vocab": 32000},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODELS)
def test_twelve_layers_in_four_stages(
    name: str, tmp_path: Path, the_same: Callable[[Path, str], None]
) -> None:
    made = compile_model(
        ROOT / "examples" / f"{name}.py",
        settings={"layers": 12, **MODELS[name]},
        gpus=4,
        depth=4,
        width=1,
        out=tmp_path / name,
    )
    texts = [path.read_text("utf-8") for path in sorted((made.artifact / "stages").iterdir())]
    assert len(texts) == 4
    assert [len(text.splitlines()) for text in texts if len(text.splitlines()) >= 150] == []
    for text in texts:
        bodies = [ast.dump(ast.Module(node.body, [])) for node in _classes(text)]
        assert len(set(bodies)) == len(bodies), "two classes say the same"
    layers = r"^class (\w*(?:Block|Layer))\(nn.Module\):  # [\w.]+\.(\d+)-(\d+) \("
    found = [match for text in texts for match in re.findall(layers, text, re.MULTILINE)]
    whole = sum(int(last) - int(first) + 1 for _, first, last in found)
    assert len({cls for cls, _, _ in found}) == 1
    assert whole >= 6, "most layers are whole, and one class in their stage"
    if name == "hf_gpt2":
        readme = README.read_text(encoding="utf-8")
        begin, shown, rest = re.split(
            r"(?<=```python\n)(\"\"\"Stage .*?)(?=```)", readme, flags=re.DOTALL
        )
        assert shown.startswith('"""Stage 2 of 4: GPT2LMHeadModel')
        the_same(README, f"{begin}{texts[2]}{rest}")


def _classes(text: str) -> list[ast.ClassDef]:
    return [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
