"""The runtime against the single-process reference, with ranks as threads of this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import stage_of_block, write_artifact
from reference import Reference
from torch import Tensor, nn

from p2bw.runtime import compute, prepare
from p2bw.runtime.artifact import find_model_file
from p2bw.runtime.check import ScheduleError
from p2bw.runtime.compute import Compute
from p2bw.runtime.errors import MismatchError, UsageError
from p2bw.runtime.feed import Feed
from p2bw.runtime.job import Job
from p2bw.runtime.local import LocalTransport, Trained, train_in_threads
from p2bw.runtime.plan import read_plan
from p2bw.runtime.schedule import Pipeline
from p2bw.runtime.weights import Updater, Weights
from p2bw.runtime.worker import LossError, Worker

STEPS = 12


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the ranks have: with more, kernels may add in another order."""
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
    model = file.module.model(tied=not apart, **plan.model.settings).train()

    def step(model: nn.Module, item: Any, enter: Callable[[int], None]) -> Tensor:
        model.enter = lambda block: enter(stage_of_block(block, plan.depth))  # type: ignore[assignment]
        return file.call(model, *item)

    optimizer = file.optimizer((n, p) for n, p in model.named_parameters() if p.requires_grad)
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


@pytest.mark.parametrize(
    ("schedule", "depth", "m", "optimizer"),
    [
        *(
            ("2bw", 1, 2, "adamw"),
            ("2bw", 2, 2, "sgd"),
            ("2bw", 3, 4, "adamw"),
            ("2bw", 4, 4, "sgd"),
        ),
        *(("flush", 1, 3, "sgd"), ("flush", 3, 1, "sgd"), ("flush", 4, 5, "adamw")),
    ],
)
def test_equals_the_reference_bitwise(
    tmp_path: Path, schedule: str, depth: int, m: int, optimizer: str
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=depth, optimizer=optimizer)
    job = Job(artifact=artifact, steps=STEPS, seed=3, schedule=schedule, microbatches=m)
    assert differences(job, train_in_threads(job)) == {}


@pytest.mark.parametrize(
    ("schedule", "m", "optimizer"), [("2bw", 2, "sgd"), ("2bw", 3, "adamw"), ("flush", 3, "sgd")]
)
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


@pytest.mark.parametrize("recompute", [(1,), (0, 1, 2)])
def test_recomputation_changes_no_bit(tmp_path: Path, recompute: tuple[int, ...]) -> None:
    artifact = write_artifact(tmp_path / "a", depth=3, recompute=recompute, optimizer="adamw")
    job = Job(artifact=artifact, steps=STEPS, microbatches=4)
    assert differences(job, train_in_threads(job)) == {}


# Tests of the tests: with one thing broken, the comparison must fail.


def breaks(job: Job) -> bool:
    """Whether training goes wrong: other numbers, or autograd's own alarm."""
    try:
        return bool(differences(job, train_in_threads(job)))
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)


def use_the_newest_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(pipe: Pipeline, microbatch: int) -> int:
        return microbatch // pipe.microbatches

    monkeypatch.setattr(Pipeline, "version", newest)
    monkeypatch.setattr(prepare, "check", lambda pipeline: None)


def write_into_the_other_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Updater.update

    def wrong(self: Updater, batch: int, gradients: dict[str, Tensor]) -> None:
        update(self, batch + 1, gradients)

    monkeypatch.setattr(Updater, "update", wrong)


def keep_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "leaves", lambda self, version: self.sets[0])


def never_switch_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "use", lambda self, version: None)


def forget_the_other_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def wait(self) -> None:
            pass

    monkeypatch.setattr(LocalTransport, "reduce", lambda self, tensors: Nothing())


def forget_the_other_tied_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    share = Worker._share
    stage = 0

    def own(self: Worker, name: str) -> Tensor:
        return share(self, name) * (self.stage.index == stage)

    monkeypatch.setattr(Worker, "_share", own)


def draw_other_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run_again, seed = Compute._run_again, compute.seed_forward

    def wrong(self: Compute, number: int, *rest: Any) -> dict[str, Tensor]:
        monkeypatch.setattr(compute, "seed_forward", lambda *_: None)
        try:
            return run_again(self, number, *rest)
        finally:
            monkeypatch.setattr(compute, "seed_forward", seed)

    monkeypatch.setattr(Compute, "_run_again", wrong)


def update_buffers_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compute, "_plug_buffers", lambda self, buffers: None)


@pytest.mark.parametrize(
    "mutate",
    [
        use_the_newest_version,
        write_into_the_other_buffer,
        keep_one_buffer,
        never_switch_the_version,
        forget_the_other_replica,
        forget_the_other_tied_gradient,
        draw_other_numbers_again,
        update_buffers_twice,
    ],
)
def test_what_is_broken_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, width=2, recompute=(0, 1))
    job = Job(artifact=artifact, steps=4)
    assert not breaks(job)
    mutate(monkeypatch)
    assert breaks(job)


def test_the_schedule_check_notices_the_newest_version_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    check = prepare.check
    use_the_newest_version(monkeypatch)
    monkeypatch.setattr(prepare, "check", check)
    with pytest.raises(ScheduleError):
        train_in_threads(Job(artifact=artifact, steps=4))


def test_there_is_no_third_copy_of_the_weights(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    for schedule, copies in (("2bw", 2), ("flush", 1)):
        trained = train_in_threads(Job(artifact=artifact, steps=3, schedule=schedule))
        for worker in trained.workers:
            held = [p for leaves in worker.weights.sets for p in leaves.values()]
            held += [p for u in (worker.own, worker.shared) for p in u.parameters.values()]
            places = {p.untyped_storage().data_ptr() for p in held}
            assert len(places) == copies * len(worker.weights.names)
            assert all(p.grad is None for p in held)


def test_a_stage_never_holds_more_than_its_share_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: dict[int, int] = {}
    forward = Compute.forward

    def watch(self: Compute, *arguments: Any) -> dict[str, Tensor]:
        results = forward(self, *arguments)
        stage = self.stage.index
        peaks[stage] = max(peaks.get(stage, 0), len(self.in_flight))
        return results

    monkeypatch.setattr(Compute, "forward", watch)
    train_in_threads(Job(artifact=write_artifact(tmp_path / "a", depth=4), steps=3))
    assert peaks == {0: 4, 1: 3, 2: 2, 3: 1}


def test_a_stale_backward_raises_instead_of_being_wrong() -> None:
    module = nn.Linear(3, 3)
    versions = Weights(module, copies=2)
    updater = Updater(
        versions, versions.names, lambda p: torch.optim.SGD(p, lr=0.1), lambda optimizer: None
    )
    result = module(torch.ones(2, 3, requires_grad=True)).sum()
    gradients = {name: torch.ones_like(p) for name, p in module.named_parameters()}
    updater.update(0, gradients)  # writes the other set: harmless
    updater.update(1, gradients)  # writes the set that the forward has used
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    stage = artifact / "stages" / "stage_1.py"
    code = stage.read_text().replace(
        "        return loss",
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        loss = loss * (float('nan') if self.calls == 6 else 1)\n        return loss",
    )
    stage.write_text(code)
    with pytest.raises(LossError, match="nan at step 3, microbatch 1 of replica 0"):
        train_in_threads(Job(artifact=artifact, steps=5))


def test_an_edit_that_changes_a_message_is_refused(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    stage = artifact / "stages" / "stage_0.py"
    stage.write_text(stage.read_text().replace("return x,", "return x[:2],"))
    with pytest.raises(MismatchError, match=r"returned x as float32\[2, 8\], the plan has"):
        train_in_threads(Job(artifact=artifact, steps=1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("yield inputs(b), targets(b)", "ended after 1 microbatches"),
        ("while True: yield inputs(b - 1), targets(b - 1)", r"int64\[2, 5\].*int64\[3, 5\]"),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path: Path, data: str, message: str) -> None:
    def extend(text: str) -> str:
        return f"{text}\n\ndef data(b, seed):\n    {data}\n"

    artifact = write_artifact(tmp_path / "a", depth=2, edit=extend)
    with pytest.raises(UsageError, match=message):
        train_in_threads(Job(artifact=artifact, steps=1))


def test_data_that_draws_random_numbers_is_alike_on_all_stages(tmp_path: Path) -> None:
    """Tokens and labels are read on different stages, which draw different dropout masks."""

    def extend(text: str) -> str:
        return text + (
            "\n\ndef data(b, seed):\n    while True:\n        x = inputs(b)\n"
            "        yield x, (x[0].sum(1) % 11,)\n"
        )

    artifact = write_artifact(tmp_path / "a", depth=2, edit=extend)
    job = Job(artifact=artifact, steps=2)
    seen: dict[str, list[Tensor]] = {}
    for stage, name in enumerate(("tokens", "labels")):
        torch.manual_seed(stage)
        plan = read_plan(artifact)
        feed = Feed(plan, find_model_file(artifact), stage, 0, 0, torch.device("cpu"))
        seen[name] = [feed.microbatch(i)[0] for i in range(4)]
    for tokens, labels in zip(seen["tokens"], seen["labels"], strict=True):
        assert torch.equal(tokens.sum(1) % 11, labels)
    train_in_threads(job)
