"""The memory that tensors on the CPU lie in."""

import ctypes

import torch

# Parameters of glibc's mallopt, and what they are set to: the most that it takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 1 << 26, _MMAP_THRESHOLD: 1 << 25}


def keep_memory(device: torch.device) -> None:
    """Have malloc keep what is freed, for the next microbatch, where that lies on the CPU.

    A backward frees all that its forward has kept. Where malloc gives that back to the system, the
    next forward gets each page anew and cleared: some percent of the time, now and then. Another
    libc than glibc has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:
        for parameter, value in _SETTINGS.items():
            mallopt(parameter, value)
