"""What the kernels of a device keep and allocate that fake tensors do not show.

Operators run on fake CPU tensors here, whatever device a plan is for. On the CPU, oneDNN's
convolutions and recurrent layers copy their operands into layouts of their own, and an LSTM keeps a
workspace: sizes as oneDNN 3 has them, which torch's allocator reports. On a GPU, dropout keeps a
mask of one byte per element, and attention with dropout is as fused as without: it keeps its
output and the logarithms of its sums, not the T x T probabilities.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PAGE = 4096


def kernels_of(on_gpu: bool) -> AbstractContextManager[object]:
    """Lets operators on fake CPU tensors keep what the kernels of such a device keep."""
    return _GpuKernels() if on_gpu else nullcontext()


class _GpuKernels(TorchFunctionMode):
    """Calls what a GPU has kernels for, where the CPU composes it of other operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = _INSTEAD.get(func)
        return (instead or func)(*args, **(kwargs or {}))


def _dropout(x: Tensor, p: float = 0.5, train: bool = True, inplace: bool = False) -> Tensor:
    if not train or not p or inplace:
        return torch.nn.functional.dropout(x, p, train, inplace)
    result: Tensor = torch.native_dropout(x, p, True)[0]
    return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, is_causal, **kwargs
    )


def _functional_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropout(input, p, training, inplace)


_INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.dropout: _functional_dropout,
    torch.dropout: _dropout,
    _aten.dropout.default: _dropout,
    torch.nn.functional.scaled_dot_product_attention: _attention,
    _aten.scaled_dot_product_attention.default: _attention,
}


def replaced(target: Any, on_gpu: bool) -> bool:
    """Whether a kernel of the device keeps something else than what fake tensors show."""
    return target is _aten.lstm.input or (on_gpu and target in _INSTEAD)


class Workspaces(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives the workspaces of recurrent layers their sizes, which fake tensors lack."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _aten.mkldnn_rnn_layer.default and not result[3].numel():
            size = recurrent_workspace(args[0].shape, args[10])
            workspace = torch.empty(size, dtype=torch.uint8)
            return (*result[:3], workspace)
        return result


def recurrent_workspace(shape: torch.Size, hidden: int) -> int:
    """Bytes that oneDNN's LSTM keeps for its backward, of a (steps, samples, features) input."""
    steps, samples, features = shape
    states = 6 * _leading(max(features, hidden)) + _leading(hidden) + 4 * hidden
    floats = samples * (steps * _leading(4 * hidden) + (steps + 1) * states)
    return _pages(4 * floats) + 2 * _PAGE


def gpu_scratch(func: Any, args: Any, result: Any) -> int:
    """Bytes that a kernel of any device allocates beside its results, and frees at its end."""
    # These compute the losses of all elements, and the mean keeps a memory of their size.
    return 2 * _bytes(args[0]) if func in _LOSSES and not result.dim() else 0


_LOSSES = (_aten.mse_loss.default, _aten.smooth_l1_loss.default, _aten.huber_loss.default)


def cpu_scratch(func: Any, args: Any, result: Any) -> int:
    """Likewise, of a CPU's."""
    if func is _aten.convolution.default:
        x, weight, transposed = args[0], args[1], args[6]
        if _is_plain(weight, args[3]):
            return 0
        copies = 2 * _bytes(result) if transposed else _bytes(result)
        return max(_bytes(x) + _bytes(weight), copies)
    if func is _aten.convolution_backward.default:
        gradient, x, weight = args[:3]
        if _is_plain(weight, args[4]):
            return 0
        return max(_bytes(gradient) + _bytes(x), _bytes(weight))
    if func is _aten.mkldnn_rnn_layer.default:
        return _recurrent_scratch(args[0].shape, args[10])
    if func is _aten.mkldnn_rnn_layer_backward.default:
        features, hidden = args[0].shape[2], args[15]
        sizes = [size for size in (features, hidden) if _leading(size) != size]
        weights: int = 16 * hidden * sum(map(_leading, sizes))
        return _recurrent_scratch(args[0].shape, hidden) + weights
    return gpu_scratch(func, args, result)


def _is_plain(weight: Tensor, stride: Sequence[int]) -> bool:
    """Such a convolution is a product of matrices, and runs on the tensors as they lie."""
    return all(size == 1 for size in (*weight.shape[2:], *stride))


def _bytes(tensor: Tensor) -> int:
    size: int = tensor.numel() * tensor.dtype.itemsize
    return size


def _recurrent_scratch(shape: torch.Size, hidden: int) -> int:
    steps, samples, features = shape
    gates = 4 * _leading(4 * hidden)
    return gates * (features + hidden + steps * samples) + 6 * _PAGE


def _leading(size: int) -> int:
    """oneDNN's length of a row of floats: whole cache lines, and never a multiple of 1 KiB."""
    rounded = -(-size // 16) * 16
    return rounded + 16 if rounded % 256 == 0 else rounded


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
