"""Files that outlive a loss of power, with their sums; safetensors written one tensor at a time."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2bw.contract.errors import ResourceError, UsageError

_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.bool: "BOOL", torch.complex64: "C64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}


def write_tensors(
    path: Path,
    like: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> tuple[int, str]:
    """Write a safetensors file and sync it: its bytes and SHA-256.

    `like` has the tensors' shapes and dtypes, on any device, and `read` gives their values, each
    only while it is written: safetensors' own save_file wants all of them at once.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = sorted(like, key=lambda name: (-like[name].itemsize, name))  # so that each is aligned
    end = 0
    for name in names:
        tensor, start = like[name], end
        end += tensor.nbytes
        if tensor.dtype not in _DTYPES:
            raise UsageError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (read(name).contiguous().view(-1).view(torch.uint8).numpy().data for name in names)
    return write_synced(path, chain([len(text).to_bytes(8, "little") + text], data))


def write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file whose content outlives a loss of power: its bytes and SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """After this, the names in a folder outlive a loss of power too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do this
            raise
    finally:
        os.close(handle)


@contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A place beside a file, renamed to it at the end: a failure leaves no half of it."""
    beside = path.with_name(f".{path.name}.new")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Says what cannot be written, and why."""
    try:
        yield
    except OSError as error:
        path = error.filename or place
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left to write {path}") from None
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
