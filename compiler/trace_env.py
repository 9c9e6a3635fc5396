"""The surroundings in which a model is traced: what torch.export would get wrong, put right."""

import importlib
import logging
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import fx

from p2bw.compiler.trace_errors import AUTOCAST, at
from p2bw.contract.errors import ModelError
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.usercode import UserCode


@contextmanager
def tracing(file: ModelFile, notes: dict[str, None]) -> Iterator[None]:
    """Everything below at once; `notes` gets what the user should know of the trace."""
    with ExitStack() as stack:
        stack.enter_context(quiet(file.code))
        stack.enter_context(refuse_custom_functions(file.code))
        stack.enter_context(frozen_randomness(file))
        stack.enter_context(recording_lines(file.code))
        stack.enter_context(plain_regions())
        stack.enter_context(plain_checkpoints(file.code, notes))
        yield


@contextmanager
def as_in_eager(asked: set[str]) -> Iterator[None]:
    """Let the model's own code behave as if it were not exported, as it will when it trains.

    Hugging Face models build an explicit causal mask when torch.compiler.is_exporting(): another
    kernel, slower, with other rounding. `asked` gets the modules that wanted to know.
    """
    original = torch.compiler.is_exporting

    def is_exporting() -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "torch":
            return original()
        asked.add(caller)
        return False

    with mock.patch.object(torch.compiler, "is_exporting", is_exporting):
        yield


@contextmanager
def plain_regions() -> Iterator[None]:
    """Keep the switches of grad mode and autocast as calls in the graph.

    torch.export would move the regions between them into submodules, and on the way loses a
    no_grad inside of an autocast: its gradients would be wrong.
    """
    passes = [
        importlib.import_module(f"torch._export.passes.{name}")
        for name in ("replace_set_grad_with_hop_pass", "replace_autocast_with_hop_pass")
    ]
    with ExitStack() as stack:
        for module in passes:
            name = module.__name__.rpartition(".")[2]
            stack.enter_context(mock.patch.object(module, name, lambda *unchanged: unchanged))
        yield


@contextmanager
def plain_checkpoints(code: UserCode, notes: dict[str, None] | None = None) -> Iterator[None]:
    """Let torch.utils.checkpoint just call what it is given, and note where that is.

    Traced, it would save no memory, and in its older form (use_reentrant=True) lose gradients.
    """

    def note() -> None:
        frame: FrameType | None = sys._getframe(2)
        line = None
        while frame is not None and line is None:
            line = code.line(frame.f_code.co_filename, frame.f_lineno)
            frame = frame.f_back
        if notes is not None:
            notes[
                f"{line}: torch.utils.checkpoint does nothing in a stage; the plan decides which "
                f"stages run their forward again (--recompute)"
            ] = None

    def reentrant(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        note()
        return function(*args)

    def generator(*arguments: Any, **keywords: Any) -> Iterator[None]:
        note()
        yield

    module: Any = torch.utils.checkpoint
    with (
        mock.patch.object(module.CheckpointFunction, "apply", reentrant),
        mock.patch.object(module, "_checkpoint_without_reentrant_generator", generator),
    ):
        yield


@contextmanager
def recording_lines(code: UserCode) -> Iterator[None]:
    """Record for each node the innermost line that is not torch's, be it in forward or not."""
    step = str(Path(__file__).with_name("trace.py"))  # what calls that, is not the model's code

    def innermost(_: object, frames: traceback.StackSummary) -> traceback.StackSummary:
        for frame in reversed(frames):
            if frame.filename == step:
                break
            if code.line(frame.filename, frame.lineno or 0):
                return traceback.StackSummary.from_list([frame])
        return traceback.StackSummary()

    with mock.patch.object(fx.proxy.TracerBase, "_filter_traceback_frames", innermost):
        yield


@contextmanager
def refuse_custom_functions(code: UserCode) -> Iterator[None]:
    """Refuse calls of torch.autograd.Function classes that are not torch's own.

    torch.export traces through their forward and drops their backward without a word, which
    gives wrong gradients.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") and torch.is_grad_enabled():
            frame: FrameType | None = sys._getframe(1)
            line = None
            while frame is not None and line is None:
                line = code.line(frame.f_code.co_filename, frame.f_lineno)
                frame = frame.f_back
            raise at(
                line,
                f"{cls.__qualname__} is a torch.autograd.Function, whose backward tracing would "
                f"drop; write it with differentiable operators (x + (f(x) - x).detach() passes a "
                f"gradient straight through f), or call it in a submodule of its own, which then "
                f"stays one call of your code",
            )
        return original.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


class _WithoutTorch:
    """A stream that leaves out what torch itself prints (graphs, when a trace fails)."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "torch":
            return len(text)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet(code: UserCode) -> Iterator[None]:
    """Keep the tracer's warnings, logs and prints away from the terminal, stdout for results."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    stderr = cast(TextIO, _WithoutTorch(sys.stderr))
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            redirect_stderr(stderr),
            redirect_stdout(stderr),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        logger.setLevel(level)
    for warning in caught:
        if "Disabling autocast" in str(warning.message):
            raise at(code.line(warning.filename, warning.lineno), AUTOCAST)


@contextmanager
def frozen_randomness(file: ModelFile) -> Iterator[None]:
    """Refuse a forward that draws Python or NumPy random numbers: a trace would freeze them."""
    numpy: Any = sys.modules.get("numpy")

    def states() -> Iterable[tuple[str, Any]]:
        yield "Python's random", random.getstate()
        if numpy:
            kind, key, *rest = numpy.random.get_state()
            yield "numpy.random", (kind, key.tobytes(), *rest)

    before = list(states())
    yield
    for (name, old), (_, new) in zip(before, states(), strict=True):
        if old != new:
            raise ModelError(
                f"{file.path.name}: forward draws numbers from {name}, and a compiled program "
                f"would repeat the same ones for ever; draw them with torch, such as torch.rand"
            )
