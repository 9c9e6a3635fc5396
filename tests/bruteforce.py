"""The best placement by trying all, from the definitions alone: no code of the placement is used.

Arrays are indexed by assignment first: all order-preserving ways to put the blocks into stages.
"""

import itertools
from collections import defaultdict

import networkx as nx
import numpy as np

from p2bw.compiler.links import Network


def best_rate(problem, policy, depths=None, widths=None):
    """Samples per second of the best placement over depths, widths, layouts and relayed tensors;
    None: none fits.
    """
    gpus = problem.topology.gpus
    most = min(gpus, problem.constraints.max_stages or gpus)
    if problem.schedule == "2bw":
        most = min(most, problem.microbatches or most)
    best = None
    for depth in depths or range(1, most + 1):
        stages = assignments(problem, depth)
        if not len(stages):
            continue
        for width in widths or range(1, gpus // depth + 1):
            if depth * width > gpus:
                continue
            for relayed, some in relays(problem, stages):
                costs = _Costs(problem, some, depth, width, relayed)
                for order in itertools.permutations(range(gpus), depth * width):
                    ranks = [order[k * width : (k + 1) * width] for k in range(depth)]
                    period = costs.period(ranks, policy).min()
                    if period < np.inf:
                        best = max(best or 0.0, width * problem.microbatch / period)
    return best


def of_one_stage(problem):
    """Names of blocks that may not be in different stages."""
    rules = problem.constraints
    uncut = [t for t in problem.tensors if t.name in rules.never_cut]
    shared = [p.blocks for p in problem.parameters if problem.schedule == "stash"]
    return *rules.together, *((t.producer, *t.consumers) for t in uncut), *shared


def assignments(problem, depth):
    """assignment x block: the stage of each block, data flowing forward, constraints kept."""
    names = [block.name for block in problem.blocks]
    number = {name: i for i, name in enumerate(names)}
    pairs = [(number[t.producer], number[c]) for t in problem.tensors for c in t.consumers]
    grid = np.indices((depth,) * len(names)).reshape(len(names), -1).T
    fine = np.ones(len(grid), bool)
    for u, v in pairs:
        fine &= grid[:, u] <= grid[:, v]
    for k in range(depth):
        fine &= (grid == k).any(axis=1)
    rules = problem.constraints
    for name, stage in rules.pin.items():
        fine &= grid[:, number[name]] == stage
    for group in of_one_stage(problem):
        for a, b in itertools.pairwise(group):
            fine &= grid[:, number[a]] == grid[:, number[b]]
    for a, b in rules.apart:
        fine &= grid[:, number[a]] != grid[:, number[b]]
    return grid[fine]


def relays(problem, stages):
    """Sets of tensors to relay, with the assignments in which all of them skip a stage.

    Tensors with the same ends, blocks that must share a stage being one, travel the same way.
    """
    number = {block.name: i for i, block in enumerate(problem.blocks)}
    leader = leaders(problem)
    kinds = defaultdict(list)
    for tensor in problem.tensors:
        producer = leader[number[tensor.producer]]
        readers = frozenset(leader[number[c]] for c in tensor.consumers) - {producer}
        kinds[producer, readers, tensor.saved].append(tensor)
    skipping = []
    for tensors in kinds.values():
        blocks = [number[c] for c in tensors[0].consumers]
        far = stages[:, blocks].max(axis=1) > stages[:, number[tensors[0].producer]] + 1
        if far.any() and any(t.bytes or t.gradient_bytes for t in tensors):
            skipping.append(({t.name for t in tensors}, far))
    yield frozenset(), stages
    open_ = [(frozenset(), np.ones(len(stages), bool), 0)]
    while open_:
        names, rows, first = open_.pop()
        for i in range(first, len(skipping)):
            more, far = skipping[i]
            if (rows & far).any():
                yield names | more, stages[rows & far]
                open_.append((names | more, rows & far, i + 1))


def leaders(problem):
    """The first of the blocks that each must share a stage with."""
    number = {block.name: i for i, block in enumerate(problem.blocks)}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(number)))
    for tensor in problem.tensors:
        graph.add_edges_from((number[tensor.producer], number[c]) for c in tensor.consumers)
    for group in of_one_stage(problem):
        ends = [number[name] for name in group]
        graph.add_edges_from(zip(ends, ends[1:] + ends[:1], strict=True))
    found = {}
    for component in nx.strongly_connected_components(graph):
        found.update(dict.fromkeys(component, min(component)))
    return found


def ring(size, members, m):
    return size * 2 * (members - 1) / members / m


class _Costs:
    """What does not depend on the layout, for all assignments at once."""

    def __init__(self, problem, stages, depth, width, relayed):
        self.problem, self.depth, self.width = problem, depth, width
        self.m = problem.microbatches or depth
        # An update takes as long as so many microbatches: a pipeline that drains fills up again.
        self.drains = problem.schedule in ("flush", "gpipe")
        self.slots = self.m + (depth - 1) * self.drains
        self.network = Network(problem.topology)
        self.number = {block.name: i for i, block in enumerate(problem.blocks)}
        self.here = [stages == k for k in range(depth)]
        self.flows = defaultdict(lambda: np.zeros(len(stages)))
        zero = np.zeros(len(stages))
        self.inputs, self.saved, self.buffers = ([zero.copy() for _ in self.here] for _ in range(3))
        self.gradients = [zero.copy() for _ in self.here]
        for tensor in problem.tensors:
            (self._relayed if tensor.name in relayed else self._tensor)(tensor, stages)
        self.holds = {p.name: self._parameter(p) for p in problem.parameters}

    def _tensor(self, tensor, stages):
        source = stages[:, self.number[tensor.producer]]
        readers = stages[:, [self.number[c] for c in tensor.consumers]]
        sent = (readers != source[:, None]).any(axis=1)
        for j in range(self.depth):
            self.buffers[j] += (sent & (source == j)) * tensor.bytes
            for k in range(j + 1, self.depth):
                goes = (source == j) & (readers == k).any(axis=1)
                self.flows[j, k] += goes * tensor.bytes
                self.flows[k, j] += goes * tensor.gradient_bytes
                self.inputs[k] += goes * tensor.bytes
                self.saved[k] += goes * tensor.bytes * tensor.saved
                self.buffers[k] += goes * (tensor.bytes * (k - j) + tensor.gradient_bytes)
                self.buffers[j] += goes * tensor.gradient_bytes * (k - j)

    def _relayed(self, tensor, stages):
        source = stages[:, self.number[tensor.producer]]
        last = stages[:, [self.number[c] for c in tensor.consumers]].max(axis=1)
        for k in range(self.depth - 1):
            passes = (source <= k) & (k < last)
            self.flows[k, k + 1] += passes * tensor.bytes
            self.flows[k + 1, k] += passes * tensor.gradient_bytes
            self.buffers[k] += passes * (tensor.bytes + tensor.gradient_bytes)
            self.buffers[k + 1] += passes * (tensor.bytes + tensor.gradient_bytes)
            self.inputs[k + 1] += passes * tensor.bytes
            self.saved[k + 1] += passes * tensor.bytes * tensor.saved

    def _parameter(self, parameter):
        blocks = [self.number[name] for name in parameter.blocks]
        holds = np.stack([mask[:, blocks].any(axis=1) for mask in self.here])
        count = holds.sum(axis=0)
        for k in range(self.depth):
            self.gradients[k] += holds[k] * parameter.gradient_bytes
            for step in range(1, self.depth):
                peer = (k + step) % self.depth
                between = [(k + i) % self.depth for i in range(1, step)]
                follows = holds[k] & holds[peer] & ~holds[between].any(axis=0)
                share = np.where(
                    count > 1, ring(parameter.gradient_bytes, np.maximum(count, 1), self.slots), 0
                )
                self.flows[k, peer] += follows * share
        return holds

    def _sum(self, k, values):
        return self.here[k] @ np.array(values)

    def memory(self, k, again):
        problem = self.problem
        flight = {"gpipe": self.m, "flush": min(self.depth - k, self.m)}.get(
            problem.schedule, self.depth - k
        )
        held = {i // self.m for i in range(self.m - 1, self.m - 1 + flight)}  # batches in flight
        versions = {"2bw": 2, "stash": len(held)}.get(problem.schedule, 1)
        late = problem.schedule == "2bw" and (self.width > 1 or problem.clip_norm is not None)
        total = sum(
            self.holds[p.name][k]
            * (
                (versions if p.gradient_bytes else 1) * p.bytes
                + (1 + late) * p.gradient_bytes
                + p.optimizer_bytes
            )
            for p in problem.parameters
        )
        blocks = problem.blocks
        stash = self._sum(k, [b.stash_bytes for b in blocks])
        total = total + self._sum(k, [b.buffer_bytes for b in blocks]) + self.buffers[k]
        total += (self.here[k] * np.array([b.transient_bytes for b in blocks])).max(axis=1)
        if again:
            return total + flight * self.inputs[k] + stash
        return total + flight * (stash + self.saved[k])

    def seconds(self, k, again, kind, ranks):
        def of(block):
            times = block.on.get(kind, block)
            return times.forward_s * (1 + again) + times.backward_s

        work = self._sum(k, [of(block) for block in self.problem.blocks])
        update = sum(
            self.holds[p.name][k] * p.on.get(kind, p.update_s) for p in self.problem.parameters
        )
        own = work if self.drains else work + update / self.m
        ahead = self.depth - 1 - k
        if self.drains:
            # From a stage's last backward on: the sum over its replicas, and its update. Stage k
            # did its last backward k microbatches before the first stage, which begins the next.
            between = self.slots - k
        elif self.width > 1 and self.problem.schedule == "stash":
            between = self.m  # the next batch waits
        elif self.width > 1 and ahead:
            # A batch begins while so many of the one before it are in flight: that one's sum begins
            # after them, and they after the update with the sum before.
            between = ahead
        else:
            return own
        wait = update + self._ring_s(k, ranks)
        return np.maximum(own, (between * work + wait) / self.slots)

    def _ring_s(self, k, ranks):
        """Each replica sends its part to the next, and these ports carry nothing else."""
        hops = defaultdict(int)
        for r in range(self.width):
            for port in self.network.route(ranks[r], ranks[(r + 1) % self.width]):
                hops[port] += 1
        slowest = max((n / self.network.bandwidth(port) for port, n in hops.items()), default=0)
        return ring(self.gradients[k], self.width, 1) * slowest

    def period(self, ranks, policy):
        devices = self.problem.topology.devices
        choices = {"auto": (0, 1), "always": (1,), "never": (0,)}[policy]
        worst = np.full(len(self.here[0]), 1e-12)
        for k, own in enumerate(ranks):
            room = min(devices[r].memory_bytes - devices[r].reserve_bytes for r in own)
            kinds = {devices[r].name for r in own}
            best = np.inf
            for again in choices:
                busy = np.maximum.reduce([self.seconds(k, again, kind, own) for kind in kinds])
                best = np.minimum(best, np.where(self.memory(k, again) <= room, busy, np.inf))
            worst = np.maximum(worst, best)
        for load in self._links(ranks):
            worst = np.maximum(worst, load)
        return worst * self.slots / self.m

    def _links(self, ranks):
        loads = defaultdict(float)
        for r in range(self.width):
            for (j, k), size in self.flows.items():
                for port in self.network.route(ranks[j][r], ranks[k][r]):
                    loads[port] = loads[port] + size
            for k, own in enumerate(ranks):
                share = ring(self.gradients[k], self.width, self.slots)
                for port in self.network.route(own[r], own[(r + 1) % self.width]):
                    loads[port] = loads[port] + share
        return [load / self.network.bandwidth(port) for port, load in loads.items()]
