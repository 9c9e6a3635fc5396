"""Memory that is freed and asked for again comes without page faults."""

import platform
import subprocess
import sys

import pytest

PAGES = 64 << 8  # of 4 KiB in the 64 tensors of 1 MiB that a forward keeps here
RUN = """
import ctypes, resource, sys, torch
from p2bw.runtime.memory import keep_memory
ctypes.CDLL(None).mallopt(-3, 1 << 17)  # as malloc begins: what is large goes back at once
if sys.argv[1] == "kept":
    keep_memory(torch.device("cpu"))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    stash = [torch.ones(1 << 18) for _ in range(64)]
    while stash:
        stash.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(6)][2:])
"""


def _faults(how: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, how], capture_output=True, text=True, check=True, timeout=120
    )
    return [*map(int, done.stdout.split())]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_a_rank_keeps_its_memory_from_one_microbatch_to_the_next() -> None:
    assert max(_faults("kept")) < PAGES / 50
    assert min(_faults("given back")) > PAGES / 2  # else there is nothing to keep
