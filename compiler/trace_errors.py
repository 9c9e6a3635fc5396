"""What a failed trace means for the user: which line of the model, why, and what to do."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensorMode

from p2bw.compiler.program import TensorType
from p2bw.contract.errors import ModelError, P2BWError
from p2bw.modelfile.usercode import Line

AUTOCAST = (
    "autocast for a device that the example inputs are not on, so it would be left out; write "
    "torch.autocast(x.device.type, dtype=...) for an input x"
)

_ASSERTION = (
    "an assertion on the values in a tensor, which a compiled program cannot check; leave it out, "
    "or write `assert torch.compiler.is_compiling() or ...`"
)


class UntraceableError(ModelError):
    """What a module does cannot be a node of a program; `path` is the module's."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


# Exceptions by which torch says that Python asked for a value that only real data has.
_DATA_DEPENDENT = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "PendingUnbackedSymbolNotFound",
)


def explain(
    error: Exception, step: Any, mode: FakeTensorMode, names: Sequence[str], tensors: list[Tensor]
) -> P2BWError:
    """The error to raise instead of what torch.export raised for a traced step."""
    links = list(chain(error))
    for link in links:
        if isinstance(link, P2BWError):
            return link
    code, factory = step.file.code, step.file.factory
    if any(_needs_values(link) for link in links):
        line = code.line_of(error)
        if line is not None and line.text.startswith("assert"):
            return at(line, _ASSERTION)
        return at(
            line,
            "the model decides by the values in a tensor, which a compiled program cannot do; "
            "compute both ways and choose by torch.where, or move the decision into a submodule of "
            "its own, which then stays one call of your code",
        )
    given = ", ".join(
        f"{name}: {TensorType(tuple(t.shape), t.dtype)}"
        for name, t in zip(names, tensors, strict=True)
    )
    failure = _failure(step, mode, tensors)
    if failure is not None:
        cure = f"the step is {_signatures(step)} on {given}"
        return ModelError(code.describe(failure, f"the training step of {factory}()", cure))
    cure = f"the step runs on {given}, but torch.export cannot trace it"
    return ModelError(code.describe(error, f"tracing {factory}()", cure))


def _signatures(step: Any) -> str:
    """The user's functions that the step calls: "Net.forward(x), then loss(logits, labels)"."""
    steps = [f"{type(step.model).__name__}.forward{_signature(step.model.forward)}"]
    if loss := step.file.function("loss"):
        steps.append(f"loss{_signature(getattr(loss, 'forward', loss))}")
    return ", then ".join(steps)


def _signature(function: Callable[..., Any]) -> str:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    names = [str(p.replace(annotation=p.empty)) for p in parameters]
    return f"({', '.join(names)})" if len(names) <= 8 else f"({', '.join(names[:8])}, ...)"


def at(line: Line | None, message: str) -> ModelError:
    """An error about a line of the user's, with its text."""
    if line is None:
        return ModelError(message)
    return ModelError(f"{line}: {message}\n    {line.text}" if line.text else f"{line}: {message}")


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _needs_values(error: BaseException) -> bool:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return not kinds.isdisjoint(_DATA_DEPENDENT) or ".numpy() is not supported" in str(error)


def _failure(step: Any, mode: FakeTensorMode, tensors: list[Tensor]) -> Exception | None:
    """What the step raises when it just runs: then tracing is not what is wrong."""
    try:
        with mode:
            step(*tensors)
    except Exception as error:
        return error
    return None
