"""How the ranks of a run build a model that each of them needs a part of: together, or in turns."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path

from torch import nn

from p2bw.contract.store import Place, Store, wait_for

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Room:
    """What one rank tells of its host: bytes of memory, ranks on it, and of its own stage."""

    total: int
    available: int
    ranks: int
    stage: int  # bytes of its weights


@dataclass(frozen=True, slots=True)
class Start:
    """How all ranks make the first weights."""

    init: str  # "whole" or "modules"
    at_once: int  # ranks of one host that may hold a whole model together
    model_bytes: int
    seed: int

    def __str__(self) -> str:
        size = f"the model's {self.model_bytes / 1e6:,.3g} MB"
        if self.model_bytes >= 1e9:
            size = f"the model's {self.model_bytes / 1e9:,.3g} GB"
        if self.init == "modules":
            return (
                f"first weights: each rank computes only its own stage's part of {size}, module "
                f"by module, by the model's own initialisers, each seeded by a weight's name and "
                f"{self.seed} (--init modules)"
            )
        turns = f", {self.at_once} of a host at a time" if self.at_once else ""
        return (
            f"first weights: each rank builds {size} under seed {self.seed}{turns}, and takes its "
            f"stage's part (--init whole)"
        )


def choose_start(asked: str, seed: int, width: int, rooms: list[Room]) -> Start:
    """What the smallest host can do.

    The choice between the two, which decides the weights, goes by the size of a host's memory and
    never by how much of it happens to be free.
    """
    model = sum(r.stage for r in rooms) // width
    at_once = min(max(1, (r.available - r.ranks * r.stage) // max(model, 1)) for r in rooms)
    fits = all(model + r.ranks * r.stage <= r.total * 0.8 for r in rooms)
    init = asked if asked != "auto" else "whole" if fits else "modules"
    return Start(init, 0 if at_once >= max(r.ranks for r in rooms) else at_once, model, seed)


@contextmanager
def taking_turns(
    store: Store, place: Place, asked: str, seed: int, width: int, say: bool, stage: nn.Module
) -> Iterator[str]:
    """Wait until this rank may make its first weights; yields how, the same on every rank."""
    size = sum(tensor.nbytes for tensor in (*stage.parameters(), *stage.buffers()))
    store.set(f"room/{place.rank}", dumps(asdict(Room(*read_memory(), place.local_world, size))))
    if place.rank == 0:
        rooms = [Room(**loads(wait_for(store, f"room/{rank}"))) for rank in range(place.world)]
        chosen = choose_start(asked, seed, width, rooms)
        store.set("start", dumps(asdict(chosen)))
        if say:
            print(chosen, file=sys.stderr, flush=True)
    start = Start(**loads(wait_for(store, "start")))
    turns = start.init == "whole" and start.at_once > 0
    if turns and place.local_rank >= start.at_once:
        wait_for(store, f"built/{place.rank - start.at_once}")  # a rank of the same host
    yield start.init
    store.set(f"built/{place.rank}", "done")
    if turns:  # which takes as long as it takes: nobody gives up on the others meanwhile
        for rank in range(place.world):
            wait_for(store, f"built/{rank}")


def read_memory() -> tuple[int, int]:
    """Bytes of memory of this host, or of the container, and those that are available."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = total
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        words = _read(_CGROUP / limit).strip(), _read(_CGROUP / used).strip()
        if all(word.isdigit() for word in words):  # "max": no limit
            total = min(total, int(words[0]))
            available = min(available, int(words[0]) - int(words[1]))
    return total, available


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
