"""Where torchrun has put this process, and how it finds the others."""

import os
from datetime import timedelta

import torch.distributed as dist

from p2bw.contract.errors import PeerError, UsageError
from p2bw.contract.job import Job, Options, command
from p2bw.contract.store import Place, Store


def find_place(job: Job) -> Place:
    try:
        return Place(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    except KeyError as missing:
        line = " ".join(command(job, Options(), ranks="N"))
        raise UsageError(
            f"{missing} is not set: the ranks are started by torchrun, as in {line}"
        ) from None


def connect(place: Place, timeout_s: float) -> Store:
    """The store that torchrun's agent keeps for its workers; it outlives their restarts."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise PeerError(f"no contact with {host}:{port}: {error}") from None
    shared: Store = dist.PrefixStore("p2bw", store)  # type: ignore[attr-defined]
    return shared


def within(store: Store, name: str | int) -> Store:
    """A part of the store that has its own keys."""
    part: Store = dist.PrefixStore(str(name), store)  # type: ignore[attr-defined, arg-type]
    return part
