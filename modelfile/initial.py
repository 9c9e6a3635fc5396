"""The weights that a stage starts with: the user's own code's, or those of safetensors files."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from p2bw.contract.errors import MismatchError, ModelError
from p2bw.contract.weightfiles import WeightFiles
from p2bw.modelfile.build import build, build_recorded
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import seed_all, seeded

Values = Callable[[str, Tensor], Tensor]  # a model's tensor, with its values


def _itself(name: str, tensor: Tensor) -> Tensor:
    return tensor


def parameter_order(file: ModelFile) -> tuple[str, ...]:
    """Names of the trainable parameters in model.parameters() order, a tied one by its first name.

    The model is built without memory for its weights.
    """
    with seeded("model"):
        model = build(file, FakeTensorMode(allow_non_fake_inputs=True))
    return tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def fill_stage(
    file: ModelFile,
    stage: nn.Module,
    *,
    seed: int,
    init: str = "whole",
    weights: Path | None = None,
    say: bool = False,
) -> None:
    """Give a stage its first weights.

    With `init` "modules" the model is built without memory, and the user's own initialisers run
    for just the stage's part, tensor by tensor; else they build the model whole, under the seed,
    and the stage takes its part. Either way a weight does not depend on the partition, but the two
    ways draw different ones. Of `weights`, where given, just the stage's part is read instead.
    """
    seed_all(seed)
    if init != "modules" and weights is None:
        copy_state(file.model(), stage)
        return
    try:
        model, recording = build_recorded(file, seed)
        values: Values = recording.values
    except ModelError as problem:
        if weights is None:
            raise ModelError(
                f"{problem}\n--init modules builds the model without its weights, and its code "
                f"looks at them; use --init whole, or --weights"
            ) from problem
        model, values = file.model(), _itself
    if weights is not None:
        files = WeightFiles(weights)
        values = files.values(model, stage, values)
    copy_state(model, stage, values)
    if weights is not None and say:
        line = f"first weights: each rank reads its own stage's part of {weights}"
        casts = [f"{old} becomes {new}" for old, new in sorted(files.casts)]
        print(", ".join([line, *casts]), file=sys.stderr, flush=True)


def copy_state(model: nn.Module, stage: nn.Module, values: Values = _itself) -> None:
    """Give a stage the whole model's parameters and buffers, by their qualified names.

    A constant that the stage code makes itself is no attribute of the model and stays as it is.
    """
    parameters = {name for name, _ in stage.named_parameters()}
    with torch.no_grad():
        for name, tensor in (*stage.named_parameters(), *stage.named_buffers()):
            value = lookup(model, name)
            if value is None:
                if name in parameters:
                    raise MismatchError(f"the stage has {name!r}, which the model has not")
                continue
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise MismatchError(
                    f"{name!r} is {value.dtype} {list(value.shape)} in the model, "
                    f"{tensor.dtype} {list(tensor.shape)} in the stage"
                )
            tensor.requires_grad_(value.requires_grad)
            tensor.copy_(values(name, value))


def lookup(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of a model at a qualified name, registered or a plain attribute."""
    owner: Any = model
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, Tensor) else None
