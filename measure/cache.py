"""Results that are kept from one profile to the next, by a digest of all that decides them."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from p2bw.compiler.artifact import write_file
from p2bw.compiler.plan import Data
from p2bw.contract.errors import P2BWError

Kept = TypeVar("Kept", bound=Data)


class Cache:
    """A folder of JSON files; what cannot be read or written is measured again, and no error."""

    def __init__(self, environment: Iterable[object], *, fresh: bool = False) -> None:
        """`environment` is part of every digest; `fresh` reads nothing that was there before."""
        self.environment = "\n".join(map(str, environment))
        self.fresh = fresh

    def path(self, key: Iterable[object]) -> Path:
        text = "\n".join((self.environment, *map(str, key)))
        return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"

    def get(self, kind: type[Kept], key: Iterable[object]) -> Kept | None:
        if self.fresh:
            return None
        try:
            return kind.model_validate_json(self.path(key).read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, key: Iterable[object], value: Data) -> None:
        try:
            write_file(self.path(key), value.model_dump_json())
        except P2BWError:
            return  # a full disk, or no home: it only has to be measured again


def cache_folder() -> Path:
    """Where the user's system wants such files (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "p2bw" / "profile"
