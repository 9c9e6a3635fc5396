"""How many bytes of tensors live, operator by operator: for code that runs on fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.passes.execute import flatten_tensors


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of tensors, and of the allocator's blocks that they lie in."""

    bytes: int = 0
    blocks: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.bytes + other.bytes, self.blocks + other.blocks)

    def __sub__(self, other: "Size") -> "Size":
        return Size(self.bytes - other.bytes, self.blocks - other.blocks)

    def __mul__(self, count: int) -> "Size":
        return Size(self.bytes * count, self.blocks * count)


def rounded(count: int, unit: int) -> Size:
    """A storage of so many bytes, in whole units of the allocator's."""
    return Size(count, -(-count // unit) * unit)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, each until its last tensor is gone.

    `unit` is what the device's allocator rounds every storage up to; `scratch` tells what a kernel
    allocates besides and frees at its end.
    """

    def __init__(self, unit: int, scratch: Callable[[Any, Any, Any], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unit, self.scratch = unit, scratch
        self.now = Size()
        self.most = Size()
        self.known: dict[int, Any] = {}  # a storage -> the reference that tells when it is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in flatten_tensors(result):
            self.see(tensor)
        if more := self.scratch(func, args, result):
            self._reach(self.now + self.size(more))
        return result

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not yet."""
        storage = tensor.untyped_storage()
        identity: int = storage._cdata
        if identity in self.known:
            return
        size = self.size(storage.nbytes())

        def gone(_: Any) -> None:
            self.now -= size
            del self.known[identity]

        self.known[identity] = ref(storage, gone)
        self.now += size
        self._reach(self.now)

    def _reach(self, size: Size) -> None:
        if size.blocks > self.most.blocks:
            self.most = size

    def size(self, count: int) -> Size:
        return rounded(count, self.unit)

    @contextmanager
    def peak(self, found: list[Size]) -> Iterator[None]:
        """Append the most that lives at any time in here, over what lived before."""
        before = self.most = self.now
        yield
        found.append(self.most - before)
