"""The keys and values that the ranks of a run share, and where each rank is."""

import time
from dataclasses import dataclass
from typing import Protocol

_POLL_S = 0.02


class Store(Protocol):
    """The keys and values that all ranks share: torch.distributed's store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where torchrun has put this process."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    attempt: int  # 1 after torchrun's first restart


def wait_for(store: Store, key: str) -> bytes:
    """A key's value, however long it takes; meanwhile other threads can use the store."""
    while not store.check([key]):
        time.sleep(_POLL_S)
    return store.get(key)
