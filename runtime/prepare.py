"""What a rank does before it meets the others: read, check and build."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from p2bw.contract.check import check
from p2bw.contract.errors import UsageError
from p2bw.contract.job import Job
from p2bw.contract.plan import Plan, TensorSpec, read_plan
from p2bw.contract.schedule import Channel, Flow, Pipeline, make_pipeline
from p2bw.contract.stages import find_model_file, load_stage
from p2bw.modelfile.initial import fill_stage, parameter_order
from p2bw.modelfile.load import ModelFile

Turn = Callable[[nn.Module], AbstractContextManager[str]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job whose files are read and whose schedule is proven."""

    job: Job
    plan: Plan
    file: ModelFile
    pipeline: Pipeline
    places: Mapping[str, int]  # of trainable parameters in the model's order; if they are clipped

    @property
    def norms(self) -> int:
        """How many norms the norm of all gradients is made of."""
        return max(self.places.values(), default=-1) + 1

    @property
    def clip_norm(self) -> float | None:
        return self.plan.clip_norm if self.job.clip_norm is None else self.job.clip_norm


def prepare(job: Job, first: int = 0) -> Prepared:
    """Read and check all that needs no other rank; the run begins with batch `first`."""
    plan = read_plan(job.artifact)
    clips = job.clip_norm is not None or plan.clip_norm is not None
    if job.clip_norm is not None and not job.clip_norm > 0:
        raise UsageError(f"--clip-norm {job.clip_norm:g}: the norm must be positive")
    pipeline = make_pipeline(
        plan,
        first=first,
        batches=job.steps,
        schedule=job.schedule,
        microbatches=job.microbatches,
        clipped=clips,
    )
    check(pipeline)
    file = find_model_file(job.artifact, job.model)
    return Prepared(job, plan, file, pipeline, _places(plan, file) if clips else {})


def _places(plan: Plan, file: ModelFile) -> dict[str, int]:
    places = {name: place for place, name in enumerate(parameter_order(file))}
    for tied in plan.tied:
        known = [places[name] for name in tied.names if name in places]
        places |= {name: known[0] for name in tied.names if known}  # none if it is frozen
    return places


def initial_stage(
    prepared: Prepared,
    stage: int,
    device: torch.device,
    turn: Turn | None = None,
    say: bool = False,
) -> nn.Module:
    """A stage with its first weights; `turn` waits until it may make them, and says how."""
    job = prepared.job
    module = load_stage(job.artifact, stage, prepared.file)
    with turn(module) if turn else nullcontext(job.init) as init:
        fill_stage(prepared.file, module, seed=job.seed, init=init, weights=job.weights, say=say)
    return module.to(device)


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
        elif channel.flow is Flow.NORM:
            spec = TensorSpec("norm", (), torch.float32)
        elif channel.flow is Flow.NORMS:
            spec = TensorSpec("norms", (prepared.norms,), torch.float32)
        elif channel.flow is Flow.TIED:
            (tied,) = (t for t in plan.tied if t.names[0] == channel.tensor)
            parameter = next(parameters[name] for name in tied.names if name in parameters)
            spec = TensorSpec(channel.tensor, tuple(parameter.shape), parameter.dtype)
        else:
            spec = tensors[channel.tensor]
        found[channel] = spec
    return found
