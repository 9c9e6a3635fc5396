"""What a weight update takes: the runtime's own, for parameters of each type."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from p2bw.compiler.plan import Data, Number
from p2bw.compiler.program import Attribute, Program, TensorType
from p2bw.measure.cache import Cache
from p2bw.measure.device import seconds
from p2bw.measure.training import VERSIONS
from p2bw.modelfile.load import ModelFile
from p2bw.runtime.weights import Updater, Weights

_BYTES = 1 << 28  # of the parameters of one type that are measured together
_RUNS = 3


class _Found(Data):
    seconds: dict[str, Number]


def measure_updates(
    file: ModelFile,
    program: Program,
    device: torch.device,
    cache: Cache,
    beside: Callable[[], AbstractContextManager[None]],
    *,
    whole: bool,
) -> dict[str, float]:
    """By type: seconds of one parameter's part of an update, `beside` what else goes on then.

    Each type is measured by itself; where there is memory for the `whole` model's update, all are
    scaled so that they add up to what that takes.
    """
    trainable = [p for p in program.parameters.values() if p.trainable]
    names = [f"{p.name} {p.type}" for p in trainable]
    key = ("updates", whole, file.sha256(), dict(file.settings), *names)
    kept = cache.get(_Found, key)
    if kept is None:
        with beside() if whole else nullcontext():
            kept = _Found(seconds=_by_type(file, trainable, device, whole))
        cache.put(key, kept)
    return dict(kept.seconds)


def _by_type(
    file: ModelFile, trainable: Sequence[Attribute], device: torch.device, whole: bool
) -> dict[str, float]:
    by_type: dict[TensorType, list[Attribute]] = {}
    for parameter in trainable:
        by_type.setdefault(parameter.type, []).append(parameter)
    found = {}
    for kind, members in by_type.items():
        some = members[: max(1, _BYTES // max(1, kind.bytes))]
        found[kind] = _update_s(file, some, device) / len(some)
    scale = 1.0
    if whole and trainable:
        scale = _update_s(file, trainable, device) / sum(found[p.type] for p in trainable)
    return {str(kind): scale * value for kind, value in found.items()}


def _update_s(file: ModelFile, parameters: Sequence[Attribute], device: torch.device) -> float:
    module = nn.Module()
    names = {f"p{i}": p.name for i, p in enumerate(parameters)}
    gradients = {}
    for name, parameter in zip(names, parameters, strict=True):
        tensor = torch.empty(parameter.type.shape, dtype=parameter.type.dtype, device=device)
        module.register_parameter(name, nn.Parameter(tensor.normal_(std=0.02)))
        gradients[name] = torch.full_like(tensor, 1e-3)
    updater = Updater(
        Weights(module, VERSIONS),
        names,
        lambda pairs: file.optimizer((names[name], parameter) for name, parameter in pairs),
        file.scheduler,
    )
    batch = iter(range(1 << 30))
    return seconds(lambda: updater.update(next(batch), gradients), device, _RUNS)
