"""A disk whose machine dies at a given operation, and forgets what was never synced."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


class Crash(Exception):
    """The machine is dead: nothing that the program still does has an effect."""


class Disk:
    """Counts what is written, synced, renamed and removed under a folder, and dies when told.

    A loss of power then undoes what no sync has made durable.
    """

    def __init__(self, folder: Path, dies_at: int | None = None) -> None:
        self.folder = str(folder)
        self.dies_at = dies_at
        self.operations = 0
        self.dead = False
        self.unsynced: dict[int, Path] = {}  # inode -> file
        self.names: list[tuple[int, Callable[[], object]]] = []  # folder's inode, how to undo

    def operate(self) -> None:
        if self.operations == self.dies_at:
            self.dead = True
        if self.dead:
            raise Crash
        self.operations += 1

    def lose_power(self, names: slice) -> None:
        """Forget contents that were not synced, and some of the names, in the order of change."""
        for _, undo in reversed(self.names[names]):
            undo()
        inodes = self.inodes()
        for inode in self.unsynced:
            if inode in inodes:
                os.truncate(inodes[inode], 0)

    def inodes(self) -> dict[int, Path]:
        """Where the files are now: the folder around one may have been renamed."""
        return {p.stat().st_ino: p for p in Path(self.folder).rglob("*") if p.is_file()}

    def forget(self, inode: int) -> None:
        if path := self.inodes().get(inode):
            path.unlink()

    @contextmanager
    def mounted(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, getattr(self, f"_{name}")(getattr(os, name)))
            patch.setattr(io, "open", self._open(io.open))
            yield

    def _ours(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def open_(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode or not self._ours(path):
                return real(path, mode, *args, **kwargs)
            self.operate()
            file = real(path, mode, *args, **kwargs)
            inode, parent = os.fstat(file.fileno()).st_ino, os.stat(Path(path).parent).st_ino
            self.unsynced[inode] = Path(path)
            self.names.append((parent, lambda: self.forget(inode)))
            write, first = file.write, True

            def write_(data: Any) -> int:
                """The parts of a file are one operation, of which half may be done."""
                nonlocal first
                try:
                    if first or self.dead:
                        self.operate()
                except Crash:
                    write(bytes(data)[: len(data) // 2])
                    file.flush()
                    raise
                first = False
                return int(write(data))

            return _File(file, write_)

        return open_

    def _fsync(self, _: Callable[..., Any]) -> Callable[..., Any]:
        """Not the real one: it takes long, and of this disk nothing else is to survive."""

        def fsync(handle: int) -> None:
            self.operate()
            inode = os.fstat(handle).st_ino
            self.unsynced.pop(inode, None)
            self.names = [entry for entry in self.names if entry[0] != inode]

        return fsync

    def _rename(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def rename(old: Any, new: Any) -> None:
            self.operate()
            real(old, new)
            parent = os.stat(Path(new).parent).st_ino
            self.names.append((parent, lambda: _quietly(real, new, old)))

        return rename

    def _mkdir(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
            self.operate()
            real(path, *args, **kwargs)

        return mkdir

    _unlink = _rmdir = _mkdir


class _File:
    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _quietly(act: Callable[..., object], *args: object) -> None:
    with suppress(OSError):
        act(*args)
