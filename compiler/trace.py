"""From a model file to a Program, by torch.export (non-strict) under fake tensors.

torch.export is the one tracer that captures training steps of the models people use, with loss
and gradients bit-equal to eager, and its cost does not depend on the size of the tensors. The
training graph that it yields is kept as it is: decomposing it breaks the training of BatchNorm.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from p2bw.compiler.flatten import LostConstantError, flatten
from p2bw.compiler.opaque import Opaques
from p2bw.compiler.program import Program
from p2bw.compiler.trace_env import as_in_eager, tracing
from p2bw.compiler.trace_errors import explain
from p2bw.contract.errors import ModelError
from p2bw.modelfile.build import build, build_real
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import describe, map_tensors, seeded
from p2bw.modelfile.own import OwnModules


class Step(nn.Module):
    """Forward and loss of one microbatch: what is traced. Takes the microbatch's tensors, flat."""

    def __init__(
        self,
        file: ModelFile,
        model: nn.Module,
        microbatch: Any,
        observe: Callable[[Tensor], None],
    ) -> None:
        super().__init__()
        self.model = model  # flatten() knows this name
        self.file = file
        self.microbatch = microbatch  # (inputs, targets), for all that is not a tensor
        self.observe = observe

    def forward(self, *tensors: Tensor) -> Tensor:
        feed = iter(tensors)
        inputs, targets = map_tensors(self.microbatch, lambda *_: next(feed))
        buffers = dict(self.model.named_buffers())
        loss = self.file.call(self.model, inputs, targets)
        _write_back(self.model, buffers)
        self.observe(loss)
        return loss


def _write_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Turn `self.buffer = new` in the user's forward into a write, which a graph can hold."""
    for name, old in before.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        new = owner._buffers.get(attribute)
        if new is old:
            continue
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise ModelError(
                f"forward replaces the buffer {name} by {describe(new)} of another shape or "
                f"dtype; a buffer must keep its shape and dtype"
            )
        with torch.no_grad():
            old.copy_(new)
        owner._buffers[attribute] = old


def trace(file: ModelFile, batch_size: int) -> Program:
    """Trace one training step for a microbatch of `batch_size` samples, without any weights.

    A submodule that cannot be traced becomes one opaque call, and has its weights for a moment.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with seeded("model"):
        model = build(file, mode)
    with seeded("inputs"):
        microbatch = file.inputs(batch_size), file.targets(batch_size)
    try:
        return _trace(file, batch_size, mode, model, microbatch)
    except LostConstantError as lost:
        problem = ModelError(f"{file.path.name}: {lost}")
    with seeded("model"):
        model = build_real(file, mode, problem)
    try:
        return _trace(file, batch_size, mode, model, microbatch)
    except LostConstantError as lost:
        raise ModelError(f"{file.path.name}: {lost}") from None


def _trace(
    file: ModelFile, batch_size: int, mode: FakeTensorMode, model: nn.Module, microbatch: Any
) -> Program:
    tensors: list[Tensor] = []
    names: list[str] = []

    def keep(name: str, tensor: Tensor) -> None:
        names.append(name)
        tensors.append(mode.from_tensor(tensor.detach()))

    inputs, targets = microbatch
    _name(inputs, _parameters(model.forward), keep, "input")
    loss = file.function("loss")
    if loss is not None and targets is not None:
        takes = loss.forward if isinstance(loss, nn.Module) else loss
        _name(targets, _parameters(takes)[1:], keep, "target")

    losses: list[Tensor] = []
    opaque = Opaques(file, model, OwnModules(file))
    step = Step(file, model, microbatch, losses.append)

    def export() -> Program:
        losses.clear()
        notes: dict[str, None] = {}
        with tracing(file, notes), opaque.hidden():
            try:
                exported = torch.export.export(step, tuple(tensors), strict=False)
            except Exception as error:
                raise explain(error, step, mode, names, tensors) from error
        _check_loss(file, losses[-1])
        program = flatten(exported, file, model, batch_size, names, opaque.calls)
        return replace(program, notes=tuple(notes))

    def attempt() -> Program:
        asked: set[str] = set()
        try:
            with as_in_eager(asked):
                return export()
        except ModelError:
            if not asked:
                raise
        return export()  # the model has code of its own for export: it may need it

    while True:  # each time around, what failed has become opaque, or the call of it known
        try:
            return attempt()
        except ModelError as error:
            if not opaque.learn(error):
                raise


def _name(
    value: Any, parameters: list[str], keep: Callable[[str, Tensor], None], default: str
) -> None:
    """Name the tensors of inputs or targets as the function that takes them does."""
    if isinstance(value, Mapping):
        map_tensors(value, keep)
        return
    for index, item in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
        map_tensors(item, keep, parameters[index] if index < len(parameters) else default)


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters that positional arguments go to."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _check_loss(file: ModelFile, loss: Tensor) -> None:
    where = file.path.name
    if loss.shape != ():
        cure = (
            "take its mean or sum"
            if file.function("loss")
            else "write loss(outputs, *targets) and targets(batch_size), or return a scalar"
        )
        made = (
            "loss() returned" if file.function("loss") else "there is no loss(), and forward gave"
        )
        raise ModelError(
            f"{where}: the loss must be a scalar, but {made} a tensor of shape "
            f"{list(loss.shape)}; {cure}"
        )
    if not loss.dtype.is_floating_point:
        raise ModelError(f"{where}: the loss is {loss.dtype}, which has no gradient")
    if not loss.requires_grad:
        raise ModelError(
            f"{where}: the loss does not depend on any trainable parameter; is it computed under "
            f"torch.no_grad(), from a detached tensor, or is every parameter frozen?"
        )
