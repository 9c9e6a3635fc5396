"""How many bytes the user's own optimizer keeps per parameter: asked of it, not assumed."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from p2bw.compiler.program import Attribute, TensorType
from p2bw.modelfile.load import ModelFile
from p2bw.runtime.errors import ModelError, P2BWError


def optimizer_bytes(file: ModelFile, parameters: Iterable[Attribute]) -> Mapping[TensorType, int]:
    """Bytes of optimizer state for a parameter of each type, after one step under fake tensors.

    One parameter of each type stands for all of that type: torch's optimizers size their state by
    the parameter's own shape and dtype.
    """
    types = list(dict.fromkeys(p.type for p in parameters if p.trainable))
    if not types:
        return MappingProxyType({})
    with FakeTensorMode():
        fakes = [nn.Parameter(torch.empty(t.shape, dtype=t.dtype)) for t in types]
        try:
            optimizer = file.optimizer(fakes)
            for fake in fakes:
                fake.grad = torch.zeros_like(fake)
            optimizer.step()
        except P2BWError:
            raise
        except Exception as error:
            raise ModelError(
                f"{file.path.name}: one step of optimizer(params) fails: {error}; it must be a "
                "torch.optim.Optimizer that steps without a closure"
            ) from error
        sizes = {
            t: sum(
                value.untyped_storage().nbytes()
                for value in optimizer.state.get(fake, {}).values()
                if isinstance(value, torch.Tensor) and value.numel() > 1
            )
            for t, fake in zip(types, fakes, strict=True)
        }
    return MappingProxyType(sizes)
