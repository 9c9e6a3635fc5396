"""The random numbers of a stage's forwards: a function of the seed alone."""

import hashlib

import torch


def forward_seed(seed: int, stage: int, microbatch: int) -> int:
    """What the generator is seeded with before a stage's forward, and again for its recompute.

    `microbatch` counts over all replicas. A dropout mask thus depends on neither timing nor the
    schedule nor recomputation.
    """
    digest = hashlib.sha256(f"p2bw {seed} {stage} {microbatch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_forward(seed: int, stage: int, microbatch: int, device: torch.device) -> None:
    value = forward_seed(seed, stage, microbatch)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
