"""The runtime against the single-process reference, with ranks as threads of this process."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import stage_of_block, write_artifact
from reference import Reference
from torch import Tensor, nn

from p2bw.contract.check import ScheduleError
from p2bw.contract.checkpoint import StageState
from p2bw.contract.errors import MismatchError, UsageError
from p2bw.contract.job import Job
from p2bw.contract.plan import read_plan
from p2bw.contract.schedule import Action, Flow, Pipeline
from p2bw.contract.stages import find_model_file
from p2bw.runtime import compute, prepare, weights
from p2bw.runtime.compute import Compute
from p2bw.runtime.feed import Feed
from p2bw.runtime.local import LocalTransport, Trained, train_in_threads
from p2bw.runtime.weights import Updater, Weights
from p2bw.runtime.worker import Events, LossError, Start, Update, Worker

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12


def reference_of(job: Job, kind: type[Reference] = Reference) -> Reference:
    """The handmade model, to be trained whole."""
    plan = read_plan(job.artifact)
    file = find_model_file(job.artifact)
    torch.manual_seed(job.seed)
    # Over several stages, a stage's part of a tied gradient is summed for itself.
    apart = plan.depth > 1 and bool(plan.tied)
    settings = {**plan.model.settings, "tied": not apart and bool(plan.tied)}
    model = file.module.model(**settings).train()

    def step(model: nn.Module, item: Any, enter: Callable[[int], None]) -> Tensor:
        model.enter = lambda block: enter(stage_of_block(block, plan.depth))  # type: ignore[assignment]
        return file.call(model, *item)

    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masters = {
        name: nn.Parameter(parameter.detach().float())
        for name, parameter in trainable.items()
        if parameter.dtype != torch.float32
    }
    optimizer = file.optimizer((trainable | masters).items())
    schedule = job.schedule or plan.schedule
    return kind(
        model=model,
        step=step,
        items=file.data(plan.microbatch, job.seed),
        optimizer=optimizer,
        scheduler=file.scheduler(optimizer),
        depth=plan.depth,
        width=plan.width,
        microbatches=job.microbatches or plan.microbatches_per_update,
        seed=job.seed,
        delay=1 if schedule == "2bw" else 0,
        tied=[["wte.weight", "head.weight"]] if apart else [],
        clip_norm=job.clip_norm,
        masters=masters,
    )


def reference(job: Job) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final state of the handmade model, trained whole."""
    loop = reference_of(job)
    return loop.train(job.steps), loop.model.state_dict()


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
@pytest.mark.parametrize("extra", [0, 1])
def test_equals_the_reference_bitwise(
    tmp_path: Path, schedule: str, depth: int, m: int, optimizer: str, extra: int
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=depth, optimizer=optimizer, extra=extra)
    job = Job(artifact=artifact, steps=STEPS, seed=3, schedule=schedule, microbatches=m)
    assert differences(job, train_in_threads(job)) == {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_updates_part_by_part_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setattr(weights, "TOGETHER", 600)  # bytes
    artifact = write_artifact(tmp_path / "a", depth=2, optimizer=optimizer)
    job = Job(artifact=artifact, steps=STEPS, schedule="2bw", microbatches=2, clip_norm=1.0)
    trained = train_in_threads(job)
    assert differences(job, trained) == {}
    for worker in trained.workers:
        sizes = [[worker.own.parameters[n].nbytes for n in p] for p in worker.own.parts]
        assert len(sizes) > 2
        assert any(len(part) > 1 for part in sizes)
        assert all(len(part) == 1 or sum(part) <= 600 for part in sizes)


@pytest.mark.parametrize(
    ("schedule", "m", "optimizer"), [("2bw", 2, "sgd"), ("2bw", 3, "adamw"), ("flush", 3, "sgd")]
)
@pytest.mark.parametrize("extra", [0, 1])
def test_replicas_equal_the_reference_bitwise(
    tmp_path: Path, schedule: str, m: int, optimizer: str, extra: int
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, width=2, optimizer=optimizer, extra=extra)
    job = Job(artifact=artifact, steps=STEPS, schedule=schedule, microbatches=m)
    trained = train_in_threads(job)
    assert differences(job, trained) == {}
    for name in trained.workers[0].weights.names:
        assert torch.equal(trained.states[0][name], trained.states[1][name])
    assert torch.equal(trained.states[0]["wte.weight"], trained.states[3]["head.weight"])


@pytest.mark.parametrize("recompute", [(1,), (0, 1, 2)])
def test_recomputation_changes_no_bit(tmp_path: Path, recompute: tuple[int, ...]) -> None:
    artifact = write_artifact(
        tmp_path / "a", depth=3, recompute=recompute, optimizer="adamw", extra=1
    )
    job = Job(artifact=artifact, steps=STEPS, microbatches=4)
    assert differences(job, train_in_threads(job)) == {}


# Everything at once: stages, m / stages, optimizer, clipping, ties, recomputation, autocast.
MATRIX = list(
    itertools.product(
        (2, 3, 4),
        (1, 2),
        ("sgd", "adamw"),
        (None, 0.05),
        (True, False),
        (False, True),
        (False, True),
    )
)
SOME = MATRIX[::29]


@pytest.mark.parametrize(
    "matrix",
    [SOME, pytest.param(MATRIX, marks=pytest.mark.slow)],
    ids=["some", "every"],
)
def test_the_matrix_of_exactness(tmp_path: Path, matrix: list[tuple[Any, ...]]) -> None:
    for number, (depth, times, optimizer, clip, tied, recompute, autocast) in enumerate(matrix):
        artifact = write_artifact(
            tmp_path / str(number),
            depth=depth,
            microbatches=depth * times,
            optimizer=optimizer,
            tied=tied,
            autocast=autocast,
            recompute=range(depth) if recompute else (),
            extra=number // 2 % 2,
        )
        job = Job(artifact=artifact, steps=5, seed=number, clip_norm=clip)
        assert differences(job, train_in_threads(job)) == {}, matrix[number]


@pytest.mark.parametrize(("schedule", "m"), [("2bw", 2), ("2bw", 5), ("flush", 3), ("gpipe", 2)])
@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_clipped_norm_is_that_of_the_whole_batch(
    tmp_path: Path, schedule: str, m: int, width: int
) -> None:
    """To the bit, over all stages and replicas; some batches are clipped, some not."""
    artifact = write_artifact(tmp_path / "a", depth=2, width=width, microbatches=m)
    job = Job(artifact=artifact, steps=8, schedule=schedule, clip_norm=3.3)
    trained, loop = train_in_threads(job), reference_of(job)
    loop.train(job.steps)
    assert trained.norms == loop.norms
    assert max(loop.norms) > 3.3
    assert differences(job, trained) == {}


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
@pytest.mark.parametrize(("depth", "clip"), [(1, None), (2, 0.3), (3, None), (4, 0.3)])
def test_weights_in_16_bits_have_masters_in_32(
    tmp_path: Path, depth: int, clip: float | None, optimizer: str
) -> None:
    artifact = write_artifact(
        tmp_path / "a", depth=depth, optimizer=optimizer, dtype="bfloat16", microbatches=4
    )
    job = Job(artifact=artifact, steps=6, clip_norm=clip)
    trained = train_in_threads(job)
    assert differences(job, trained) == {}
    for worker in trained.workers:
        parameters = {**worker.own.parameters, **worker.shared.parameters}
        assert {p.dtype for p in parameters.values()} == {torch.float32}


class Stashing(Reference):
    """PipeDream: stage k runs microbatch i on the weights of its update floor((i - ahead) / m)."""

    history: list[dict[str, Tensor]]

    def train(self, steps: int) -> list[float]:
        self.history = [self.weights()]
        losses = []
        for batch in range(steps):
            sums: dict[str, dict[int, Tensor]] = {}
            terms = []
            for i in range(batch * self.microbatches, (batch + 1) * self.microbatches):
                versions = {n: self.version(n, i) for n, _ in self.model.named_parameters()}
                self.load({n: self.history[v][n] for n, v in versions.items()})
                loss = self.step(self.model, next(self.items), self.generators(i))
                loss.backward(torch.full_like(loss, 1 / self.microbatches))
                terms.append(loss.detach().double())
                for name, parameter in self.model.named_parameters():
                    if parameter.grad is not None:
                        known = sums.setdefault(name, {})
                        gradient, parameter.grad = parameter.grad, None
                        version = versions[name]
                        known[version] = known[version] + gradient if version in known else gradient
            losses.append((torch.stack(terms).sum() / self.microbatches).item())
            for name, by_version in sums.items():
                first, *rest = (by_version[v] for v in sorted(by_version))
                self.model.get_parameter(name).grad = sum(rest, start=first)
            self.load(self.history[-1])
            self.update()
            self.history.append(self.weights())
        return losses

    def version(self, name: str, microbatch: int) -> int:
        block = name.split(".")[1] if name.startswith("h.") else ("0" if "wte" in name else "3")
        ahead = self.depth - 1 - stage_of_block(int(block), self.depth)
        return max(microbatch - ahead, 0) // self.microbatches


@pytest.mark.parametrize(("depth", "m"), [(1, 1), (2, 1), (3, 1), (4, 2), (4, 3), (2, 5)])
def test_stash_keeps_a_version_for_each_microbatch_in_flight(
    tmp_path: Path, depth: int, m: int
) -> None:
    artifact = write_artifact(
        tmp_path / "a", depth=depth, microbatches=m, schedule="stash", tied=False
    )
    job = Job(artifact=artifact, steps=9)
    trained, loop = train_in_threads(job), reference_of(job, Stashing)
    assert trained.losses == loop.train(job.steps)
    for state in trained.states:
        for name, tensor in state.items():
            assert torch.equal(tensor, loop.model.state_dict()[name]), name
    copies = [len(worker.weights.sets) for worker in trained.workers]
    assert copies == [-(-(depth - 1 - k) // m) + 1 for k in range(depth)]


@pytest.mark.parametrize(
    ("schedule", "width", "clip", "dtype"),
    [
        ("2bw", 2, 0.3, "float32"),
        ("stash", 1, None, "float32"),
        pytest.param("2bw", 1, None, "float32", marks=pytest.mark.slow),
        pytest.param("2bw", 1, 0.3, "bfloat16", marks=pytest.mark.slow),
        pytest.param("flush", 1, 0.3, "float32", marks=pytest.mark.slow),
        pytest.param("gpipe", 2, None, "float32", marks=pytest.mark.slow),
    ],
)
def test_a_state_taken_while_training_goes_on_is_enough_to_go_on(
    tmp_path: Path, schedule: str, width: int, clip: float | None, dtype: str
) -> None:
    """Without a drain: forwards of the next batch have run when the state is taken."""
    artifact = write_artifact(
        tmp_path / "a",
        depth=3,
        width=width,
        optimizer="adamw",
        schedule=schedule,
        dtype=dtype,
        microbatches=4,
        tied=schedule != "stash",
        recompute=(1,),
        extra=1,
    )
    job = Job(artifact=artifact, steps=7, clip_norm=clip)
    keep: dict[int, Keeping] = {rank: Keeping(3) for rank in range(3 * width)}
    whole = train_in_threads(job, events=keep.__getitem__)
    items = 3 * 4 * width
    starts = [Start(keep[rank].state, 3, items) for rank in keep]
    rest = train_in_threads(job, starts=starts)
    assert keep[0].losses[3:] == rest.losses
    for one, other in zip(whole.states, rest.states, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("lost", ["previous/", "buffers/", "optimizer/", "group", "items"])
def test_what_a_state_lacks_is_missed(tmp_path: Path, lost: str) -> None:
    """A test of the test above: it would notice if one of these were not kept."""
    artifact = write_artifact(tmp_path / "a", depth=2)
    job = Job(artifact=artifact, steps=6)
    keep = {rank: Keeping(3) for rank in range(2)}
    whole = train_in_threads(job, events=keep.__getitem__)
    starts = []
    for rank in range(2):
        state = keep[rank].state
        values = {name: {"state": v["state"], "group": {}} for name, v in state.values.items()}
        cut = StageState(
            {name: t for name, t in state.tensors.items() if not name.startswith(lost)},
            values if lost == "group" else state.values,
        )
        starts.append(Start(cut, 3, 0 if lost == "items" else 6))
    rest = train_in_threads(job, starts=starts)
    alike = [
        torch.equal(one[name], other[name])
        for one, other in zip(whole.states, rest.states, strict=True)
        for name in one
    ]
    # The hyperparameters follow from the schedule of the learning rate, which is replayed.
    assert all(alike) == (lost == "group")


class Keeping(Events):
    """Keeps a copy of the state after some step, and the losses."""

    def __init__(self, step: int) -> None:
        self.kept = step
        self.state = StageState()
        self.losses: list[float] = []

    def wants(self, step: int) -> bool:
        return step == self.kept

    def checkpoint(self, step: int, state: StageState) -> None:
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        self.state = StageState(tensors, json.loads(json.dumps(state.values)))

    def update(self, update: Update) -> None:
        self.losses.append(update.loss)


@pytest.mark.parametrize("schedule", ["2bw", "flush", "gpipe"])
def test_a_run_that_is_stopped_early_is_a_shorter_run(tmp_path: Path, schedule: str) -> None:
    class Stopping(Keeping):
        def allows(self, batch: int) -> bool:
            return batch < 3

    artifact = write_artifact(tmp_path / "a", depth=3)
    job = Job(artifact=artifact, steps=50, schedule=schedule)
    stopping = Stopping(-1)
    trained = train_in_threads(job, events=lambda rank: stopping)
    assert [worker.step for worker in trained.workers] == [3] * 3
    shorter = Trained(losses=stopping.losses, states=trained.states)
    assert differences(replace(job, steps=3), shorter) == {}


# Tests of the tests: with one thing broken, the comparison must fail.


def breaks(job: Job) -> bool:
    """Whether training goes wrong: other numbers, autograd's own alarm, a batch not closed yet."""
    try:
        return bool(differences(job, train_in_threads(job)))
    except KeyError:
        return True
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)


def use_the_newest_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def newest(pipe: Pipeline, stage: int, microbatch: int) -> int:
        return microbatch // pipe.microbatches

    monkeypatch.setattr(Pipeline, "version", newest)
    monkeypatch.setattr(prepare, "check", lambda pipeline: None)


def write_into_the_other_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Updater.update

    def wrong(self: Updater, batch: int, *rest: Any) -> None:
        update(self, batch + 1, *rest)

    monkeypatch.setattr(Updater, "update", wrong)


def keep_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "leaves", lambda self, version: self.sets[0])


def never_switch_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "use", lambda self, version: None)


def forget_the_other_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalTransport, "reduce", lambda self, tensors: lambda: None)


def forget_the_other_tied_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Worker, tensors: list[str]) -> None:
        for tensor in tensors:
            for channel in self.inbound[Flow.TIED]:
                self._take(channel)
            self.sums[self.tied[tensor]] = self.shares.pop(tensor)

    monkeypatch.setattr(Worker, "_sum", own)


def clip_by_the_norm_of_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Worker._norm

    def own(self: Worker, action: Action) -> None:
        norm(self, action)
        for channel in self.outbound[Flow.NORMS]:
            self.leaving[channel] = self.no_norms.clone()

    monkeypatch.setattr(Worker, "_norm", own)


def clip_by_the_norm_before(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Worker._norm
    norms: dict[int, Tensor | None] = {}

    def stale(self: Worker, action: Action) -> None:
        norm(self, action)
        before, norms[self.rank] = norms.get(self.rank), self.norm
        self.norm = self.norm if before is None else before
        for channel in self.outbound[Flow.NORM]:
            self.leaving[channel] = self.norm

    monkeypatch.setattr(Worker, "_norm", stale)


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
        clip_by_the_norm_of_one_stage,
        clip_by_the_norm_before,
        draw_other_numbers_again,
        update_buffers_twice,
    ],
)
def test_what_is_broken_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2, width=2, recompute=(0, 1))
    job = Job(artifact=artifact, steps=4, clip_norm=0.2)
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
    for extra, most in ((0, [4, 3, 2, 1]), (1, [5, 4, 3, 1])):
        artifact = write_artifact(tmp_path / str(extra), depth=4, extra=extra)
        train_in_threads(Job(artifact=artifact, steps=3))
        assert [peaks[stage] for stage in range(4)] == most


def test_a_stale_backward_raises_instead_of_being_wrong() -> None:
    module = nn.Linear(3, 3)
    versions = Weights(module, copies=2)
    updater = Updater(
        versions,
        versions.names,
        lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        lambda optimizer: None,
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
        feed = Feed(plan, find_model_file(artifact), stage, 0, torch.device("cpu"))
        seen[name] = [tensor for i in range(4) for tensor in feed.microbatch(i).values()]
    for tokens, labels in zip(seen["tokens"], seen["labels"], strict=True):
        assert torch.equal(tokens.sum(1) % 11, labels)
    train_in_threads(job)
