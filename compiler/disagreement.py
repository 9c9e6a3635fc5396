"""Which operation of a traced program gives something else than the user's own code does.

What Python computes while a model is traced stays what it was then: a counter of calls, a switch
that is thrown later. Nothing in the graph tells; the values do, at the latest in the second call.
"""

from functools import partial
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.interpret import interpret
from p2bw.compiler.program import Program
from p2bw.compiler.seeded import SEED, seeded_random
from p2bw.compiler.trace import trace
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import flatten_microbatch
from p2bw.passes.execute import flatten_tensors

_Print = tuple[Any, ...]


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down each operator that runs, with what tells its results from others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node: fx.Node | None = None  # the one that runs now
        self.prints: list[tuple[fx.Node | None, _Print]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in flatten_tensors(result):
            if tensor.dtype.is_floating_point:
                values = tensor.detach().double()
                sums = values.sum().item(), values.abs().sum().item()
                self.prints.append((self.node, (func, tuple(tensor.shape), *map(repr, sums))))
        return result


def differing_operation(file: ModelFile, microbatch: int, calls: int) -> str | None:
    """The first operation that differs in one of so many calls of the model; None if none does.

    An operation agrees if the same one gave the same when the user's model ran.
    """
    program = trace(file, microbatch)
    opaque = dict.fromkeys(call.path for call in program.opaque.values())
    torch.manual_seed(SEED)
    eager = file.model()
    torch.manual_seed(SEED)
    traced = file.model()
    for call in range(calls):
        torch.manual_seed(SEED + 1 + call)
        inputs, targets = file.inputs(microbatch), file.targets(microbatch)
        with torch.no_grad(), seeded_random(count(), eager, opaque), _Log() as there:
            file.call(eager, inputs, targets)
        log = _Log()
        with torch.no_grad(), seeded_random(count(), traced, opaque), log:
            enter = partial(setattr, log, "node")
            interpret(program, traced, flatten_microbatch(inputs, targets), enter)
        known = {made for _, made in there.prints}
        for node, made in log.prints:
            if made not in known and node is not None:
                return _describe(program, node)
    return None


def _describe(program: Program, node: fx.Node) -> str:
    facts = program.facts[node.name]
    module = facts.scopes[-1].path if facts.scopes else ""
    name = str(getattr(node.target, "_opname", node.name)).strip("_")
    place = f"{facts.source}: " if facts.source else ""
    return f"{place}{name}{f' in {module}' if module else ''}"
