"""Dynamic program over ideals: the best chain of steps for one shape of pipeline.

What a step costs is exact but for four things that depend on other stages: how far a tensor that
skips stages travels, how many stages read one tensor, what else uses a node's uplink, and how
many stages hold a tied parameter. Each of these is taken at its least, so the optimum over all
ideals is a lower bound, and proves a placement that attains it.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from p2bw.compiler.placement.evaluate import (
    Shape,
    ring_bytes,
    ring_s,
    waiting_bytes,
    with_sum,
)
from p2bw.compiler.placement.ideals import Floats, Steps, chain_to_stages
from p2bw.compiler.placement.instance import PS, Instance, Numbers
from p2bw.compiler.placement.relays import judge
from p2bw.compiler.placement.uplinks import Uplink, make_uplinks

MAX_MENDS = 8  # times that a chain is sought with more memory kept free

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
    kept_s: Floats  # kind of device x step, forward and backward: stash kept
    again_s: Floats  # forward recomputed
    share_s: Floats  # kind of device x step: of an update, if pipelines do not drain for it
    port_s: Floats  # of the fastest port
    traffic: Floats  # bytes that a device sends or receives
    fixed: Floats  # bytes besides weights and what is in flight
    first: Numbers  # first and last stage that a step can be
    last: Numbers
    uplinks: tuple[tuple[Uplink, ...], ...]  # by stage

    def at_width(self, width: int) -> "StepCosts":
        """Of no particular shape, but of so many replicas: what a device then keeps besides."""
        more = self.instance.gradient_copies(width) - self.instance.gradient_copies()
        return replace(self, fixed=self.fixed + more * self.steps.gradients)

    def memory(self, in_flight: int, again: bool) -> Floats:
        steps, depth = self.steps, self.shape.depth if self.shape else None
        total = self.fixed + self.instance.versions(in_flight, depth) * steps.weights
        if again:
            return total + steps.stash + in_flight * steps.received
        return total + in_flight * (steps.stash + steps.saved)

    def seconds(self, in_flight: int, kind: int, room: int, k: int | None = None) -> Floats:
        """Cost of each step on a kind of device, in `room` bytes of its memory; as stage `k`."""
        cost = np.full(len(self.steps.source), np.inf)
        if self.recompute != "never":
            np.copyto(cost, self.again_s[kind], where=self.memory(in_flight, True) <= room)
        if self.recompute != "always":
            np.copyto(cost, self.kept_s[kind], where=self.memory(in_flight, False) <= room)
        own_s: Floats = np.maximum(cost + self.share_s[kind], self.port_s)
        instance, shape, steps = self.instance, self.shape, self.steps
        if k is None or shape is None:
            return own_s
        exposed = instance.exposed(k, shape.depth, shape.width)
        if exposed is not None:
            update_s = steps.update_s[kind] + ring_s(instance, shape, k) * steps.gradients
            slots = instance.slots(shape.depth)
            np.maximum(own_s, with_sum(cost, update_s, exposed, slots), out=own_s)
        return own_s

    def least_seconds(self, in_flight: int) -> Floats:
        """Cost of each step on the kind of device that is best for it."""
        kinds = range(len(self.kept_s))
        result: Floats = np.minimum.reduce(
            [self.seconds(in_flight, kind, self.instance.room(kind)) for kind in kinds]
        )
        return result

    def on(
        self, in_flight: int, kinds: Sequence[int], slack: int = 0, k: int | None = None
    ) -> Floats:
        """Cost of each step whose replicas are on several kinds, `slack` bytes kept free."""
        room = min(map(self.instance.room, kinds)) - slack
        result: Floats = np.maximum.reduce(
            [self.seconds(in_flight, kind, room, k) for kind in kinds]
        )
        return result

    def stage(self, k: int, slack: Sequence[int]) -> Floats:
        """Cost of each step as stage k of the shape, `slack` bytes of its memory kept free."""
        assert self.shape is not None
        instance, shape = self.instance, self.shape
        in_flight = instance.in_flight(k, shape.depth)
        cost = self.on(in_flight, shape.kinds(instance, k), slack[k], k)
        port = min(instance.network.device_bandwidth(shape.rank(k, r)) for r in range(shape.width))
        np.maximum(cost, self.traffic / port, out=cost)
        cost[(self.first > k) | (self.last < k)] = np.inf
        if self.uplinks and self.uplinks[k]:
            slots = instance.slots(shape.depth)
            ring = ring_bytes(1, shape.width, slots) * self.steps.gradients
            exchange = ring_bytes(1, 2, slots) * self.steps.exchanged
            for uplink in self.uplinks[k]:
                np.maximum(cost, uplink.seconds(self.steps, ring, exchange), out=cost)
        return cost


def step_costs(
    instance: Instance,
    steps: Steps,
    recompute: Recompute,
    shape: Shape | None = None,
    upper: float = np.inf,
) -> StepCosts:
    """The costs of all steps, exact where a placement stays below `upper` seconds."""
    out = steps.sent + steps.received_gradient
    into = steps.received + steps.sent_gradient
    share_s, copies = np.zeros_like(steps.update_s), instance.gradient_copies()
    first: Numbers = np.zeros(len(out), np.int64)
    last: Numbers = np.full(len(out), instance.size)
    if shape is not None:
        slots, copies = instance.slots(shape.depth), instance.gradient_copies(shape.width)
        if not instance.drains:
            share_s = steps.update_s / slots
        shared = ring_bytes(1, shape.width, slots) * steps.gradients
        shared += ring_bytes(1, 2, slots) * steps.exchanged
        out, into = out + shared, into + shared
        first, last = _windows(instance, steps, shape.depth, upper)
    compute_s = steps.forward_s + steps.backward_s
    costs = StepCosts(
        instance,
        steps,
        recompute,
        shape,
        kept_s=compute_s,
        again_s=compute_s + steps.forward_s,
        share_s=share_s,
        port_s=np.maximum(out, into) / instance.network.fastest,
        traffic=np.maximum(out, into),
        fixed=copies * steps.gradients
        + steps.frozen
        + steps.optimizer
        + steps.buffers
        + steps.transient
        + steps.received
        + steps.received_gradient
        + steps.sent
        + steps.sent_gradient,
        first=first,
        last=last,
        uplinks=(),
    )
    if shape is None or shape.layout == "any":
        return costs
    slack = [0] * shape.depth
    possible = [costs.stage(k, slack) <= upper for k in range(shape.depth)]
    uplinks = make_uplinks(instance, steps, shape, possible.__getitem__)
    return replace(costs, uplinks=uplinks)


def _windows(instance: Instance, steps: Steps, depth: int, upper: float) -> tuple[Numbers, Numbers]:
    """First and last stage that each step can be: what lies before it fits in the stages before."""
    work = (instance.forward_ps + instance.backward_ps).min(axis=0)
    work_s = (steps.family.members @ work) / PS
    # As many stages as the work needs; none is empty.
    size = steps.family.members.sum(axis=1)
    before = np.maximum(np.ceil(work_s / upper * (1 - 1e-9)), size > 0).astype(np.int64)
    left = np.ceil((work_s[-1] - work_s) / upper * (1 - 1e-9))
    after = np.maximum(left, size < instance.size).astype(np.int64)
    first = np.maximum(before[steps.source], before[steps.target] - 1)
    last = depth - np.maximum(after[steps.source], after[steps.target] + 1)
    pinned = steps.pinned >= 0
    return (
        np.where(pinned, np.maximum(first, steps.pinned), first),
        np.where(pinned, np.minimum(last, steps.pinned), last),
    )


@dataclass(frozen=True, slots=True)
class Chain:
    """A solution: the least bottleneck and the stage of each group."""

    seconds: float
    stages: tuple[int, ...]


def best_chain(costs: StepCosts, slack: Sequence[int], upper: float) -> Chain | None:
    """The least bottleneck, if at most `upper`; ties by bytes crossing, balance, early stages."""
    assert costs.shape is not None
    rest = Rest(costs.steps, 0.0)
    for k in reversed(range(costs.shape.depth)):
        rest = rest.before(np.maximum(costs.stage(k, slack), rest.after))
    best = float(rest.values[0])
    if not best <= upper or best == np.inf:
        return None
    return Chain(best, _tidiest(costs, slack, best))


def feasible_chain(costs: StepCosts, upper: float) -> tuple[float, tuple[int, ...] | None]:
    """The least bottleneck (a bound, infinity if there is none up to `upper`) and a placement.

    Tensors that skip stages wait in buffers that a step does not know of. Where a chain does not
    fit for them, it is sought again with as much memory kept free.
    """
    assert costs.shape is not None
    instance, shape = costs.instance, costs.shape
    slack = [0] * shape.depth
    bound = None
    for _ in range(MAX_MENDS):
        chain = best_chain(costs, slack, upper)
        if bound is None:
            bound = chain.seconds if chain else np.inf
        if chain is None:
            break
        if judge(instance, shape, chain.stages, costs.recompute).evaluation.feasible:
            return bound, chain.stages
        waiting = waiting_bytes(instance, shape, chain.stages)
        slack = [max(known, found) for known, found in zip(slack, waiting, strict=True)]
    assert bound is not None
    return bound, None


def least_by_depth(costs: StepCosts, depth: int, gaps: bool = False) -> list[float]:
    """A lower bound on the bottleneck of pipelines of 1 .. depth stages, in any layout.

    `costs` are those of no particular shape; unless `at_width`, the bound is for any width. With
    `gaps`, stages may be empty. One sweep from the back gives all depths: what a stage keeps in
    flight depends on the number of stages after it.
    """

    def cost(left: int) -> Floats:
        return costs.least_seconds(costs.instance.in_flight(0, left))

    return _sweep(costs.steps, depth, cost, gaps)


def least_memory_by_depth(costs: StepCosts, depth: int, width: int = 1) -> list[float]:
    """A lower bound on the bytes that the fullest device of 1 .. depth stages needs.

    `costs` are those of no particular shape, and `width` the fewest replicas.
    """
    costs, reserve = costs.at_width(width), costs.instance.reserve

    def cost(left: int) -> Floats:
        in_flight = costs.instance.in_flight(0, left)
        if costs.recompute != "auto":
            return reserve + costs.memory(in_flight, costs.recompute == "always")
        return reserve + np.minimum(costs.memory(in_flight, False), costs.memory(in_flight, True))

    return _sweep(costs.steps, depth, cost)


def _sweep(
    steps: Steps, depth: int, cost: Callable[[int], Floats], gaps: bool = False
) -> list[float]:
    rest = Rest(steps, 0.0)
    found = []
    for left in range(1, depth + 1):
        empty = rest.values if gaps else np.inf
        rest = rest.before(np.maximum(cost(left), rest.after))
        np.minimum(rest.values, empty, out=rest.values)
        found.append(float(rest.values[0]))
    return found


class Rest:
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

    def before(self, values: Floats) -> "Rest":
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
    square = (steps.forward_s[0] + steps.backward_s[0]) ** 2
    # Place 0 has the ideal that takes the most of the first groups.
    order = np.lexsort(~members.T[::-1])
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    fewest, evenest = Rest(steps, 0.0), Rest(steps, 0.0)
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
