"""Whether anything fits at all: the whole search, asked for no more than that."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from p2bw.compiler.placement.candidates import Model, make_models
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.levels import search_models
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.problem import PlacementProblem
from p2bw.contract.errors import InfeasibleError, ModelError, UsageError

DETERMINISTIC_S = 20.0  # of CP-SAT for all cures
ONE_S = 2.0  # of that, for one question
WALL_S = 60.0  # for all cures: on thousands of devices a question takes seconds


@dataclass(frozen=True, slots=True)
class Request:
    """What `solve` was asked: which shapes of which problems."""

    problems: tuple[PlacementProblem, ...]  # by microbatch size
    depths: tuple[int, ...] | None
    widths: tuple[int, ...] | None
    recompute: Recompute
    # The problem at other microbatch sizes.
    sizes: Mapping[int, PlacementProblem] | Callable[[int], PlacementProblem]

    @property
    def problem(self) -> PlacementProblem:
        return self.problems[0]

    def changed(self, **fields: object) -> "Request":
        """With other fields in all problems."""
        return replace(self, problems=tuple(p.model_copy(update=fields) for p in self.problems))

    def at(self, size: int) -> PlacementProblem | None:
        """The problem at a microbatch size, if there is one."""
        if isinstance(self.sizes, Mapping):
            return self.sizes.get(size)
        try:
            return self.sizes(size)
        except ModelError:  # some models refuse some sizes
            return None


class Oracle:
    """Says of a request whether anything fits; None: not settled within the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = replace(limits, any_will_do=True)
        self._left = min(DETERMINISTIC_S, limits.deterministic_s)
        self._end = time.monotonic() + WALL_S
        self._key: object = None
        self._models: list[Model] = []

    def __call__(self, request: Request) -> bool | None:
        if self._limits.stop() or time.monotonic() > self._end:
            return None
        limits = replace(self._limits, deterministic_s=max(0.0, min(self._left, ONE_S)))
        widths = request.widths
        if widths is None and request.problem.topology.uniform:
            widths = (1,)  # one replica needs the least memory, and the layout decides nothing
        try:
            models = self.models(request)
            search = search_models(models, request.depths, widths, limits)
        except (InfeasibleError, UsageError):  # contradictory, or too many stages to ask for
            return False
        self._left -= search.spent
        if search.best is not None:
            return True
        return None if search.open() else False

    def models(self, request: Request) -> list[Model]:
        """Of the sizes of microbatch that are not ruled out with another one."""
        key = (tuple(map(id, request.problems)), request.recompute)
        if self._key != key:
            problems = _least(request.problems)
            self._models = make_models(problems, request.recompute, self._limits.ideals)
            self._key = key
            self._problems = request.problems  # kept, so that their ids stay theirs
        return self._models


def _least(problems: Sequence[PlacementProblem]) -> list[PlacementProblem]:
    """Without those that need as much as another everywhere, or more: they fit only if it does."""
    kept: list[PlacementProblem] = []
    for problem in problems:
        if not any(_is_no_more(known, problem) for known in kept):
            kept.append(problem)
    return kept


def _is_no_more(one: PlacementProblem, other: PlacementProblem) -> bool:
    """The same blocks, tensors and parameters, none of them larger."""
    if [(t.producer, t.consumers) for t in one.tensors] != [
        (t.producer, t.consumers) for t in other.tensors
    ] or [p.blocks for p in one.parameters] != [p.blocks for p in other.parameters]:
        return False
    first, second = _sizes(one), _sizes(other)
    return len(first) == len(second) and all(map(int.__le__, first, second))


def _sizes(problem: PlacementProblem) -> list[int]:
    found = [b.stash_bytes for b in problem.blocks]
    found += [b.transient_bytes for b in problem.blocks]
    found += [b.buffer_bytes for b in problem.blocks]
    for p in problem.parameters:
        found += [p.bytes, p.gradient_bytes, p.optimizer_bytes]
    for t in problem.tensors:
        found += [t.bytes, t.gradient_bytes, int(t.saved)]
    return found
