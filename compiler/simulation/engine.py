"""Discrete events: ranks perform their actions, messages share links, sums join the replicas.

Time is whole picoseconds. Events at one time are handled in the order of their kinds and numbers,
so that a simulation is the same everywhere, and a state that comes again goes on as before.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from p2bw.compiler.links import Network
from p2bw.compiler.simulation.job import PPM, Job
from p2bw.compiler.simulation.links import Links
from p2bw.compiler.simulation.steps import Step, make_steps
from p2bw.compiler.simulation.symmetry import Symmetry, find_symmetry
from p2bw.contract.schedule import Action, Channel, Kind

_ARRIVAL, _FLOW, _READY = range(3)  # kinds of events, in the order of those at one time
REPLICAS = "replicas"  # what a rank waits for, if not for a message's flow

Record = Callable[[int, int, Action, int, int], None]  # class, stage, action, from, to (ps)
Usage = Callable[[int, int, int, int], None]  # class, stage, at (ps), bytes
Watch = Callable[["Mark"], bool]  # whether to go on


@dataclass(frozen=True, slots=True)
class Mark:
    """The moment at which the first stage closes a batch: the state, and sums up to then."""

    batch: int
    at: int
    state: object
    busy: tuple[int, ...]  # ps, of each process
    waited: tuple[Counter[str], ...]  # ps by what was waited for, of each process
    carried: tuple[int, ...]  # bytes of each class of ports


class Engine:
    """All replicas that differ (`Symmetry`), each a process per stage (class * depth + stage).

    After `run`: when each process `ended`, how long it was `busy` and `waited`, its peaks of memory
    and of microbatches in flight. `watch` is shown a Mark of every batch, and may end the run.
    """

    def __init__(
        self,
        job: Job,
        *,
        record: Record | None = None,
        usage: Usage | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.job, self.pipe, self.depth = job, job.pipe, job.pipe.depth
        self.record, self.usage, self.watch = record, usage, watch
        network = Network(job.topology)
        self.symmetry: Symmetry = find_symmetry(job, network)
        channels = self.pipe.channels
        self.width = len(self.symmetry.classes)
        self.links = Links(self.symmetry, self._push_flow)
        number = {channel: i for i, channel in enumerate(channels)}
        self.todo = [make_steps(job, stage, number) for stage in range(self.depth)]
        self.steps: list[list[Step]] = [[] for _ in range(self.depth)]  # those made so far
        pairs = {pair: i for i, pair in enumerate(self.symmetry.pairs)}
        self.pair_of = [pairs[c.source, c.target] for c in channels]
        self.size = [job.sizes[channel] for channel in channels]
        self.heap: list[tuple[int, int, int, int]] = []

        count = self.width * self.depth
        self.at = [0] * count  # the next step of each process
        self.taken = [0] * count  # what it waited for and has
        self.blocked: list[int | None] = [None] * count  # on a channel, or -1: on the sum
        self.since = [0] * count
        self.began: list[int | None] = [None] * count  # of a computation that is under way
        self.ended = [0] * count
        self.busy = [0] * count
        self.waited: list[Counter[str]] = [Counter() for _ in range(count)]
        self.draws = [self._draws(p) for p in range(count)] if job.jitter else []

        messages = self.width * len(channels)
        self.posted, self.sent, self.arrived = ([0] * messages for _ in range(3))
        self.queues: list[deque[tuple[int, int]]] = [
            deque() for _ in range(self.width * len(pairs))
        ]  # messages of a pair of ranks in order: channel, number
        self.moving: list[int | None] = [None] * len(self.queues)  # channel of the one under way
        self.closed: list[Counter[int]] = [Counter() for _ in range(self.depth)]
        self.summing = [0] * self.depth  # batches whose sums were begun, by stage
        self.summed = [0] * self.depth

        self.stash, self.peak_stash = [0] * count, [0] * count
        self.sets = [0] * count  # of gradients
        self.opened = [-1] * count  # the last batch that has a set
        self.peak = [0] * count  # bytes
        self.going = True
        self.first_close = self.last_forward = 0  # of the first process

    def run(self) -> None:
        for process in range(len(self.at)):
            self._use(process, 0)
            self._advance(process, 0)
        heap = self.heap
        while heap and self.going:
            now, what, key, stamp = heapq.heappop(heap)
            if what == _READY:
                self._finish(key, now)
                self._advance(key, now)
            elif what == _ARRIVAL:
                self._arrive(key, now)
            elif self.links.valid(key, stamp):
                self._flow_ends(key, now)
        stuck = [p for p in range(len(self.at)) if self._step(p) is not None]
        assert not stuck or not self.going, f"the simulation hangs in the processes {stuck}"

    # What processes do.

    def _advance(self, p: int, now: int) -> None:
        """Perform the steps of a process until it computes, waits, or has ended."""
        base = p // self.depth * len(self.size)
        while (step := self._step(p)) is not None:
            action, duration, channel, waits = step
            while self.taken[p] < len(waits):
                wanted, number, _ = waits[self.taken[p]]
                if self.arrived[base + wanted] <= number:
                    self.blocked[p], self.since[p] = base + wanted, now
                    return
                self._took(p, waits[self.taken[p]], now, now)
            kind = action.kind
            if kind is Kind.RECEIVE:
                self.posted[base + channel] += 1
                self._move(self._pair(base + channel), now)
            elif kind is Kind.SEND:
                self.sent[base + channel] += 1
                pair = self._pair(base + channel)
                self.queues[pair].append((base + channel, action.index))
                self._note(p, action, now, now)
                self._move(pair, now)
            elif kind is Kind.CLOSE:
                self._close(p, action.index, now)
            elif kind is Kind.GATHER:
                if self.pipe.replicated and self.summed[p % self.depth] <= action.index:
                    self.blocked[p], self.since[p] = -1, now
                    return
                if self.pipe.replicated:
                    self._note(p, action, now, now)
            else:
                self._begin(p, action, duration, now)
                return
            self.at[p] += 1
            self.taken[p] = 0
        self.ended[p] = now

    def _step(self, p: int) -> Step | None:
        """What a process does, or waits for, now; made when the first of a stage's comes to it."""
        steps, at = self.steps[p % self.depth], self.at[p]
        if at == len(steps):
            step = next(self.todo[p % self.depth], None)
            if step is None:
                return None
            steps.append(step)
        return steps[at]

    def _begin(self, p: int, action: Action, duration: int, now: int) -> None:
        if self.draws:
            jitter = self.draws[p].randint(-self.job.jitter, self.job.jitter)
            duration = duration * (PPM + jitter) // PPM
        stage = p % self.depth
        rank = self.job.ranks[stage][self.symmetry.classes[p // self.depth][0]]
        duration = duration * self.job.factors.get(rank, PPM) // PPM
        self.began[p] = now
        self._hold(p, action, now)
        own = self.job.own[stage].get(action.kind, 0)
        heapq.heappush(self.heap, (now + duration + own, _READY, p, 0))

    def _finish(self, p: int, now: int) -> None:
        """A computation has ended."""
        began, action = self.began[p], self.steps[p % self.depth][self.at[p]].action
        assert began is not None
        computed = now - self.job.own[p % self.depth].get(action.kind, 0)
        self.busy[p] += computed - began
        self.began[p] = None
        if p == 0 and action.kind is Kind.FORWARD:
            self.last_forward = now
        self._note(p, action, began, computed)
        self._release(p, action, now)
        self.at[p] += 1
        self.taken[p] = 0

    def _took(self, p: int, wait: tuple[int, int, Channel], began: int, now: int) -> None:
        _, number, channel = wait
        self.taken[p] += 1
        self.waited[p][channel.flow] += now - began
        if self.record is not None:
            self._note(p, Action(Kind.RECEIVE, number, channel=channel), began, now)

    def _note(self, p: int, action: Action, began: int, now: int) -> None:
        if self.record is not None:
            self.record(p // self.depth, p % self.depth, action, began, now)

    # Messages: those from one rank to another go one after the other, pairs of ranks share links.

    def _pair(self, message: int) -> int:
        own, channel = divmod(message, len(self.size))
        return own * len(self.symmetry.pairs) + self.pair_of[channel]

    def _move(self, pair: int, now: int) -> None:
        """Start the first message of a pair whose receive is posted, when the one before is done.

        None waits for one that another channel brings: what receives is its own.
        """
        if self.moving[pair] is not None:
            return
        queue = self.queues[pair]
        for place, (message, number) in enumerate(queue):
            if self.posted[message] > number:
                del queue[place]
                self.moving[pair] = message
                self.links.begin(pair, self.size[message % len(self.size)], now)
                return

    def _push_flow(self, at: int, flow: int, stamp: int) -> None:
        heapq.heappush(self.heap, (at, _FLOW, flow, stamp))

    def _flow_ends(self, flow: int, now: int) -> None:
        arrives = self.links.end(flow, now)
        if flow >= len(self.queues):  # the sum of a stage, as ~stage
            heapq.heappush(self.heap, (arrives, _ARRIVAL, len(self.queues) - 1 - flow, 0))
            return
        message = self.moving[flow]
        assert message is not None
        self.moving[flow] = None
        heapq.heappush(self.heap, (arrives, _ARRIVAL, message, 0))
        self._move(flow, now)

    def _arrive(self, message: int, now: int) -> None:
        if message < 0:
            self._sum_ends(~message, now)
            return
        self.arrived[message] += 1
        own, number = divmod(message, len(self.size))
        p = own * self.depth + self.pipe.channels[number].target
        if self.blocked[p] == message:
            self.blocked[p] = None
            wait = self.steps[p % self.depth][self.at[p]].waits[self.taken[p]]
            self._took(p, wait, self.since[p], now)
            self._advance(p, now)

    # Sums over replicas.

    def _close(self, p: int, batch: int, now: int) -> None:
        stage = p % self.depth
        if p == 0 and self.watch is not None:
            self.going = self.watch(self._mark(batch, now))
        if p == 0 and not batch:
            self.first_close = now
        if self.pipe.replicated:
            self.closed[stage][batch] += 1
            self._sum(stage, now)

    def _sum(self, stage: int, now: int) -> None:
        """Begin the next sum of a stage, once all replicas have what they add."""
        batch = self.summing[stage]
        if self.summed[stage] == batch and self.closed[stage][batch] == self.width:
            del self.closed[stage][batch]
            self.summing[stage] += 1
            self.links.begin(len(self.queues) + stage, self.job.ring[stage], now)

    def _sum_ends(self, stage: int, now: int) -> None:
        self.summed[stage] += 1
        self._sum(stage, now)
        for p in range(stage, len(self.at), self.depth):
            if self.blocked[p] == -1:
                self.blocked[p] = None
                self.waited[p][REPLICAS] += now - self.since[p]
                self._note(p, self.steps[stage][self.at[p]].action, self.since[p], now)
                self.at[p] += 1
                self._advance(p, now)

    # Memory.

    def _hold(self, p: int, action: Action, now: int) -> None:
        """What an action takes as it begins."""
        if action.kind is Kind.FORWARD:
            self.stash[p] += 1
            self.peak_stash[p] = max(self.peak_stash[p], self.stash[p])
        elif action.kind is Kind.BACKWARD:
            batch = action.index // self.pipe.microbatches
            if batch > self.opened[p]:
                self.opened[p] = batch
                self.sets[p] += 1
        else:
            return
        memory = self.job.memory[p % self.depth]
        again = memory.again if action.kind is Kind.BACKWARD else 0
        self._use(p, now, memory.transient + again)

    def _release(self, p: int, action: Action, now: int) -> None:
        """What is free once it has ended."""
        if action.kind is Kind.BACKWARD:
            self.stash[p] -= 1
        elif action.kind is Kind.UPDATE:
            self.sets[p] -= 1
        elif action.kind is not Kind.FORWARD:
            return
        self._use(p, now)

    def _use(self, p: int, now: int, more: int = 0) -> None:
        memory = self.job.memory[p % self.depth]
        used = memory.fixed + self.stash[p] * memory.kept + self.sets[p] * memory.gradients + more
        self.peak[p] = max(self.peak[p], used)
        if self.usage is not None:
            self.usage(p // self.depth, p % self.depth, now, used)

    def _draws(self, p: int) -> random.Random:
        """Each process has numbers of its own: they do not depend on the order of events."""
        return random.Random(f"{self.job.seed} {p % self.depth} {p // self.depth}")

    # The state, seen from the first stage's close of a batch.

    def _mark(self, batch: int, now: int) -> Mark:
        return Mark(
            batch,
            now,
            self._state(batch, now),
            tuple(
                busy if began is None else busy + now - began
                for busy, began in zip(self.busy, self.began, strict=True)
            ),
            tuple(self._waited(p, now) for p in range(len(self.at))),
            tuple(self.links.carried),
        )

    def _waited(self, p: int, now: int) -> Counter[str]:
        """With the wait that goes on."""
        waited, message = Counter(self.waited[p]), self.blocked[p]
        if message is not None:
            flow = self.pipe.channels[message % len(self.size)].flow if message >= 0 else REPLICAS
            waited[flow] += now - self.since[p]
        return waited

    def _state(self, batch: int, now: int) -> object:
        """All that decides what comes, counted from now and from the batch."""
        m = self.pipe.microbatches
        bases = [batch if c.per_batch else batch * m for c in self.pipe.channels] * self.width
        events = [
            (at - now, what, key)
            for at, what, key, stamp in self.heap
            if what != _FLOW or self.links.valid(key, stamp)
        ]
        return (
            tuple(self._place(p, batch) for p in range(len(self.at))),
            tuple(self.taken),
            tuple(self.blocked),
            tuple(
                tuple(count - base for count, base in zip(counts, bases, strict=True))
                for counts in (self.posted, self.sent, self.arrived)
            ),
            tuple(self.moving),
            tuple(n - batch for n in (*self.summing, *self.summed)) if self.pipe.replicated else (),
            tuple(tuple(sorted((b - batch, n) for b, n in c.items())) for c in self.closed),
            self.links.state(now),
            tuple(sorted(events)),
        )

    def _place(self, p: int, batch: int) -> object:
        """The step that a process is at."""
        step = self._step(p)
        if step is None:
            return None
        action = step.action
        by_batch = action.channel.per_batch if action.channel else action.kind not in "FB"
        base = batch if by_batch else batch * self.pipe.microbatches
        return action.kind, action.index - base, action.channel
