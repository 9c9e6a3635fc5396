"""judge: the exact numbers of a placement with its best choice of recomputation and of relays.

A tensor that skips stages goes straight to its readers, or every stage on the way passes it on:
that costs these stages memory and their links bytes, but nothing waits for several periods, and no
slow way between distant devices is taken.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from p2bw.compiler.placement.evaluate import Evaluation, Shape, choose_recompute, evaluate
from p2bw.compiler.placement.instance import Instance

MAX_SETS = 32  # sets of relayed tensors that are all tried; with more, one tensor at a time

Relayed = frozenset[int]  # edges


@dataclass(frozen=True, slots=True)
class Judgement:
    """A placement's numbers, and the choices that they are for."""

    evaluation: Evaluation
    recompute: tuple[bool, ...]
    relayed: Relayed

    @property
    def order(self) -> tuple[bool, float, int, list[int]]:
        """Less is better: fits, busy for less, fewer relays."""
        found = self.evaluation
        return not found.feasible, found.busiest_s, len(self.relayed), sorted(self.relayed)


def judge(
    instance: Instance,
    shape: Shape,
    stages: Sequence[int],
    policy: Literal["auto", "always", "never"],
    start: Relayed = frozenset(),
) -> Judgement:
    """The best choices for a placement; of `start`, and what is near it, where they are many.

    Where nothing gets busier, gradients of many terms go the way that adds them as eager does.
    """

    def numbers(relayed: Relayed) -> Judgement:
        again = choose_recompute(instance, shape, stages, policy, relayed)
        return Judgement(evaluate(instance, shape, stages, again, relayed), again, relayed)

    skipping = skips(instance, stages)
    if not skipping:
        return numbers(frozenset())
    best = _fastest(instance, shape, stages, policy, start, skipping, numbers)
    several = {
        i for i in skipping if instance.edges[i].ordered and _readers(instance, stages, i) > 1
    }
    if several - best.relayed:
        tidy = numbers(best.relayed | several)
        if tidy.order[:2] <= best.order[:2]:
            return tidy
    return best


def _readers(instance: Instance, stages: Sequence[int], edge: int) -> int:
    """How many stages beyond the producer's read a tensor."""
    found = instance.edges[edge]
    return len({stages[c] for c in found.consumers} - {stages[found.producer]})


def _fastest(
    instance: Instance,
    shape: Shape,
    stages: Sequence[int],
    policy: Literal["auto", "always", "never"],
    start: Relayed,
    skipping: Sequence[int],
    numbers: Callable[[Relayed], Judgement],
) -> Judgement:
    best = numbers(frozenset())
    # However they go, everything is as busy as without them.
    others = tuple(edge for i, edge in enumerate(instance.edges) if i not in set(skipping))
    least = evaluate(
        replace(instance, edges=others), shape, stages, (policy == "always",) * shape.depth
    ).busiest_s * (1 + 1e-9)

    def settled(found: Judgement) -> bool:
        return found.evaluation.feasible and found.evaluation.busiest_s <= least

    if settled(best):
        return best
    if 2 ** len(skipping) <= MAX_SETS:
        sets = (
            frozenset(chosen)
            for size in range(1, len(skipping) + 1)
            for chosen in combinations(skipping, size)
        )
        return min((best, *map(numbers, sets)), key=lambda found: found.order)
    for first in (start & set(skipping), frozenset(skipping)):
        best = min(best, numbers(frozenset(first)), key=lambda found: found.order)
    while not settled(best):
        tried = [numbers(best.relayed ^ {edge}) for edge in skipping]
        better = min(tried, key=lambda found: found.order)
        if better.order >= best.order:
            break
        best = better
    return best


def skips(instance: Instance, stages: Sequence[int]) -> list[int]:
    """The edges with a reader beyond the stage after the producer's."""
    return [
        i
        for i, edge in enumerate(instance.edges)
        if max(stages[c] for c in edge.consumers) > stages[edge.producer] + 1
        and (edge.bytes or edge.gradient)
    ]


def relayed_tensors(instance: Instance, relayed: Collection[int]) -> tuple[str, ...]:
    """The names of the tensors of such edges, in the problem's order."""
    names = {name for i in relayed for name in instance.edges[i].names}
    return tuple(t.name for t in instance.problem.tensors if t.name in names)
