"""Golden graphs: the plan and the stage code of every example, the same on every machine."""

import json
import re
from collections.abc import Callable

import pytest
import torch
from corpus import CORPUS
from torch.torch_version import TorchVersion

from p2bw.compiler.driver import Compiled
from p2bw.compiler.plan import Plan

Golden = Callable[[str, str], None]


def _versionless(text: str) -> str:
    """Versions and the hash of the model file are no decisions of the plan."""
    return re.sub(r'("(?:p2bw_version|torch_version|sha256)"): "[^"]*"', r'\1: "*"', text)


def _summary(plan: Plan) -> str:
    """What a reader of a diff wants first: blocks to stages, cuts, bytes, memory, proof."""
    proof = plan.optimality
    lines = [
        f"{plan.model.name}: {plan.depth} stages x {plan.width}, microbatch {plan.microbatch}, "
        f"{plan.microbatches_per_update} per update, {plan.schedule}",
        f"period {plan.period_s * 1e6:.3f} us, {plan.samples_per_s:.3f} samples/s",
        f"proof {proof.status}, gap {proof.gap:.4f}, {proof.search_space}",
    ]
    for stage in plan.stages:
        memory = stage.memory
        lines += [
            "",
            f"stage {stage.index}{' (recomputes)' if stage.recompute else ''}: "
            f"{stage.parameters} parameters, {stage.compute_s.total * 1e6:.3f} us, "
            f"memory {memory.total} of {memory.limit}",
            f"    weights {memory.weights} gradients {memory.gradients} optimizer "
            f"{memory.optimizer} stash {memory.stash} buffers {memory.buffers}",
            *(f"    {block}" for block in stage.blocks),
            *(
                f"    -> stage {send.peer}: {send.tensor} {send.dtype}{list(send.shape)} "
                f"{send.bytes} bytes{'' if send.gradient else ', no gradient'}"
                for send in stage.sends
            ),
        ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [architecture.name for architecture in CORPUS])
def test_plan(name: str, compiled: Callable[[str, int], Compiled], golden: Golden) -> None:
    made = compiled(name, 2)
    if made.plan.opaque and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("what an opaque module costs is counted as this torch runs it")
    golden(f"{name}/plan.txt", _summary(made.plan))
    golden(f"{name}/plan.json", _versionless((made.artifact / "plan.json").read_text()))


@pytest.mark.parametrize("name", [architecture.name for architecture in CORPUS])
def test_stage_code(name: str, compiled: Callable[[str, int], Compiled], golden: Golden) -> None:
    made = compiled(name, 2)
    for path in sorted((made.artifact / "stages").iterdir()):
        golden(f"{name}/{path.name}", path.read_text())


def test_a_plan_survives_its_json(compiled: Callable[[str, int], Compiled]) -> None:
    plan = compiled("gpt", 2).plan
    assert Plan.model_validate_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["schema"] == 1
