"""How many bytes the user's own optimizer keeps per parameter: asked of it, not assumed."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.program import Attribute, TensorType
from p2bw.contract.errors import ModelError, P2BWError
from p2bw.modelfile.load import ModelFile


def optimizer_bytes(file: ModelFile, parameters: Iterable[Attribute]) -> Mapping[TensorType, int]:
    """Bytes of optimizer state for a parameter of each type, after one step under fake tensors.

    The optimizer of a bfloat16 or float16 parameter works on a master copy of it in float32, which
    counts as state.
    One parameter of each type stands for all of that type: torch's optimizers size their state by
    the parameter's own shape and dtype. Where the optimizer goes by names, all are asked about,
    and the largest counts.
    """
    trainable = [p for p in parameters if p.trainable]
    if not file.optimizer_takes_names():
        first: dict[TensorType, Attribute] = {}
        for p in trainable:
            first.setdefault(p.type, p)
        trainable = list(first.values())
    if not trainable:
        return MappingProxyType({})
    with FakeTensorMode(), OnesForNumbers():  # type: ignore[no-untyped-call]
        fakes = {
            p: nn.Parameter(
                torch.empty(p.type.shape, dtype=torch.float32 if _has_master(p) else p.type.dtype)
            )
            for p in trainable
        }
        try:
            optimizer = file.optimizer((p.name, fake) for p, fake in fakes.items())
            for fake in fakes.values():
                fake.grad = torch.zeros_like(fake)
            optimizer.step()
        except P2BWError:
            raise
        except Exception as error:
            raise ModelError(
                f"{file.path.name}: one step of optimizer(params) fails: {error}; it must be a "
                "torch.optim.Optimizer that steps without a closure"
            ) from error
        sizes = dict.fromkeys((p.type for p in trainable), 0)
        for p, fake in fakes.items():
            tensors = optimizer.state.get(fake, {}).values()
            size = sum(
                value.untyped_storage().nbytes()
                for value in tensors
                if isinstance(value, torch.Tensor) and value.numel() > 1
            )
            sizes[p.type] = max(sizes[p.type], size + _has_master(p) * fake.nbytes)
    return MappingProxyType(sizes)


class OnesForNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets an optimizer look at numbers (Adafactor scales its steps by norms): all are 1."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def _has_master(parameter: Attribute) -> bool:
    return parameter.type.dtype in (torch.bfloat16, torch.float16)
