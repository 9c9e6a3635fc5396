"""The ranks of a run as processes that tests can kill: forked, as importing torch takes longer."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from p2bw.contract.schedule import Action
from p2bw.runtime import checkpoint
from p2bw.runtime.__main__ import main
from p2bw.runtime.worker import Worker

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["processes", "torch._dynamo"])


class Ranks:
    """`python -m p2bw.runtime` as torchrun would start it on one machine, and its end."""

    def __init__(
        self,
        world: int,
        arguments: Sequence[object],
        *,
        log: Path,
        harm: tuple[int, str] | None = None,
    ) -> None:
        """`harm`: what happens to a rank in an action, as in (1, "kill in F7") or "sleep in B3"."""
        self.log = log
        log.unlink(missing_ok=True)
        self.store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        given = [str(argument) for argument in arguments]
        self.ranks = []
        for rank in range(world):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world),
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            own = harm[1] if harm and harm[0] == rank else ""
            process = _FORK.Process(target=_rank, args=(environment, given, str(log), own))
            process.start()
            self.ranks.append(process)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def exit_codes(self, timeout_s: float = 120) -> list[int | None]:
        """When all ranks have ended, which they must after the first within ten seconds."""
        wait_until(lambda: any(rank.exitcode is not None for rank in self.ranks), timeout_s)
        if any(rank.exitcode for rank in self.ranks):
            for rank in self.ranks:
                rank.terminate()  # as torchrun does
        wait_until(lambda: all(rank.exitcode is not None for rank in self.ranks), 10)
        return [rank.exitcode for rank in self.ranks]

    def said(self) -> list[str]:
        """Every line on stderr that is p2bw's own."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("p2bw: ")]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()


def _rank(environment: dict[str, str], arguments: list[str], log: str, harm: str) -> None:
    """In a process of its own."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["p2bw.runtime", *arguments]
    if harm:
        _plan_harm(*harm.split(" in "))
    os._exit(main())


def _plan_harm(what: str, where: str) -> None:
    def suffer() -> None:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "sleep":
            time.sleep(1000)
        else:
            raise RuntimeError(what)

    write = checkpoint.write_tensors
    compute = {"F": Worker._forward, "B": Worker._backward}

    def perform(self: Worker, action: Action) -> None:
        if f"{action.kind}{action.index}" == where:
            suffer()
        compute[action.kind](self, action)

    def write_half(path: Path, *arguments: object) -> tuple[int, str]:
        written = write(path, *arguments)  # type: ignore[arg-type]
        if path.parent.name == f"{where}.new":
            os.truncate(path, path.stat().st_size // 2)
            suffer()
        return written

    Worker._forward = Worker._backward = perform  # type: ignore[method-assign]
    checkpoint.write_tensors = write_half


def saved_states(folder: Path, depth: int) -> list[dict[str, Tensor]]:
    """The weights and buffers of each stage in a checkpoint, by the model's own names."""
    return [
        {
            key.partition("/")[2]: tensor
            for key, tensor in load_file(folder / f"stage-{stage}.safetensors").items()
            if key.startswith(("weights/", "buffers/", "frozen/"))
        }
        for stage in range(depth)
    ]


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(ready: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.02)
