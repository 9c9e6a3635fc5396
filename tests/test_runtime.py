"""The runtime against the single-process reference, with ranks as threads of this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import stage_of_block, write_artifact
from reference import Reference
from torch import Tensor, nn

from p2bw.runtime.artifact import find_model_file
from p2bw.runtime.plan import read_plan
from p2bw.runtime.train import Job, Trained, train_in_threads

STEPS = 12


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(job: Job) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final state of the handmade model, trained whole."""
    plan = read_plan(job.artifact)
    file = find_model_file(job.artifact)
    torch.manual_seed(job.seed)
    apart = plan.depth > 1  # then a stage's part of the tied gradient is summed for itself
    model = file.module.model(tied=not apart, **plan.settings).train()

    def step(model: nn.Module, item: Any, enter: Callable[[int], None]) -> Tensor:
        model.enter = lambda block: enter(stage_of_block(block, plan.depth))  # type: ignore[assignment]
        return file.call(model, *item)

    optimizer = file.optimizer([p for p in model.parameters() if p.requires_grad])
    loop = Reference(
        model=model,
        step=step,
        items=file.data(plan.microbatch, job.seed),
        optimizer=optimizer,
        scheduler=file.scheduler(optimizer),
        depth=plan.depth,
        width=plan.width,
        microbatches=job.microbatches or plan.microbatches_per_update,
        seed=job.seed,
        delay=0 if job.schedule == "flush" else 1,
        tied=[["wte.weight", "head.weight"]] if apart else [],
    )
    return loop.train(job.steps), model.state_dict()


def differences(job: Job, trained: Trained) -> dict[str, float]:
    """What differs from the reference: the largest difference relative to the largest entry."""
    losses, state = reference(job)
    found = {}
    if trained.losses != losses:
        found["losses"] = max(
            abs(a - b) / abs(b) for a, b in zip(trained.losses, losses, strict=True)
        )
    for index, rank_state in enumerate(trained.states):
        if index % read_plan(job.artifact).width:
            continue  # running statistics are replica 0's
        for name, tensor in rank_state.items():
            if not torch.equal(tensor, state[name]):
                error = (tensor - state[name]).abs().max() / state[name].abs().max()
                found[f"{name} of rank {index}"] = error.item()
    assert {n for s in trained.states for n in s} == state.keys()
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("schedule", "depth", "m"),
    [
        *[("2bw", d, m) for d in (1, 2, 3, 4) for m in (d, d + 1, 2 * d)],
        *[("flush", d, m) for d, m in ((1, 2), (2, 1), (3, 3), (4, 5))],
    ],
)
def test_equals_the_reference_bitwise(
    tmp_path: Path, schedule: str, depth: int, m: int, optimizer: str
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=depth, optimizer=optimizer)
    job = Job(artifact=artifact, steps=STEPS, seed=3, schedule=schedule, microbatches=m)
    assert differences(job, train_in_threads(job)) == {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("schedule", "m"), [("2bw", 2), ("2bw", 3), ("2bw", 4), ("flush", 3)])
def test_replicas_equal_the_reference_bitwise(
    tmp_path: Path, schedule: str, m: int, optimizer: str
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, width=2, optimizer=optimizer)
    job = Job(artifact=artifact, steps=STEPS, schedule=schedule, microbatches=m)
    trained = train_in_threads(job)
    assert differences(job, trained) == {}
    for name in trained.workers[0].weights.names:
        assert torch.equal(trained.states[0][name], trained.states[1][name])
    assert torch.equal(trained.states[0]["wte.weight"], trained.states[3]["head.weight"])


@pytest.mark.parametrize("recompute", [(0,), (1, 2), (0, 1, 2)])
def test_recomputation_changes_no_bit(tmp_path: Path, recompute: tuple[int, ...]) -> None:
    artifact = write_artifact(tmp_path / "a", depth=3, recompute=recompute, optimizer="adamw")
    job = Job(artifact=artifact, steps=STEPS, microbatches=4)
    assert differences(job, train_in_threads(job)) == {}
