"""The random numbers of a stage's forwards: a function of the seed alone."""

import hashlib
from functools import cache

import torch

_64_BITS = (1 << 64) - 1


def forward_seed(seed: int, stage: int, microbatch: int) -> int:
    """What the generator is seeded with before a stage's forward, and again for its recompute.

    `microbatch` counts over all replicas. A dropout mask thus depends on neither timing nor the
    schedule nor recomputation. The numbers are those of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014), which takes less time than a hash.
    """
    x = (_start(seed, stage) + microbatch * 0x9E3779B97F4A7C15) & _64_BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return (x ^ (x >> 31)) >> 1


@cache
def _start(seed: int, stage: int) -> int:
    """Where a stage's sequence begins: any two stages' are far from each other."""
    digest = hashlib.sha256(f"p2bw {seed} {stage}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def seed_forward(seed: int, stage: int, microbatch: int, device: torch.device) -> None:
    value = forward_seed(seed, stage, microbatch)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
