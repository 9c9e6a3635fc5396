"""Every architecture, cut into 2 and 4 stages, against eager PyTorch: loss and every gradient."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import CORPUS

from p2bw.compiler.driver import Compiled
from p2bw.compiler.verification import TOLERANCE
from p2bw.compiler.verify import verify
from p2bw.contract.errors import MismatchError

# T5's embedding serves the encoder, the decoder and the head: three terms on two stages, added
# stage by stage here and term by term in eager, which rounds differently.
ANOTHER_ORDER = {("hf_t5", 2), ("hf_t5", 4)}


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("name", [architecture.name for architecture in CORPUS])
def test_the_stages_compute_what_the_model_computes(
    name: str, depth: int, compiled: Callable[[str, int], Compiled]
) -> None:
    result = verify(compiled(name, depth).artifact)
    assert result.problems == ()
    assert result.ok
    assert result.loss_bitwise
    assert result.compared > 0
    if (name, depth) in ANOTHER_ORDER:
        assert all(d.reason and d.max_rel <= TOLERANCE for d in result.differences)
    else:
        assert result.bitwise == result.compared


@pytest.mark.parametrize(
    ("edit", "says"),
    [("return None", "must return 1 tensors"), ("return labels + nonsense", "stage_1.py fails")],
)
def test_an_edit_that_cannot_work_is_said_to_be_one(
    edit: str, says: str, compiled: Callable[[str, int], Compiled], tmp_path: Path
) -> None:
    artifact = tmp_path / "mlp"
    shutil.copytree(compiled("mlp", 2).artifact, artifact)
    stage = artifact / "stages" / "stage_1.py"
    head, _, _ = stage.read_text().rpartition("return ")
    stage.write_text(f"{head}{edit}\n")
    with pytest.raises(MismatchError, match=says):
        verify(artifact)
