"""The one way for a foreign name into generated code: as a plain identifier that means nothing."""

import builtins
import keyword
import re
from collections.abc import Iterable

from torch import nn

# What generated code refers to by name.
_NAMES = {
    *keyword.kwlist,
    *keyword.softkwlist,
    *dir(builtins),
    *("self", "torch", "nn", "F", "model", "inputs", "targets", "loss", "lstm", "gru", "rnn"),
    *("Tensor", "Path", "safe_open", "hashlib", "WEIGHTS", "SHA256", "batch_size"),
    *("optimizer", "scheduler", "data", "outputs"),
}
# What a module has already.
_ATTRIBUTES = {*keyword.kwlist, *dir(nn.Module()), *dir(nn.ModuleList()), "forward", "self"}
_LONGEST = 60
_DEEPEST = 12


def identifier(name: str, default: str = "value") -> str:
    """A valid, public Python identifier in ASCII that resembles a name and hides no other."""
    return _unlike(_NAMES, name, default)


def attribute(name: str, default: str = "value") -> str:
    """The same for an attribute of a module, which must not be one that modules have."""
    return _unlike(_ATTRIBUTES, name, default)


def _unlike(taken: set[str], name: str, default: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name)[:_LONGEST].strip("_")
    plain = re.sub(r"__+", "_", plain)
    if not plain:
        return default
    if plain[0].isdigit():
        plain = f"{default}_{plain}"
    return f"{plain}_" if plain in taken else plain


def unique(name: str, used: Iterable[str]) -> str:
    """The name, or the name with the first free number."""
    used = set(used)
    number, candidate = 1, name
    while candidate in used:
        candidate = f"{name}_{number}"
        number += 1
    return candidate


def file_name(stem: str) -> str:
    """A plain file name that resembles another's."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:_LONGEST].strip("_-") or "model"


class Paths:
    """Dotted names as module paths: identifiers, and numbers where all children are numbered."""

    def __init__(self, names: Iterable[str]) -> None:
        children: dict[tuple[str, ...], set[str]] = {}
        for name in names:
            parts = _parts(name)
            for depth in range(len(parts)):
                last = depth == len(parts) - 1
                children.setdefault(tuple(parts[:depth]), set()).add("" if last else parts[depth])
        self._lists = {
            parent
            for parent, found in children.items()
            if all(map(_is_index, found)) and max(map(int, found)) < 4 * len(found) + 16
        }

    def path(self, name: str, *, module: bool = False) -> tuple[str, ...]:
        """The path of a tensor, or of a module, that has this name."""
        parts = _parts(name)
        found = []
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1 and not module
            if not last and _is_index(part) and tuple(parts[:depth]) in self._lists:
                found.append(part)
            else:
                found.append(attribute(part, "value" if last else "layer"))
        if found and found[0].isdigit():  # a list has an attribute that it is in
            found.insert(0, "layers")
        return tuple(found)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split(".") if part] or ["value"]
    return parts if len(parts) <= _DEEPEST else ["_".join(parts)]


def _is_index(part: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,3}", part) is not None


def class_name(name: str, default: str) -> str:
    """The last part of a dotted class name, as a class of our own."""
    found = identifier(name.rpartition(".")[2], default)
    return identifier(found[:1].upper() + found[1:], default)
