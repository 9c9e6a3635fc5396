"""Floating-point operations of a model as torch counts them: the oracle for what passes count."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from p2bw.modelfile.load import ModelFile
from p2bw.passes.annotate_autograd import without_onednn


def count(file: ModelFile, device: str, batch_size: int) -> tuple[int, int]:
    """FLOPs forward and backward of one training step of the user's own model."""
    inputs, targets = file.inputs(batch_size), file.targets(batch_size)
    inputs, targets = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device), (inputs, targets)
    )
    with torch.device(device):
        model = file.model()
    with FlopCounterMode(display=False) as counter:
        loss = file.call(model, inputs, targets)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def count_anywhere(file: ModelFile, batch_size: int) -> tuple[int, int]:
    """On meta tensors, or where the model looks at values, on the CPU.

    There torch's counter knows neither the CPU's attention nor oneDNN's recurrent layers, so the
    step runs without these.
    """
    try:
        return count(file, "meta", batch_size)
    except (NotImplementedError, RuntimeError):
        with without_onednn(), sdpa_kernel(SDPBackend.MATH):
            return count(file, "cpu", batch_size)
