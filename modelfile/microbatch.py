"""Microbatches as user code writes them: nested tuples, lists and dicts of tensors."""

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from p2bw.contract.errors import ModelError

_PLAIN = (str, int, float, bool, complex, bytes, torch.dtype, torch.device, type(None))


def map_tensors(value: Any, function: Callable[[str, Tensor], Any], name: str = "") -> Any:
    """Rebuild nested tuples, lists and dicts with `function(name, tensor)` in place of tensors.

    The order of calls defines the order of a program's inputs. A name is the innermost dict key
    above the tensor, else `name`.
    """
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function, name) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, str(key)) for key, item in value.items()}
    if isinstance(value, _PLAIN):
        return value
    raise ModelError(
        f"holds {describe(value)}; use tensors, in tuples, lists or dicts, and plain Python values"
    )


def flatten_microbatch(inputs: Any, targets: Any) -> tuple[Tensor, ...]:
    """All tensors of a microbatch, in the order of `Program.inputs`.

    Values that are not tensors (None, numbers, strings) are constants of the compiled program.
    """
    tensors: list[Tensor] = []
    map_tensors((inputs, targets), lambda _, tensor: tensors.append(tensor))
    return tuple(tensors)


def apply(function: Callable[..., Any], arguments: Any, *first: Any) -> Any:
    """Call with a microbatch's inputs or targets: a dict by name, a tuple in order."""
    if isinstance(arguments, Mapping):
        return function(*first, **arguments)
    if isinstance(arguments, (tuple, list)):
        return function(*first, *arguments)
    return function(*first, arguments)


def seed_all(seed: int) -> None:
    """Seed every generator that user code draws from on the CPU."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


@contextmanager
def seeded(key: str | int) -> Iterator[None]:
    """Seed every generator that user code draws from, and put all of them back after.

    A number is the seed itself; of a string, a number is made.
    """
    if isinstance(key, str):
        key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        seed_all(key)
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def describe(value: object) -> str:
    """What a value is, for messages: "None", "a list", "an int", "a numpy.ndarray"."""
    if value is None:
        return "None"
    kind = type(value)
    name = (
        kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    )
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
