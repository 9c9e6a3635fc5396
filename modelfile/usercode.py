"""Running the user's code: its prints stay off stdout, its failures name the user's own line."""

import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from p2bw.contract.errors import ModelError, P2BWError

_STDLIB = sysconfig.get_paths()["stdlib"]
_TORCH = str(Path(torch.__file__).parent)
_ROOT = Path(__file__).parent.parent
_PARTS = ("cli", "compiler", "contract", "modelfile", "passes", "runtime", "telemetry")
# In a checkout the subpackages lie beside other folders, such as examples/.
_OURS = (_ROOT,) if _ROOT.name == "p2bw" else tuple(_ROOT / part for part in _PARTS)
_NOT_THE_USERS = tuple(f"{directory}{os.sep}" for directory in (*_OURS, _TORCH))
_SENTENCE = 200  # characters


@dataclass(frozen=True, slots=True)
class Line:
    """A line of source; prints as "gpt.py:52", without the directories of this machine."""

    file: str
    number: int
    label: str

    @property
    def text(self) -> str:
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        return f"{self.label}:{self.number}"


@dataclass(frozen=True, slots=True)
class UserCode:
    """Tells the user's source files (those under the model file's directory) from all others."""

    directory: str
    name: str  # of the model file

    def owns(self, file: str) -> bool:
        return (
            file.startswith(self.directory + os.sep)
            and not is_installed(file)
            and not file.startswith(_NOT_THE_USERS)
        )

    def line(self, file: str, number: int) -> Line | None:
        """A line of the user's own or of a library of models; None for torch, Python and us."""
        if self.owns(file):
            return Line(file, number, Path(os.path.relpath(file, self.directory)).as_posix())
        if file.startswith((*_NOT_THE_USERS, "<")):
            return None
        if file.startswith(_STDLIB + os.sep) and not is_installed(file):
            return None
        return Line(file, number, os.path.basename(file))

    def line_of(self, error: BaseException) -> Line | None:
        """The innermost of the user's own lines that led to an error, else of a library's."""
        library = None
        for traceback in _tracebacks(error):
            for file, number in reversed(_frames(traceback)):
                line = self.line(file, number)
                if line and self.owns(file):
                    return line
                library = library or line
        return library

    def running(self, what: str) -> "_Running":
        """Run the user's code; whatever it raises becomes a ModelError that says where and why."""
        return _Running(self, what)

    def describe(self, error: BaseException, what: str, cure: str = "") -> str:
        """Place, what failed, why and the line itself, as one message."""
        line = self.line_of(error)
        if isinstance(error, SystemExit):
            reason = f"called sys.exit({'' if error.code is None else repr(error.code)})"
        else:
            reason = f"raised {type(error).__name__}"
            if first := _gist(error):
                reason += f": {first}"
        message = f"{line or self.name}: {what} {reason}"
        if line and line.text:
            message += f"\n    {line.text}"
        return f"{message}\n{cure}" if cure else message


class _Running:
    """A class, as @contextmanager takes several times as long, and data() is run so each time."""

    __slots__ = ("code", "stdout", "what")

    def __init__(self, code: UserCode, what: str) -> None:
        self.code, self.what = code, what

    def __enter__(self) -> None:
        self.stdout, sys.stdout = sys.stdout, sys.stderr

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        sys.stdout = self.stdout
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, P2BWError):
            raise ModelError(self.code.describe(error, self.what)) from error


def _gist(error: BaseException) -> str:
    """The first line of what an error says; all of it if the rest is no more than a sentence."""
    first, _, rest = str(error).strip().partition("\n")
    goes_on = first.endswith((":", ",")) and len(rest) <= _SENTENCE
    return " ".join(f"{first} {rest}".split()) if goes_on else first


def is_installed(file: str) -> bool:
    """Whether a file is of a package that was installed."""
    return "site-packages" in file or "dist-packages" in file


def _tracebacks(error: BaseException) -> Iterator[TracebackType]:
    """An error's own traceback, then those of the errors that it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if current.__traceback__:
            yield current.__traceback__
        current = current.__cause__ or current.__context__


def _frames(traceback: TracebackType | None) -> list[tuple[str, int]]:
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return frames
