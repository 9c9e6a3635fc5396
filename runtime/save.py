"""The trained weights as safetensors files, by the names that the user's model gives them."""

import errno
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from p2bw.runtime.errors import ResourceError, UsageError
from p2bw.runtime.plan import Plan


def prepare_folder(folder: Path) -> None:
    """Find out before the training, not after it, that its weights cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--save {folder} cannot be written: {error.strerror}") from None


def save_stage(
    folder: Path, plan: Plan, stage: int, state: Mapping[str, Tensor], taken: Collection[str]
) -> dict[str, Any]:
    """Write one stage's part, except the names `taken` by others; what is in the file.

    A tied parameter is written under each of its names, so that the files together are exactly
    the model's own state_dict.
    """
    aliases = {name: tied.names for tied in plan.tied for name in tied.names}
    taken = {alias for name in taken for alias in aliases.get(name, (name,))}
    tensors = {}
    for name, tensor in state.items():
        for alias in aliases.get(name, (name,)):
            if alias not in taken:
                tensors[alias] = tensor.detach().cpu().contiguous().clone()
    file = f"model-{stage + 1:05}-of-{plan.depth:05}.safetensors"
    with _writing(folder / file) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})
    return {
        "file": file,
        "names": sorted(tensors),
        "bytes": sum(t.nbytes for t in tensors.values()),
    }


def write_index(folder: Path, parts: Sequence[Mapping[str, Any]]) -> None:
    """Say which file holds which tensor, as Hugging Face's index files do."""
    index = {
        "metadata": {"total_size": sum(part["bytes"] for part in parts)},
        "weight_map": {name: part["file"] for part in parts for name in part["names"]},
    }
    with _writing(folder / "model.safetensors.index.json") as beside:
        beside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A place beside a file, renamed to it at the end: a failure leaves no half of it."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left to write {path}") from None
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
