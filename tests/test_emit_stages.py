"""The stage files of known models are short, and say nothing twice."""

import ast
import re
from pathlib import Path

import pytest
from corpus import ROOT

from p2bw.compiler.driver import compile_model

MODELS: dict[str, dict[str, object]] = {
    "hf_gpt2": {"width": 768, "heads": 12},
    "hf_bert": {"width": 768, "heads": 12},
    "hf_vit": {"width": 768, "heads": 12},
    "hf_llama": {"width": 512, "hidden": 1536, "heads": 8, "kv_heads": 4, "vocab": 32000},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODELS)
def test_twelve_layers_in_four_stages(name: str, tmp_path: Path) -> None:
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
        shown = re.search(r"<!-- stage -->\n.*?```python\n(.*?)```", _readme(), re.DOTALL)
        assert shown is not None
        assert shown[1] == texts[2]


def _classes(text: str) -> list[ast.ClassDef]:
    return [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")
