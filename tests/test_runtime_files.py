"""What the runtime reads and refuses: plans, stage files, model files; what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import write_artifact
from torch import nn

from p2bw.contract.errors import InputFileError, MismatchError, ModelError, UsageError
from p2bw.contract.plan import read_plan
from p2bw.contract.stages import find_model_file, load_stage
from p2bw.modelfile.initial import copy_state
from p2bw.runtime.transport import _order

Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan.pop("stages"), "stages should be tuple, is None"),
        (lambda plan: plan.update(schema=2), "schema 2 is not 1"),
        (lambda plan: plan.update(depth="2"), "depth should be int, is '2'"),
        (lambda plan: plan.update(depth=3), "stages are not 0 to 2"),
        (lambda plan: plan.update(width=True), "width should be int, is True"),
        (lambda plan: plan.update(width=0), "not every stage has 0 devices"),
        (lambda plan: plan.update(width=2), "not every stage has 2 devices"),
        (lambda plan: plan["stages"][1].update(devices=[0]), "devices are not the ranks 0 to 1"),
        (
            lambda plan: plan["stages"][1]["results"].clear(),
            "not exactly one stage returns the loss",
        ),
        (
            lambda plan: plan["stages"][1]["receives"].pop(),
            "what stage 0 sends is not what stage 1 receives",
        ),
        (lambda plan: plan["stages"][0]["results"].remove("x0t"), "results lack x0t"),
        (lambda plan: plan["stages"][1]["arguments"].reverse(), "are not its inputs and receives"),
        (
            lambda plan: plan["stages"][0]["sends"][0].update(dtype="float33"),
            "sends.0.dtype should be dtype, is 'float33'",
        ),
        (
            lambda plan: plan["stages"][0]["sends"][0].update(shape=[-1]),
            r"sends\.0\.shape\.0 should be int, is -1",
        ),
        (lambda plan: plan["stages"].append(7), r"stages\.2 should be Stage, is 7"),
    ],
)
def test_a_damaged_plan_is_refused_by_the_name_of_its_field(
    tmp_path: Path, edit: Edit, message: str
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    plan = json.loads((artifact / "plan.json").read_text())
    edit(plan)
    (artifact / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputFileError, match=message):
        read_plan(artifact)


def test_a_folder_without_a_plan_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="is no artifact"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputFileError, match="is not JSON"):
        read_plan(tmp_path)


def test_the_model_file_is_found_and_must_be_the_one_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    copy = artifact / "source" / "handmade.py"
    monkeypatch.chdir(tmp_path)
    assert find_model_file(artifact).path == copy
    here = tmp_path / "handmade.py"
    here.write_bytes(copy.read_bytes())
    assert find_model_file(artifact).path == Path("handmade.py")
    here.write_text("# another one\n")
    assert find_model_file(artifact).path == copy
    with pytest.raises(MismatchError, match="is not the file that"):
        find_model_file(artifact, here)
    with pytest.raises(UsageError, match="no such file"):
        find_model_file(artifact, tmp_path / "nowhere.py")
    here.unlink()
    copy.unlink()
    with pytest.raises(MismatchError, match="give its place with --model"):
        find_model_file(artifact)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Stage(:\n", r"stages/stage_0.py:1: SyntaxError"),
        ("import torch\nx = 1 / 0\n", r"stages/stage_0.py:2: ZeroDivisionError"),
        ("x = 1\n", "has no attribute 'Stage'"),
        ("class Stage: pass\n", r"Stage\(\) is no torch.nn.Module"),
    ],
)
def test_a_stage_file_that_cannot_be_loaded_names_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    path = artifact / "stages" / "stage_0.py"
    path.write_text(text)
    with pytest.raises(ModelError, match=message):
        load_stage(artifact, 0)
    path.unlink()
    with pytest.raises(InputFileError, match=r"has no stages/stage_0.py"):
        load_stage(artifact, 0)


def test_an_edit_of_a_stage_file_counts_at_once_and_leaves_no_cache(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    path = artifact / "stages" / "stage_0.py"
    assert not hasattr(load_stage(artifact, 0), "edited")
    path.write_text(path.read_text() + "\n\nStage.edited = True\n")
    assert load_stage(artifact, 0).edited
    assert sorted(p.name for p in path.parent.iterdir()) == ["stage_0.py", "stage_1.py"]


def test_a_stage_gets_the_model_s_state_by_name() -> None:
    model, stage = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    model[0].running_mean.fill_(3)
    model[0].weight.requires_grad_(False)
    model.register_buffer("own", torch.ones(2), persistent=False)
    stage.register_buffer("own", torch.zeros(2), persistent=False)
    stage.register_buffer("constant", torch.ones(1), persistent=False)  # of the stage code itself
    copy_state(model, stage)
    assert stage[0].running_mean.tolist() == [3] * 4
    assert not stage[0].weight.requires_grad
    assert stage.own.tolist() == [1, 1]
    with pytest.raises(MismatchError, match=r"'1\.weight', which the model has not"):
        copy_state(model, nn.Sequential(nn.Identity(), nn.Linear(2, 2)))
    with pytest.raises(
        MismatchError, match=r"\[4\] in the model, torch.float32 \[5\] in the stage"
    ):
        copy_state(model, nn.Sequential(nn.BatchNorm1d(5)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(2, 3, 4),
        torch.rand(2, 3, 4).permute(2, 0, 1),
        torch.rand(2, 5, 4, 4).to(memory_format=torch.channels_last),
        torch.rand(3, 1).expand(3, 4),
        torch.rand(4, 6)[:, ::2],
        torch.rand(1, 1, 5).transpose(0, 2),
        torch.tensor(1.5),
    ],
)
def test_messages_keep_the_layout_of_dense_tensors(tensor: torch.Tensor) -> None:
    order = _order(tensor)
    packed = tensor.permute(order).contiguous()
    inverse = sorted(range(len(order)), key=order.__getitem__)
    arrived = packed.reshape(-1).view(packed.shape).permute(inverse)
    assert torch.equal(arrived, tensor)
    if tensor.numel() * tensor.itemsize == tensor.untyped_storage().size():
        sizes = tensor.shape
        assert [s for s, n in zip(arrived.stride(), sizes, strict=True) if n > 1] == [
            s for s, n in zip(tensor.stride(), sizes, strict=True) if n > 1
        ]
