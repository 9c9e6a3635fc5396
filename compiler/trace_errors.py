"""What a failed trace means for the user: which line of the model, why, and what to do."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensorMode

from p2bw.compiler.program import TensorType
from p2bw.runtime.errors import ModelError, P2BWError
from p2bw.runtime.usercode import Line

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
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, P2BWError):
            return link
    code, factory = step.file.code, step.file.factory
    if any(_is_data_dependent(link) for link in chain):
        line = code.line_of(error)
        return at(
            line,
            f"the model of {factory}() decides by the values in a tensor, which a compiled program "
            f"cannot do; use torch.where or a mask to compute both ways, or move the decision out "
            f"of forward",
        )
    given = ", ".join(
        f"{name}: {TensorType(tuple(t.shape), t.dtype)}"
        for name, t in zip(names, tensors, strict=True)
    )
    failure = _failure(step, mode, tensors)
    if failure is not None:
        return ModelError(code.describe(failure, f"the training step of {factory}()", given))
    cure = f"{given}\nit runs as it is, but torch.export cannot trace it"
    return ModelError(code.describe(error, f"tracing {factory}()", cure))


def at(line: Line | None, message: str) -> ModelError:
    """An error about a line of the user's, with its text."""
    if line is None:
        return ModelError(message)
    return ModelError(f"{line}: {message}\n    {line.text}" if line.text else f"{line}: {message}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _is_data_dependent(error: BaseException) -> bool:
    return any(kind.__name__ in _DATA_DEPENDENT for kind in type(error).__mro__)


def _failure(step: Any, mode: FakeTensorMode, tensors: list[Tensor]) -> Exception | None:
    """What the step raises when it just runs: then tracing is not what is wrong."""
    try:
        with mode:
            step(*tensors)
    except Exception as error:
        return error
    return None
