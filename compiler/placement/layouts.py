"""Layouts: which devices hold which stage, where devices or links are not all alike."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product

import numpy as np

from p2bw.compiler.placement.dp import Recompute, Rest, StepCosts
from p2bw.compiler.placement.evaluate import Shape, choose_recompute, evaluate
from p2bw.compiler.placement.ideals import Floats
from p2bw.compiler.placement.instance import Instance

MAX_LAYOUTS = 1000  # ways to place that are all tried, one by one
MAX_SWAPS = 2000  # placements that are judged to improve one

Mix = tuple[int, ...]  # how many devices of each kind


def list_layouts(instance: Instance, depth: int, width: int) -> list[Shape] | None:
    """All layouts of a shape that differ in what is on which kind, or in what shares a link.

    None if there are too many to look at.
    """
    gpus = instance.problem.topology.gpus
    count = 1
    for used in range(depth * width):
        count *= gpus - used
        if count > MAX_LAYOUTS:
            return None
    found: dict[object, Shape] = {}
    for order in permutations(range(gpus), depth * width):
        found.setdefault(_signature(instance, order), _listed(depth, width, order))
    return list(found.values())


def _signature(instance: Instance, order: Sequence[int]) -> object:
    """Equal for two orders of ranks that no placement can tell apart."""
    network = instance.network
    names: dict[object, int] = {}
    routes = tuple(
        tuple((names.setdefault(port, len(names)), network.bandwidth(port)) for port in ports)
        for ports in (sorted(network.route(a, b)) for a, b in permutations(order, 2))
    )
    own = tuple((instance.kinds[rank], network.device_bandwidth(rank)) for rank in order)
    return own, routes


def best_kinds(costs: StepCosts, upper: float) -> tuple[float, tuple[Mix, ...] | None]:
    """The least bottleneck over all layouts, the links beyond a device's own left out: a bound.

    And the kinds of device of each stage that attain it, if it is at most `upper`.
    """
    shape, instance = costs.shape, costs.instance
    assert shape is not None
    offered = tuple(instance.kinds.count(kind) for kind in range(len(costs.kept_s)))
    mixes = list(_mixes(offered, shape.width))
    # By the devices in use from a stage to the end: what the rest of the pipeline needs at least.
    rest = {(0,) * len(offered): Rest(costs.steps, 0.0)}
    layers = [rest]
    for k in reversed(range(shape.depth)):
        prices = {mix: _price(costs, k, mix) for mix in mixes}
        layer: dict[Mix, Rest] = {}
        for used, mix in product(rest, mixes):
            more = tuple(a + b for a, b in zip(used, mix, strict=True))
            if all(a <= b for a, b in zip(more, offered, strict=True)):
                found = rest[used].before(np.maximum(prices[mix], rest[used].after))
                known = layer.get(more)
                if known is not None:
                    np.minimum(found.values, known.values, out=found.values)
                layer[more] = found
        rest = layer
        layers.append(rest)
    if not rest:
        return np.inf, None
    used = min(rest, key=lambda mix: (rest[mix].values[0], mix))
    best = float(rest[used].values[0])
    if not best <= upper or best == np.inf:
        return best, None
    return best, _walk(costs, layers, used, best)


def _mixes(offered: Mix, width: int) -> Iterator[Mix]:
    for mix in product(*(range(min(count, width) + 1) for count in offered)):
        if sum(mix) == width:
            yield mix


def _price(costs: StepCosts, k: int, mix: Mix) -> Floats:
    """Cost of each step as stage k on such devices, with the best links that any has."""
    assert costs.shape is not None
    instance = costs.instance
    kinds = [kind for kind, count in enumerate(mix) if count]
    ports = [
        max(
            instance.network.device_bandwidth(rank)
            for rank, own in enumerate(instance.kinds)
            if own == kind
        )
        for kind in kinds
    ]
    cost = costs.on(instance.in_flight(k, costs.shape.depth), kinds)
    np.maximum(cost, costs.traffic / min(ports), out=cost)
    cost[(costs.first > k) | (costs.last < k)] = np.inf
    return cost


def _walk(
    costs: StepCosts, layers: Sequence[dict[Mix, Rest]], used: Mix, best: float
) -> tuple[Mix, ...]:
    """One mix for each stage, changed as seldom as the bottleneck allows."""
    assert costs.shape is not None
    steps = costs.steps
    ideal, chosen = 0, list[Mix]()
    for k in range(costs.shape.depth):
        rest = layers[costs.shape.depth - 1 - k]
        options = []
        for left in rest:
            mix = tuple(a - b for a, b in zip(used, left, strict=True))
            if min(mix) < 0 or sum(mix) != costs.shape.width:
                continue
            reached = np.maximum(_price(costs, k, mix), rest[left].after) <= best
            targets = steps.target[reached & (steps.source == ideal)]
            if len(targets):
                changed = bool(chosen) and mix != chosen[-1]
                options.append((changed, mix, left, int(targets[-1])))
        _, mix, used, ideal = min(options)
        chosen.append(mix)
    return tuple(chosen)


def lay_out(instance: Instance, shape: Shape, mixes: Sequence[Mix]) -> Shape:
    """A layout with such kinds of device for each stage: ranks in their order."""
    free = [
        [rank for rank, own in enumerate(instance.kinds) if own == kind]
        for kind in range(len(instance.forward_ps))
    ]
    ranks = []
    for mix in mixes:
        taken = [free[kind].pop(0) for kind, count in enumerate(mix) for _ in range(count)]
        ranks.append(tuple(taken))
    return Shape(shape.depth, shape.width, "listed", tuple(ranks))


def improve(instance: Instance, shape: Shape, stages: Sequence[int], recompute: Recompute) -> Shape:
    """Exchange devices, two at a time, as long as the busiest device or link gets less busy."""
    gpus = instance.problem.topology.gpus
    budget = MAX_SWAPS

    def cost(order: Sequence[int]) -> tuple[bool, float, float]:
        tried = _listed(shape.depth, shape.width, order)
        again = choose_recompute(instance, tried, stages, recompute)
        found = evaluate(instance, tried, stages, again)
        return not found.feasible, found.busiest_s, math.fsum(link.seconds for link in found.links)

    order = [rank for row in shape.ranks for rank in row]
    order += sorted(set(range(gpus)) - set(order))  # the unused ones at the end
    used = shape.depth * shape.width
    best = cost(order)
    moved = True
    while moved and budget > 0:
        moved = False
        for a, b in combinations(range(gpus), 2):
            if a >= used or budget <= 0:
                break
            order[a], order[b] = order[b], order[a]
            budget -= 1
            found = cost(order)
            if found < best:
                best, moved = found, True
            else:
                order[a], order[b] = order[b], order[a]
    return _listed(shape.depth, shape.width, order)


def _listed(depth: int, width: int, order: Sequence[int]) -> Shape:
    ranks = tuple(tuple(order[k * width : (k + 1) * width]) for k in range(depth))
    return Shape(depth, width, "listed", ranks)
