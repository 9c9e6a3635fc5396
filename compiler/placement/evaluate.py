"""evaluate: the exact numbers of one placement. Every solver's result is judged by it alone."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from p2bw.compiler.links import Port
from p2bw.compiler.placement.instance import PS, Edge, Instance, Numbers, State

Work = TypeVar("Work", float, np.ndarray[tuple[int, ...], np.dtype[np.float64]])
MIN_PERIOD_S = 1 / PS  # so that a model without costs still has a rate

Layout = Literal["stage-major", "pipeline-major", "any", "listed"]
LAYOUTS: tuple[Layout, ...] = ("stage-major", "pipeline-major", "any", "listed")


@dataclass(frozen=True, slots=True)
class Shape:
    """How the pipelines lie on the ranks.

    stage-major: the replicas of a stage have adjacent ranks; pipeline-major: the stages of a
    replica have; listed: as `ranks` says, by stage and replica; any: still to be decided.
    """

    depth: int
    width: int
    layout: Layout = "stage-major"
    ranks: tuple[tuple[int, ...], ...] = ()

    def rank(self, stage: int, replica: int) -> int:
        if self.ranks:
            return self.ranks[stage][replica]
        if self.layout == "stage-major":
            return stage * self.width + replica
        return replica * self.depth + stage

    def kinds(self, instance: Instance, stage: int) -> tuple[int, ...]:
        """The kinds of device that a stage is on; of an open layout, all it could be on."""
        if self.layout == "any":
            return tuple(range(len(instance.forward_ps)))
        if len(instance.forward_ps) == 1:
            return (0,)
        return tuple(sorted({instance.kinds[self.rank(stage, r)] for r in range(self.width)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNumbers:
    """Compute per microbatch and peak memory of one stage; `update_s` is a step's share.

    On devices of several kinds: the times of the slowest, and the limit of the tightest. `busy_s`
    is what the stage's compute makes of the period: see `with_sum`. `early_s` is that where the
    stage takes on a microbatch early, before which the sum over the replicas cannot begin.
    """

    forward_s: float
    backward_s: float
    recompute_s: float
    update_s: float
    busy_s: float
    early_s: float
    weights: int
    gradients: int
    optimizer: int
    stash: int
    buffers: int
    transient: int
    reserve: int
    limit: int

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.backward_s + self.recompute_s + self.update_s

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.stash
            + self.buffers
            + self.transient
            + self.reserve
        )


@dataclass(frozen=True, slots=True)
class LinkLoad:
    """What one port carries per microbatch, one way; an update's per slot of the schedule."""

    name: str
    bytes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The numbers of a placement: period, stages, links, and what is wrong with it, if anything."""

    busiest_s: float  # the busiest device or port, per microbatch
    period_s: float  # that, and a flushing schedule's share of bubbles
    stages: tuple[StageNumbers, ...]
    links: tuple[LinkLoad, ...]
    sent_bytes: float  # by all ranks per microbatch of one replica, updates' share included
    problems: tuple[str, ...]

    @property
    def feasible(self) -> bool:
        return not self.problems


def evaluate(
    instance: Instance,
    shape: Shape,
    stage_of: Sequence[int],
    recompute: Sequence[bool],
    relayed: Collection[int] = (),
) -> Evaluation:
    """Judge a placement: `stage_of` a group, `recompute` of a stage, the edges that are relayed."""
    flows = _flows(instance, shape, stage_of, relayed)
    stages = tuple(_stage(instance, shape, k, recompute[k], flows) for k in range(shape.depth))
    links = _links(instance, shape, flows)
    busiest = max(
        MIN_PERIOD_S,
        max(stage.busy_s for stage in stages),
        max((link.seconds for link in links), default=0.0),
    )
    bubble = instance.bubble(shape.depth)
    updates = (bubble * size for size in (*flows.exchange.values(), *flows.ring))
    return Evaluation(
        busiest_s=busiest,
        period_s=busiest * bubble,
        stages=stages,
        links=links,
        sent_bytes=math.fsum((sum(flows.tensors.values()), *updates)),
        problems=_problems(instance, shape, stage_of, stages),
    )


def choose_recompute(
    instance: Instance,
    shape: Shape,
    stage_of: Sequence[int],
    policy: Literal["auto", "always", "never"],
    relayed: Collection[int] = (),
) -> tuple[bool, ...]:
    """The best choice: recomputing only costs time, so only where the stash would not fit."""
    if policy != "auto":
        return (policy == "always",) * shape.depth
    flows = _flows(instance, shape, stage_of, relayed)

    def fits(k: int, again: bool) -> bool:
        numbers = _stage(instance, shape, k, again, flows)
        return numbers.total <= numbers.limit

    return tuple(not fits(k, False) and fits(k, True) for k in range(shape.depth))


def waiting_bytes(instance: Instance, shape: Shape, stage_of: Sequence[int]) -> list[int]:
    """By stage: what tensors take up while they wait because they skipped stages."""
    found = [0] * shape.depth
    for edge in instance.edges:
        source = stage_of[edge.producer]
        for reader in {stage_of[c] for c in edge.consumers} - {source}:
            found[reader] += edge.bytes * (reader - source - 1)
            found[source] += edge.gradient * (reader - source)
        if any(stage_of[c] != source for c in edge.consumers):
            found[source] -= edge.gradient
    return found


@dataclass(frozen=True, slots=True)
class _Flows:
    """Bytes between stages of one replica, per microbatch; an update's per slot of the schedule."""

    own: tuple[tuple[int, ...], ...]  # by stage: its groups
    received: tuple[tuple[tuple[Edge, int], ...], ...]  # by stage: tensor, its producer's stage
    sent: tuple[tuple[tuple[Edge, tuple[int, ...]], ...], ...]  # by stage: tensor, readers' stages
    tensors: dict[tuple[int, int], int]  # from stage, to stage: activations and gradients
    exchange: dict[tuple[int, int], float]  # gradients of tied parameters
    ring: tuple[float, ...]  # by stage: all-reduce, from each replica to the next
    holds: tuple[tuple[int, ...], ...]  # by stage: tied parameters


def _flows(
    instance: Instance, shape: Shape, stage_of: Sequence[int], relayed: Collection[int]
) -> _Flows:
    received: list[list[tuple[Edge, int]]] = [[] for _ in range(shape.depth)]
    sent: list[list[tuple[Edge, tuple[int, ...]]]] = [[] for _ in range(shape.depth)]
    tensors: dict[tuple[int, int], int] = defaultdict(int)
    for i, edge in enumerate(instance.edges):
        for source, targets in _hops(edge, stage_of, i in relayed):
            for target in targets:
                received[target].append((edge, source))
                tensors[source, target] += edge.bytes
                tensors[target, source] += edge.gradient
            sent[source].append((edge, targets))
    slots = instance.slots(shape.depth)
    gradients = [0] * shape.depth
    own: list[list[int]] = [[] for _ in range(shape.depth)]
    for group, stage in enumerate(stage_of):
        own[stage].append(group)
        gradients[stage] += int(instance.gradients[group])
    exchange: dict[tuple[int, int], float] = defaultdict(float)
    holds: list[list[int]] = [[] for _ in range(shape.depth)]
    for i, tied in enumerate(instance.tied):
        holders = sorted({stage_of[group] for group in tied.groups})
        for place, stage in enumerate(holders):
            holds[stage].append(i)
            gradients[stage] += tied.state.gradients
            if len(holders) > 1:
                peer = holders[(place + 1) % len(holders)]
                exchange[stage, peer] += ring_bytes(tied.state.gradients, len(holders), slots)
    return _Flows(
        tuple(map(tuple, own)),
        tuple(map(tuple, received)),
        tuple(map(tuple, sent)),
        dict(tensors),
        dict(exchange),
        tuple(ring_bytes(total, shape.width, slots) for total in gradients),
        tuple(map(tuple, holds)),
    )


def _hops(
    edge: Edge, stage_of: Sequence[int], relayed: bool
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """From which stage to which others a tensor is sent: to all readers, or to the next stage."""
    source = stage_of[edge.producer]
    readers = tuple(sorted({stage_of[c] for c in edge.consumers} - {source}))
    if relayed:
        for k in range(source, max(readers, default=source)):
            yield k, (k + 1,)
    elif readers:
        yield source, readers


def ring_bytes(size: int, members: int, slots: int) -> float:
    """What each member of a ring all-reduce sends to the next, per slot (`Instance.slots`)."""
    return size * (2 * (members - 1)) / (members * slots)


def ring_s(instance: Instance, shape: Shape, k: int) -> float:
    """Seconds that the all-reduce of stage k takes for a byte of its gradients, by itself."""
    ports = Counter(
        port
        for r in range(shape.width if shape.width > 1 else 0)
        for port in instance.network.route(shape.rank(k, r), shape.rank(k, (r + 1) % shape.width))
    )
    slowest = max((n / instance.network.bandwidth(port) for port, n in ports.items()), default=0.0)
    return ring_bytes(1, shape.width, 1) * slowest


def with_sum(work_s: Work, update_s: Work, exposed: int, slots: int) -> Work:
    """What a stage makes of the period by an update, with the sum over its replicas before it, and
    the microbatches that it computes before the next sum can begin (`Instance.exposed`).
    """
    return work_s * (exposed / slots) + update_s / slots


def _stage(
    instance: Instance,
    shape: Shape,
    k: int,
    recompute: bool,
    flows: _Flows,
) -> StageNumbers:
    """Compute and memory of stage k: DESIGN section 5."""
    own = flows.own[k]
    states = [instance.tied[i].state for i in flows.holds[k]]

    def total(array: Numbers) -> int:
        return sum(int(array[group]) for group in own)

    in_flight = instance.in_flight(k, shape.depth)
    received = flows.received[k]
    inputs = sum(edge.bytes for edge, _ in received)
    saved = sum(edge.bytes for edge, _ in received if edge.saved)
    stash = total(instance.stash)
    # A tensor that skips stages arrives that many periods early; so does its gradient, on the
    # way back. One buffer more is filled while the one before is used.
    buffers = sum(edge.bytes * (k - source) + edge.gradient for edge, source in received)
    buffers += sum(
        edge.bytes + edge.gradient * sum(reader - k for reader in readers)
        for edge, readers in flows.sent[k]
    )
    kinds, m = shape.kinds(instance, k), instance.problem.microbatches_at(shape.depth)
    every = [_times(instance, own, states, kind) for kind in kinds]
    forward_ps, backward_ps, update_ps = max(
        every, key=lambda times: m * (times[0] * (1 + recompute) + times[1]) + times[2]
    )
    gradients = total(instance.gradients) + sum(state.gradients for state in states)
    summing_s = ring_s(instance, shape, k) * gradients
    device = instance.device(min(kinds, key=instance.room))
    busy_s, early_s = (
        max(_busy_s(instance, shape, k, times, recompute, summing_s, early) for times in every)
        for early in (0, 1)
    )
    return StageNumbers(
        forward_s=forward_ps / PS,
        backward_s=backward_ps / PS,
        recompute_s=forward_ps / PS if recompute else 0.0,
        update_s=update_ps / PS / m,
        busy_s=busy_s,
        early_s=early_s,
        weights=instance.versions(in_flight, shape.depth)
        * (total(instance.weights) + sum(state.weights for state in states))
        + total(instance.frozen)
        + sum(state.frozen for state in states),
        gradients=instance.gradient_copies(shape.width) * gradients,
        optimizer=total(instance.optimizer) + sum(state.optimizer for state in states),
        stash=in_flight * inputs + stash if recompute else in_flight * (stash + saved),
        buffers=total(instance.buffers) + buffers,
        transient=max((int(instance.transient[group]) for group in own), default=0),
        reserve=device.reserve_bytes,
        limit=device.memory_bytes,
    )


def _busy_s(
    instance: Instance,
    shape: Shape,
    k: int,
    times: tuple[int, int, int],
    recompute: bool,
    summing_s: float,
    early: int,
) -> float:
    """Seconds per slot of the schedule. The dynamic program adds in the same order, so that both
    agree to the last bit. Under 2bw `early` microbatches are taken on early.
    """
    forward_s, backward_s, update_s = (ps / PS for ps in times)
    work_s = forward_s + backward_s + (forward_s if recompute else 0.0)
    slots, exposed = instance.slots(shape.depth), instance.exposed(k, shape.depth, shape.width)
    own_s = work_s if instance.drains else work_s + update_s / slots
    if exposed is None:
        return own_s
    exposed += early * (instance.problem.schedule == "2bw")
    return max(own_s, with_sum(work_s, update_s + summing_s, exposed, slots))


def _times(
    instance: Instance, own: Sequence[int], states: Sequence[State], kind: int
) -> tuple[int, int, int]:
    """Picoseconds forward, backward and of an update, on one kind of device."""
    forward, backward, update = (
        sum(int(array[kind, group]) for group in own)
        for array in (instance.forward_ps, instance.backward_ps, instance.update_ps)
    )
    update += sum(state.update_ps[kind] for state in states)
    return forward, backward, update


def _links(instance: Instance, shape: Shape, flows: _Flows) -> tuple[LinkLoad, ...]:
    """Every port that carries anything, the innermost level first."""
    network = instance.network
    loads: dict[Port, float] = defaultdict(float)

    def carry(rank: int, peer: int, size: float) -> None:
        for port in network.route(rank, peer):
            loads[port] += size

    for replica in range(shape.width):
        for flow in (flows.tensors, flows.exchange):
            for (stage, peer), size in flow.items():
                if size:
                    carry(shape.rank(stage, replica), shape.rank(peer, replica), size)
        for stage, size in enumerate(flows.ring):
            if size:
                following = shape.rank(stage, (replica + 1) % shape.width)
                carry(shape.rank(stage, replica), following, size)
    return tuple(
        LinkLoad(network.name(port), size, size / network.bandwidth(port))
        for port, size in sorted(loads.items())
    )


def _problems(
    instance: Instance, shape: Shape, stage_of: Sequence[int], stages: tuple[StageNumbers, ...]
) -> tuple[str, ...]:
    found = []
    for k in sorted(set(range(shape.depth)) - set(stage_of)):
        found.append(f"stage {k} has no blocks")
    for edge in instance.edges:
        if any(stage_of[consumer] < stage_of[edge.producer] for consumer in edge.consumers):
            found.append(f"{instance.name(edge.producer)} comes after a reader of its result")
    for group, stage in instance.pin.items():
        if stage_of[group] != stage:
            found.append(f"{instance.name(group)} is pinned to stage {stage}")
    for first, second in instance.apart:
        if stage_of[first] == stage_of[second]:
            found.append(f"{instance.name(first)} and {instance.name(second)} must be apart")
    for k, numbers in enumerate(stages):
        if numbers.total > numbers.limit:
            found.append(f"stage {k} needs {numbers.total} bytes of {numbers.limit}")
    return tuple(found)
