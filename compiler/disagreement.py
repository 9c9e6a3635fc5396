"""Which operation of a traced program gives something else than the user's own code does.

What Python computes while a model is traced stays what it was then: a counter of calls, a switch
that is thrown later. Nothing in the graph tells; the values do, at the latest in the second call.
"""

from collections.abc import Callable, Set
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.interpret import interpret
from p2bw.compiler.program import Program
from p2bw.compiler.seeded import SEED, seeded_random
from p2bw.compiler.trace_env import plain_checkpoints
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import flatten_microbatch
from p2bw.passes.execute import flatten_tensors

_Print = tuple[Any, ...]


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands each operator that runs to `see`: what tells its results from others, and its calls."""

    def __init__(self, see: Callable[[_Print, Any, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in flatten_tensors(result):
            if tensor.dtype.is_floating_point:
                values = tensor.detach().double()
                sums = values.sum().item(), values.abs().sum().item()
                made = func, tuple(tensor.shape), *map(repr, sums)
                self.see(made, (args, kwargs), tensor)
        return result


class _Search:
    """Runs through a program until an operation gives what eager PyTorch did not."""

    def __init__(self, known: Set[_Print], rounding: bool) -> None:
        self.known = known
        self.rounding = rounding
        self.node: fx.Node | None = None  # the one that runs now
        self.found: fx.Node | None = None

    def enter(self, node: fx.Node) -> None:
        self.node = node

    def see(self, made: _Print, arguments: Any, result: Tensor) -> None:
        if self.found or made in self.known or (self.rounding and _moved(arguments, result)):
            return
        self.found = self.node


def _moved(arguments: Any, result: Tensor) -> bool:
    """An operator that only moves the values of its arguments cannot have rounded any."""
    values = [t.detach().flatten() for t in flatten_tensors(arguments) if t.dtype == result.dtype]
    return bool(values) and bool(torch.isin(result.detach(), torch.cat(values)).all())


def differing_operation(
    file: ModelFile, program: Program, microbatch: int, calls: int, *, rounding: bool
) -> str:
    """The first operation that differs in one of so many calls of the model; "" if none does.

    An operation agrees if the same one gave the same when the user's model ran. For differences
    in `rounding` only those that compute count, and not those that lay their operands out.
    """
    opaque = dict.fromkeys(call.path for call in program.opaque.values())
    torch.manual_seed(SEED)
    eager = file.model()
    torch.manual_seed(SEED)
    traced = file.model()
    for call in range(calls):
        torch.manual_seed(SEED + 1 + call)
        inputs, targets = file.inputs(microbatch), file.targets(microbatch)
        known: set[_Print] = set()
        log = _Log(lambda made, *_, known=known: known.add(made))
        with plain_checkpoints(file.code), seeded_random(count(), eager, opaque), log:
            file.call(eager, inputs, targets)
        search = _Search(known, rounding)
        with seeded_random(count(), traced, opaque), _Log(search.see):
            interpret(program, traced, flatten_microbatch(inputs, targets), search.enter)
        if search.found is not None:
            return _describe(program, search.found)
    return ""


def _describe(program: Program, node: fx.Node) -> str:
    facts = program.facts[node.name]
    module = facts.scopes[-1].path if facts.scopes else ""
    name = str(getattr(node.target, "_opname", node.name)).strip("_")
    place = f"{facts.source}: " if facts.source else ""
    return f"{place}{name}{f' in {module}' if module else ''}"
