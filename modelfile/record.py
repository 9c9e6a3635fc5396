"""What a model's constructor does to its tensors, written down while none of them has memory.

A log of operators stands for the values: any one tensor can be computed later, alone, by running
just the operators that it depends on. They are the user's own initialisers, whatever their form:
`reset_parameters`, `_init_weights`, a loop over `parameters()`, `nn.Parameter(torch.randn(n))`.

A tensor in the log is a view of a numbered storage, so views and aliases need no entries.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from p2bw.contract.errors import ModelError
from p2bw.modelfile.microbatch import seeded

_KEPT = 1 << 24  # bytes of one storage whose values come from outside torch, such as from numpy

# Operators that write all of their first argument and read none of it.
_OVERWRITING = {f"aten::{name}_" for name in ("copy", "fill", "normal", "uniform", "zero")}
_OVERWRITING.add("p2bw::trunc_normal_")


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as the log knows it."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        return tensor.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class _Operation:
    function: Any
    arguments: Any  # (args, kwargs), with a _View in place of each tensor
    makes: tuple[_View | None, ...]  # the result's tensors, those in new storages
    reads: frozenset[int]
    writes: frozenset[int]
    overwrites: int | None  # a storage of whose earlier values nothing is left
    draws: bool  # random numbers


class _UnknownError(Exception):
    """No operator has made a storage, and its values were too many to keep."""


class Recording(TorchDispatchMode):
    """Writes down what is done while it is active; `values` then computes any tensor of it.

    Each draw of random numbers is seeded by itself: by the name of the tensor that it fills and by
    how many that has had before. So values depend neither on what else is computed nor on where.
    A draw that the constructor gets to see, of a small tensor that no module has yet, goes by its
    number instead, as no name is known.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self._log: list[_Operation] = []
        self._writers: dict[int, list[int]] = defaultdict(list)  # storage -> places in the log
        # By address. The weak reference keeps an address from being given to another storage.
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._constants: dict[int, torch.UntypedStorage] = {}  # made by no operator
        self._keys: dict[int, str] = {}  # place in the log -> what seeds the draw there

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_map(self._view, (args, kwargs))  # first: the operator may change a constant
        draws = torch.Tag.nondeterministic_seeded in func.tags
        with seeded(key := self._key("", len(self._log))) if draws else nullcontext():
            result = func(*args, **kwargs)
        if draws and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, result))):
            self._keys[len(self._log)] = key
        makes = tuple(self._made(leaf) for leaf in tree_leaves(result))
        changed = {v.storage for v in _views(list(written(func, *given)))}
        writes = frozenset(changed.union(v.storage for v in makes if v))
        if not writes:
            return result
        read, overwrites = given, None
        if func._schema.name in _OVERWRITING and _is_whole(args[0]):
            read, overwrites = (given[0][1:], given[1]), given[0][0].storage
        for storage in writes:
            self._writers[storage].append(len(self._log))
        reads = frozenset(v.storage for v in _views(read))
        self._log.append(_Operation(func, given, makes, reads, writes, overwrites, draws))
        return result

    def _key(self, name: str, number: int) -> str:
        return f"{self.seed}:{name}:{number}"

    def _view(self, value: Any) -> Any:
        """A tensor that is given to an operator, as a _View; any other value as it is."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:  # made by no operator
            number = self._add(storage)
            if not isinstance(value, FakeTensor) and storage.nbytes() <= _KEPT:
                with no_dispatch():
                    self._constants[number] = storage.clone()  # type: ignore[no-untyped-call]
        return self._describe(value)

    def _made(self, value: Any) -> _View | None:
        """A tensor of an operator's result, if its storage is new."""
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._storages:
            return None
        self._add(value.untyped_storage())
        return self._describe(value)

    def _add(self, storage: torch.UntypedStorage, number: int | None = None) -> int:
        number = len(self._storages) if number is None else number
        self._storages[storage._cdata] = StorageWeakRef(storage), number  # type: ignore[no-untyped-call]
        return number

    def _describe(self, tensor: Tensor) -> _View:
        _, number = self._storages[tensor.untyped_storage()._cdata]
        offset = int(tensor.storage_offset())
        return _View(number, tuple(tensor.shape), tensor.stride(), offset, tensor.dtype)

    def replaced(self, tensor: Tensor, by: Tensor) -> None:
        """Another tensor, without memory, stands for one from now on."""
        self._add(by.untyped_storage(), self._view(tensor).storage)

    def name(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """The names of the finished model's tensors, the first of several counts."""
        names: dict[int, str] = {}
        for name, tensor in named:
            names.setdefault(self._view(tensor).storage, name)
        drawn: Counter[str] = Counter()
        for place, operation in enumerate(self._log):
            name = names.get(min(operation.writes), "")  # "": a temporary of the constructor's own
            if operation.draws and place not in self._keys:
                self._keys[place] = self._key(name, drawn[name] if name else place)
                drawn[name] += 1

    def draws(self) -> list[str]:
        """What seeds each draw, in the order in which the constructor makes them."""
        return [self._keys[place] for place, op in enumerate(self._log) if op.draws]

    def values(self, name: str, tensor: Tensor) -> Tensor:
        """What the constructor gives a tensor of the model, computed alone."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        view: _View = self._view(tensor)
        made: dict[int, torch.UntypedStorage] = {}
        try:
            for place in self._needed(view.storage):
                self._run(place, made)
            return view.of(self._storage(view.storage, made))
        except _UnknownError:
            raise ModelError(
                f"the first values of {name} come from outside torch, such as from numpy, so they "
                f"cannot be computed without the rest of the model; use --init whole, or --weights"
            ) from None

    def _needed(self, storage: int) -> list[int]:
        """Places in the log of all that a storage's values depend on, in order."""
        found: set[int] = set()
        waiting = [(storage, len(self._log))]
        while waiting:
            storage, before = waiting.pop()
            writers = [place for place in self._writers[storage] if place < before]
            last = [i for i, p in enumerate(writers) if self._log[p].overwrites == storage][-1:]
            # The first gives it its memory.
            for place in {*writers[:1], *writers[last[0] if last else 0 :]} - found:
                found.add(place)
                waiting += [(read, place) for read in self._log[place].reads]
        return sorted(found)

    def _run(self, place: int, made: dict[int, torch.UntypedStorage]) -> None:
        operation = self._log[place]

        def real(value: Any) -> Any:
            if isinstance(value, torch.Generator):  # the draw's own: others may not have come by
                return torch.Generator(value.device).manual_seed(torch.initial_seed())
            return value.of(self._storage(value.storage, made)) if _is_view(value) else value

        key = self._keys.get(place)
        with torch.no_grad(), seeded(key) if key else nullcontext():
            args, kwargs = tree_map(real, operation.arguments)
            result = tree_leaves(operation.function(*args, **kwargs))
        for view, tensor in zip(operation.makes, result, strict=True):
            if view is not None:
                made[view.storage] = _laid_out(tensor, view).untyped_storage()

    def _storage(self, number: int, made: dict[int, torch.UntypedStorage]) -> torch.UntypedStorage:
        if number not in made:
            if number not in self._constants:
                raise _UnknownError
            made[number] = self._constants[number].clone()  # type: ignore[no-untyped-call]
        return made[number]


def written(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operator writes into."""
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def _views(value: Any) -> list[_View]:
    return [leaf for leaf in tree_leaves(value) if _is_view(leaf)]


def _is_view(value: Any) -> bool:
    return isinstance(value, _View)


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _laid_out(tensor: Tensor, view: _View) -> Tensor:
    """A new tensor with the strides that the log expects: later operators see its storage."""
    if tensor.stride() == view.stride and tensor.storage_offset() == view.offset == 0:
        return tensor
    return torch.empty_strided(view.size, view.stride, dtype=view.dtype).copy_(tensor)
