"""The artifact folder: written beside its final place and renamed, so a failure leaves the old."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from p2bw.contract.errors import P2BWError, ResourceError, UsageError

_MARK = "plan.json"  # what tells an artifact from a folder that is somebody's own
_OF_RUNS = ("checkpoints", "metrics.jsonl")  # what the runtime keeps there: days of training


def check_destination(out: Path) -> None:
    """Refuse, before any long work, a destination that could not be written or is not ours."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"--out {out} exists and is not a folder; name another")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise UsageError(f"--out {out} holds files that are no artifact of p2bw; name another")
    _check_parents("--out", out)


def _check_parents(option: str, path: Path) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written: {parent} is not a writable folder")


def check_file(option: str, path: Path) -> None:
    """Refuse, before any long work, a file that could not be written."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file")
    _check_parents(option, path)


def write_file(path: Path, text: str) -> None:
    """Write all of a file, or leave it as it was."""
    folder = path.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder) as scratch:
            fresh = Path(scratch, path.name)
            fresh.write_bytes(text.encode())
            fresh.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from None


def write_artifact(out: Path, files: Mapping[str, str | bytes | Path]) -> None:
    """Make `out` hold `files` and what runs left there, nothing else.

    By relative name: the content, or a file to copy. Or leave it as it was.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            fresh, old = Path(scratch, "new"), Path(scratch, "old")
            for name, content in files.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, path)
                else:
                    path.write_bytes(content.encode() if isinstance(content, str) else content)
            if out.exists():
                out.rename(old)
            try:
                _move(_OF_RUNS, old, fresh)
                fresh.rename(out)
            except BaseException:
                if old.exists():
                    _move(_OF_RUNS, fresh, old)
                    old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(out, error) from None


def _move(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            (source / name).rename(target / name)


def _cannot_write(path: Path, error: OSError) -> P2BWError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"no space left to write {path}; what was there is kept")
    return UsageError(f"cannot write {path}: {error.strerror}")
