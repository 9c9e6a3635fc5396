"""From an artifact to a worker for each of its ranks, and ranks as threads of one process."""

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from p2bw.runtime.artifact import copy_state, find_model_file, load_stage
from p2bw.runtime.check import check
from p2bw.runtime.feed import Feed
from p2bw.runtime.job import Job
from p2bw.runtime.local import Hub, LocalTransport
from p2bw.runtime.modelfile import ModelFile
from p2bw.runtime.plan import Plan, TensorSpec, read_plan
from p2bw.runtime.schedule import Channel, Flow, Pipeline, make_pipeline
from p2bw.runtime.transport import Transport
from p2bw.runtime.worker import Worker


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose files are read and whose schedule is proven."""

    job: Job
    plan: Plan
    file: ModelFile
    pipeline: Pipeline


def prepare(job: Job) -> Prepared:
    """Read and check all that needs no other rank."""
    plan = read_plan(job.artifact)
    pipeline = make_pipeline(
        plan, batches=job.steps, schedule=job.schedule, microbatches=job.microbatches
    )
    check(pipeline)
    return Prepared(job, plan, find_model_file(job.artifact, job.model), pipeline)


def initial_stage(prepared: Prepared, stage: int, device: torch.device) -> nn.Module:
    """A stage with the weights that the user's own code gives under the seed."""
    torch.manual_seed(prepared.job.seed)
    random.seed(prepared.job.seed)
    model = prepared.file.model()
    module = load_stage(prepared.job.artifact, stage)
    copy_state(model, module)
    return module.to(device)


def make_worker(
    prepared: Prepared,
    rank: int,
    module: nn.Module,
    device: torch.device,
    transport: Transport,
    on_update: Callable[[int, float], None],
    alone: AbstractContextManager[object] | None = None,
) -> Worker:
    """The worker of a rank; rank 0 calls `on_update(batch, loss)` after each update."""
    plan, file = prepared.plan, prepared.file
    stage, replica = plan.position(rank)
    return Worker(
        plan=plan,
        pipeline=prepared.pipeline,
        stage=stage,
        replica=replica,
        module=module,
        make_optimizer=file.optimizer,
        make_scheduler=file.scheduler,
        feed=Feed(plan, file, stage, replica, prepared.job.seed, device),
        transport=transport,
        seed=prepared.job.seed,
        device=device,
        on_update=on_update if rank == 0 else None,
        alone=alone,
    )


def channel_specs(prepared: Prepared, stage: int, module: nn.Module) -> dict[Channel, TensorSpec]:
    """What the channels from and to a stage carry."""
    plan = prepared.plan
    tensors = {t.spec.name: t.spec for s in plan.stages for t in s.sends}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for channel in prepared.pipeline.channels:
        if stage not in (channel.source, channel.target):
            continue
        if channel.flow is Flow.LOSS:
            spec = TensorSpec("loss", (), torch.float64)
        elif channel.flow is Flow.TIED:
            (tied,) = (t for t in plan.tied if t.names[0] == channel.tensor)
            parameter = next(parameters[name] for name in tied.names if name in parameters)
            spec = TensorSpec(channel.tensor, tuple(parameter.shape), parameter.dtype)
        else:
            spec = tensors[channel.tensor]
        found[channel] = spec
    return found


@dataclass(slots=True)
class Trained:
    """What a run in one process gives: losses by batch, and each rank's final state."""

    losses: list[float] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)

    def report(self, batch: int, loss: float) -> None:
        self.losses.append(loss)


def train_in_threads(job: Job, device: torch.device | None = None) -> Trained:
    """Run all ranks of a job as threads of this process, over the in-process transport."""
    prepared = prepare(job)
    plan = prepared.plan
    device = device or torch.device("cpu")
    hub, trained, alone = Hub(), Trained(), threading.RLock()
    for rank in range(plan.ranks):
        stage, replica = plan.position(rank)
        module = initial_stage(prepared, stage, device)
        transport = LocalTransport(hub, stage, replica, plan.width)
        worker = make_worker(prepared, rank, module, device, transport, trained.report, alone)
        trained.workers.append(worker)
    count = torch.get_num_threads()
    threads = [threading.Thread(target=_run, args=(w, hub, count)) for w in trained.workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hub.failure is not None:
        raise hub.failure
    trained.states = [worker.final_state() for worker in trained.workers]
    return trained


def _run(worker: Worker, hub: Hub, threads: int) -> None:
    torch.set_num_threads(threads)  # new threads do not follow the main one
    try:
        worker.run()
    except BaseException as error:  # whatever it is: the caller raises it, the others stop
        hub.fail(error)
