"""Dynamic program over ideals: the best chain of steps for one shape of pipeline.

What a step costs is exact but for four things that depend on other stages: how far a tensor that
skips stages travels, how many stages read one tensor, what else uses a node's uplink, and how
many stages hold a tied parameter. Each of these is taken at its least, so the optimum over all
ideals is a lower bound, and proves a placement that attains it.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np

from p2bw.compiler.placement.evaluate import Shape, ring_bytes
from p2bw.compiler.placement.ideals import Floats, Steps, chain_to_stages
from p2bw.compiler.placement.instance import Instance

Recompute = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What each step costs as a stage: busiest resource in seconds, or infinity if it cannot be.

    Without a shape: at no less than any shape would cost, that is, without updates' shares and
    networks.
    """

    instance: Instance
    steps: Steps
    recompute: Recompute
    shape: Shape | None
    kept_s: Floats  # stash kept
    again_s: Floats  # forward recomputed
    fixed: Floats  # bytes besides weights and what is in flight
    uplinks: tuple[tuple[tuple[float, ...], ...], ...]  # by stage, see _uplinks

    def memory(self, in_flight: int, again: bool) -> Floats:
        steps = self.steps
        total = self.fixed + self.instance.versions(in_flight) * steps.weights
        if again:
            return total + steps.stash + in_flight * steps.received
        return total + in_flight * (steps.stash + steps.saved)

    def seconds(self, in_flight: int, room: int) -> Floats:
        """Cost of each step with `room` bytes and so many microbatches in flight."""
        cost = np.full(len(self.steps.source), np.inf)
        if self.recompute != "never":
            np.copyto(cost, self.again_s, where=self.memory(in_flight, True) <= room)
        if self.recompute != "always":
            np.copyto(cost, self.kept_s, where=self.memory(in_flight, False) <= room)
        return cost

    def stage(self, k: int, slack: Sequence[int]) -> Floats:
        """Cost of each step as stage k of the shape, `slack` bytes of its memory kept free."""
        assert self.shape is not None
        instance, steps = self.instance, self.steps
        cost = self.seconds(instance.in_flight(k, self.shape.depth), instance.limit - slack[k])
        cost[(steps.pinned >= 0) & (steps.pinned != k)] = np.inf
        ring = self._ring()
        for up, down, around, bandwidth in self.uplinks[k]:
            out = up * steps.sent + down * steps.received_gradient + around * ring
            into = down * steps.received + up * steps.sent_gradient + around * ring
            np.maximum(cost, np.maximum(out, into) / bandwidth, out=cost)
        return cost

    def _ring(self) -> Floats:
        assert self.shape is not None
        m = self.instance.problem.microbatches_at(self.shape.depth)
        return self.steps.gradients * ring_bytes(1, self.shape.width, m)


def step_costs(
    instance: Instance, steps: Steps, recompute: Recompute, shape: Shape | None = None
) -> StepCosts:
    """The costs that do not depend on the stage's number, added up."""
    out = steps.sent + steps.received_gradient
    into = steps.received + steps.sent_gradient
    update_s = np.zeros(len(out))
    uplinks: tuple[tuple[tuple[float, ...], ...], ...] = ()
    if shape is not None:
        m = instance.problem.microbatches_at(shape.depth)
        update_s = steps.update_s / m
        shared = ring_bytes(1, shape.width, m) * steps.gradients
        shared += ring_bytes(1, 2, m) * steps.exchanged
        out, into = out + shared, into + shared
        uplinks = tuple(_uplinks(instance, shape, k) for k in range(shape.depth))
    port_s = np.maximum(out, into) / instance.problem.topology.levels[0].bandwidth
    compute_s = steps.forward_s + steps.backward_s
    return StepCosts(
        instance,
        steps,
        recompute,
        shape,
        kept_s=np.maximum(compute_s + update_s, port_s),
        again_s=np.maximum(compute_s + steps.forward_s + update_s, port_s),
        fixed=instance.reserve
        + steps.gradients
        + steps.optimizer
        + steps.buffers
        + steps.transient
        + steps.received
        + steps.received_gradient
        + steps.sent
        + steps.sent_gradient,
        uplinks=uplinks,
    )


def _uplinks(instance: Instance, shape: Shape, k: int) -> tuple[tuple[float, ...], ...]:
    """What stage k puts on the port of each group of ranks that holds some of its replicas.

    Each entry: replicas whose next stage, whose previous stage, and whose ring neighbour lies
    outside the group, and the port's bandwidth. Ranks grow with the stage, so that what goes
    beyond the next stage leaves the group wherever the next stage does.
    """
    topology = instance.problem.topology
    found: set[tuple[float, ...]] = set()
    for level in range(1, len(topology.levels)):
        counts: dict[int, list[int]] = {}
        for replica in range(shape.width):
            own = topology.unit(shape.rank(k, replica), level)
            peers = (
                (min(k + 1, shape.depth - 1), replica),
                (max(k - 1, 0), replica),
                (k, (replica + 1) % shape.width),
            )
            mine = counts.setdefault(own, [0, 0, 0])
            for kind, peer in enumerate(peers):
                mine[kind] += topology.unit(shape.rank(*peer), level) != own
        for count in counts.values():
            if any(count):
                found.add((*map(float, count), topology.levels[level].bandwidth))
    return tuple(sorted(found))


@dataclass(frozen=True, slots=True)
class Chain:
    """A solution: the least bottleneck and the stage of each group."""

    seconds: float
    stages: tuple[int, ...]


def best_chain(costs: StepCosts, slack: Sequence[int], upper: float) -> Chain | None:
    """The least bottleneck, if at most `upper`; ties by bytes crossing, balance, early stages."""
    assert costs.shape is not None
    rest = _Last(costs.steps, 0.0)
    for k in reversed(range(costs.shape.depth)):
        rest = rest.before(np.maximum(costs.stage(k, slack), rest.after))
    best = float(rest.values[0])
    if not best <= upper or best == np.inf:
        return None
    return Chain(best, _tidiest(costs, slack, best))


def least_by_depth(costs: StepCosts, depth: int) -> list[float]:
    """A lower bound on the bottleneck of pipelines of 1 .. depth stages, of any width and layout.

    One sweep from the back gives all depths: what a stage keeps in flight depends on the number
    of stages after it.
    """
    limit = costs.instance.limit

    def cost(left: int) -> Floats:
        return costs.seconds(costs.instance.in_flight(0, left), limit)

    return _sweep(costs.steps, depth, cost)


def least_memory_by_depth(costs: StepCosts, depth: int) -> list[float]:
    """A lower bound on the bytes that the fullest device of 1 .. depth stages needs."""

    def cost(left: int) -> Floats:
        in_flight = costs.instance.in_flight(0, left)
        if costs.recompute != "auto":
            return costs.memory(in_flight, costs.recompute == "always")
        return np.minimum(costs.memory(in_flight, False), costs.memory(in_flight, True))

    return _sweep(costs.steps, depth, cost)


def _sweep(steps: Steps, depth: int, cost: Callable[[int], Floats]) -> list[float]:
    rest = _Last(steps, 0.0)
    found = []
    for left in range(1, depth + 1):
        rest = rest.before(np.maximum(cost(left), rest.after))
        found.append(float(rest.values[0]))
    return found


class _Last:
    """A value of each ideal: the best that the stages from there to the end can do."""

    def __init__(self, steps: Steps, at_end: float) -> None:
        self._target = steps.target
        self._sources, self._starts = np.unique(steps.source, return_index=True)
        self.values = np.full(len(steps.family.members), np.inf)
        self.values[-1] = at_end

    @property
    def after(self) -> Floats:
        """The value at each step's target."""
        result: Floats = self.values[self._target]
        return result

    def before(self, values: Floats) -> "_Last":
        """One stage earlier: the least of `values` over the steps from each ideal."""
        earlier = copy(self)
        earlier.values = np.full_like(self.values, np.inf)
        if len(values):
            earlier.values[self._sources] = np.minimum.reduceat(values, self._starts)
        return earlier


def _tidiest(costs: StepCosts, slack: Sequence[int], best: float) -> tuple[int, ...]:
    """Among the chains within the bottleneck: fewest bytes, then evenest, then earliest stages."""
    assert costs.shape is not None
    steps = costs.steps
    members = steps.family.members
    crossing = steps.received + steps.received_gradient
    square = (steps.forward_s + steps.backward_s) ** 2
    # Place 0 has the ideal that takes the most of the first groups.
    order = np.lexsort(~members.T[::-1])
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    fewest, evenest = _Last(steps, 0.0), _Last(steps, 0.0)
    choices = []
    for k in reversed(range(costs.shape.depth)):
        within = costs.stage(k, slack) <= best
        bytes_here = np.where(within, crossing + fewest.after, np.inf)
        fewest = fewest.before(bytes_here)
        ties = within & (bytes_here == fewest.values[steps.source])
        squares = np.where(ties, square + evenest.after, np.inf)
        evenest = evenest.before(squares)
        ties &= squares == evenest.values[steps.source]
        choices.append(fewest.before(np.where(ties, place[steps.target], np.inf)).values)
    ideal, chain = 0, []
    for choice in reversed(choices):
        ideal = int(order[int(choice[ideal])])
        chain.append(ideal)
    return chain_to_stages(steps.family, chain)
