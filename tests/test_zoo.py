"""The table of models in the README: each is compiled, cut in three stages and verified.

`pytest -m slow tests/test_zoo.py --update-goldens` writes docs/models.md and the README's lines.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from corpus import CORPUS, ROOT
from flops import count_anywhere

from p2bw.compiler.driver import Compiled, compile_model
from p2bw.compiler.verify import verify
from p2bw.contract.errors import ModelError
from p2bw.contract.stages import find_model_file

DEPTH, MICROBATCH = 3, 2
ZOO = ROOT / "tests" / "zoo.py"
DETR = ROOT / "tests" / "detr.py"
PAGE = ROOT / "docs" / "models.md"
KINDS = {
    "causal": "language",
    "plain": "language",
    "masked": "encoder",
    "seq2seq": "encoder-decoder",
    "speech": "speech",
    "audio": "audio",
    "picture": "vision",
    "pair": "image and text",
}
HEAD = f"""# Models

Each of these is traced, cut in {DEPTH} stages and verified against the model as it is: the loss,
and the gradient of every parameter. `pytest -m slow tests/test_zoo.py` does it; sizes are small and
weights random. "Bitwise": not one bit differs. "Opaque": nor does here, and modules that cannot be
traced are called as they are. "Sums": the last bits of some gradients do, for the
reason that `p2bw verify` gives, and so much relative to the largest entry. "Tracing": the model
takes another way when it is traced, with other rounding, and the stages compute to the bit what the
traced model does before it is cut. A Hugging Face Llama makes its causal mask then, where eager
PyTorch looks at the positions, sees no sequences that are packed and asks for `is_causal`. The
files named are in `examples/`, the DETR-like one in `tests/`, the others are models of transformers
5.

A module that is not traced is run by itself once, to count what it costs. Where that says little
(a router that prefers some experts), declare the costs of a call, per sample, as an option or in
`p2bw.toml`: `--opaque-cost 'h.*.moe:forward=2e9,backward=4e9,saved=65536'` (FLOPs, and bytes that
are kept for the backward).

| model | kind | result | bitwise | largest difference | why |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    kind: str
    status: str  # bitwise, opaque, sums, tracing or refused
    bitwise: str = ""
    largest: str = ""
    why: str = ""

    def __str__(self) -> str:
        cells = (self.name, self.kind, self.status, self.bitwise, self.largest, self.why)
        return f"| {' | '.join(cells)} |"


def judge(name: str, kind: str, path: Path, out: Path, **options: object) -> Row:
    """Compile and verify a model; an error that has no message of its own is a failure."""
    given = {"gpus": DEPTH, "depth": DEPTH, "microbatch": MICROBATCH, "device": "cpu", "out": out}
    try:
        compiled = compile_model(path, **{**given, **options})
    except ModelError as error:
        return Row(name, kind, "refused", why=re.sub(r"\s+", " ", str(error).splitlines()[0]))
    check_flops(compiled)
    found = verify(compiled.artifact)
    assert found.ok, (name, found.problems)
    bitwise = f"{found.bitwise} of {found.compared}"
    if found.loss_bitwise and found.bitwise == found.compared:
        opaque = [
            f"{spec.module} ({spec.type.rpartition('.')[2]})" for spec in compiled.plan.opaque
        ]
        if opaque:
            return Row(name, kind, "opaque", bitwise, why=f"not traced: {', '.join(opaque)}")
        return Row(name, kind, "bitwise", bitwise)
    if found.tracing:
        return Row(name, kind, "tracing", bitwise, "below 1e-6", found.tracing.operation)
    reasons = sorted({difference.reason for difference in found.differences})
    largest = "below 1e-7" if found.max_rel < 1e-7 else "below 1e-6"  # which verify demands
    return Row(name, kind, "sums", bitwise, largest, "; ".join(reasons))


def check_flops(compiled: Compiled) -> None:
    """Those of all stages together are those that torch counts in a step of the whole model."""
    plan = compiled.plan
    if plan.opaque:  # counted as it ran once, which may not be as it runs again
        return
    file = find_model_file(compiled.artifact)
    stages = plan.stages
    planned = sum(s.flops_forward for s in stages), sum(s.flops_backward for s in stages)
    assert planned == count_anywhere(file, plan.microbatch), file.path


def rows(folder: Path) -> Iterator[Row]:
    for example in CORPUS:
        if not example.name.startswith("hf_"):
            options = {"factory": example.factory, "microbatch": example.batch}
            name = f"`{example.path.name}`"
            yield judge(name, "example", example.path, folder / example.name, **options)
    yield judge("DETR-like", "detection", DETR, folder / "detr")
    import zoo  # which takes seconds

    for name, (kind, _, _) in zoo.KINDS.items():
        settings = {"kind": name}
        yield judge(name, KINDS[kind], ZOO, folder / name, settings=settings)


def summary(found: list[Row]) -> str:
    """A few lines for the README."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in found:
        names[row.status, row.kind].append(row.name)
    lines = [
        "| kind | to the bit | with opaque modules | to 1e-7: the order of sums "
        "| to 1e-6: tracing | refused |",
        "|" + " --- |" * 6,
    ]
    for kind in dict.fromkeys(row.kind for row in found):
        statuses = ("bitwise", "opaque", "sums", "tracing", "refused")
        cells = [", ".join(names[status, kind]) for status in statuses]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", ["Mixtral", "Swin"])
def test_models_of_others_are_exact(name: str, tmp_path: Path) -> None:
    row = judge(name, "", ZOO, tmp_path / "a", settings={"kind": name})
    assert row.status == "bitwise", row
    stages = [path.read_text() for path in (tmp_path / "a" / "stages").iterdir()]
    for text in stages:  # each stands alone
        library = "import transformers.integrations.moe"
        assert ("torch.ops.transformers" in text) == (library in text)
        assert ("Imports only torch" in text) == (library not in text)
    assert any("torch.ops.transformers" in text for text in stages) == (name == "Mixtral")


def test_a_detector_is_exact_around_its_matching_loss(tmp_path: Path) -> None:
    row = judge("DETR", "", DETR, tmp_path / "a")
    assert row.status == "opaque", row
    assert row.why == "not traced: criterion (SetLoss)"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_model_is_as_the_table_says(
    tmp_path: Path, the_same: Callable[[Path, str], None]
) -> None:
    found = list(rows(tmp_path))
    good = [row for row in found if row.status == "bitwise"]
    assert len(good) >= 50
    the_same(PAGE, HEAD + "".join(f"{row}\n" for row in found))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = "<!-- models -->\n", "<!-- end of models -->"
    before, _, rest = readme.partition(begin)
    _, _, after = rest.partition(end)
    the_same(ROOT / "README.md", f"{before}{begin}{summary(found)}\n{end}{after}")
