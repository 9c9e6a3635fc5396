"""The actions of a stage, woven of a schedule's compute order, its messages and its updates."""

from collections.abc import Callable, Iterator

from p2bw.contract.schedule import Action, Channel, Flow, Kind, Pipeline

Allows = Callable[[int], bool]


def actions(pipe: Pipeline, stage: int, allows: Allows | None = None) -> Iterator[Action]:
    """The actions of one stage, from the first forward to the last update, made as they are used.

    Receives are posted as many messages ahead as the channel spans stages, and the extra. Then a
    send always finds its receive posted (`check` proves it), and a message crosses while both ends
    compute. The run ends early before the first batch that `allows` refuses; all stages must be
    told alike.
    """
    return _Stage(pipe, stage, allows or (lambda batch: True)).actions()


class _Stage:
    """Weaves messages and updates into the compute order of one stage."""

    def __init__(self, pipe: Pipeline, stage: int, allows: Allows) -> None:
        self.pipe = pipe
        self.stage = stage
        self.allows = allows
        self.posted: dict[Channel, int] = {}
        # How many batches have come so far.
        self.closed = self.gathered = self.normed = self.updated = self.merged = pipe.first
        self.into, self.out = pipe.inbound(stage), pipe.outbound(stage)
        self.from_each = {flow: _by_source(channels) for flow, channels in self.into.items()}
        self.due = self._due()
        joint = pipe.late and (pipe.clipped or self.into[Flow.TIED])
        self.meeting = pipe.microbatches - pipe.depth - pipe.extra if joint else None
        self.woven: list[Action] = []  # that are to be done with the next computation

    def runs(self, microbatch: int) -> bool:
        batch = microbatch // self.pipe.microbatches
        return batch < self.pipe.batches and self.allows(batch)

    def compute_order(self) -> Iterator[tuple[Kind, int]]:
        """Forwards and backwards: some forwards ahead, then one of each in turn (1F1B).

        A pipeline that drains does so after every batch; the others only at the end of the run.
        """
        ahead, m = self.pipe.ahead(self.stage), self.pipe.microbatches
        forward = backward = self.pipe.first * m
        while self.runs(forward):
            end = forward + m if self.pipe.drains else None
            while forward != end and self.runs(forward):
                yield Kind.FORWARD, forward
                forward += 1
                if forward - backward > ahead:
                    yield Kind.BACKWARD, backward
                    backward += 1
            while backward < forward:
                yield Kind.BACKWARD, backward
                backward += 1

    def actions(self) -> Iterator[Action]:
        for kind, i in self.compute_order():
            if kind is Kind.FORWARD:
                self.forward(i)
            else:
                self.backward(i)
            yield from self.woven
            self.woven.clear()
        self.make(self.closed)
        yield from self.woven

    def add(self, kind: Kind, index: int, version: int = 0) -> None:
        self.woven.append(Action(kind, index, version))

    def forward(self, i: int) -> None:
        version = self.pipe.version(self.stage, i)
        self.make(version)
        if i == self.pipe.first * self.pipe.microbatches:
            self.receive(Flow.GRADIENT, i - 1)
        self.receive(Flow.ACTIVATION, i)
        self.add(Kind.FORWARD, i, version)
        self.send(Flow.ACTIVATION, i)

    def backward(self, i: int) -> None:
        batch, at = divmod(i, self.pipe.microbatches)
        # The first stage needs the next version right after this backward, the others later:
        # if each adds its part here, every part is where it is needed just in time.
        meets = at == self.meeting and batch == self.closed
        if meets:
            self.gather(batch)
        self.receive(Flow.GRADIENT, i)
        for channel in self.due.get(at, ()):
            self.woven.append(Action(Kind.RECEIVE, batch, channel=channel))
        self.add(Kind.BACKWARD, i, self.pipe.version(self.stage, i))
        self.send(Flow.GRADIENT, i)
        if meets:
            self.norm(batch)
        if at == self.pipe.microbatches - 1:
            self.send(Flow.LOSS, batch)  # not before: others wait for a backward
            self.close(batch)

    def close(self, batch: int) -> None:
        self.add(Kind.CLOSE, batch)
        self.closed = batch + 1
        if not self.pipe.late:
            self.update(batch + 1)

    def make(self, version: int) -> None:
        """See to it that a version is made: as late as possible, before its first forward."""
        for made in range(min(self.updated, self.merged) + 1, version + 1):
            self.update(made)
            self.merge(made)

    def gather(self, count: int) -> None:
        if self.gathered < count:
            self.gathered = count
            self.add(Kind.GATHER, count - 1)
            self.send(Flow.TIED, count - 1)

    def norm(self, count: int) -> None:
        if self.pipe.clipped and self.normed < count:
            self.normed = count
            self.add(Kind.NORM, count - 1)
            self.send(Flow.NORMS, count - 1)
            self.send(Flow.NORM, count - 1)

    def update(self, version: int) -> None:
        if self.updated < version:
            self.merge(version - 1)
            self.gather(version)
            self.norm(version)
            self.updated = version
            self.add(Kind.UPDATE, version - 1, version)

    def merge(self, version: int) -> None:
        if self.merged < version:
            self.merged = version
            if self.into[Flow.TIED]:
                self.add(Kind.MERGE, version - 1, version)

    def send(self, flow: Flow, index: int) -> None:
        for channel in self.out[flow]:
            self.woven.append(Action(Kind.SEND, index, channel=channel))

    def receive(self, flow: Flow, index: int) -> None:
        """Post what message `index` and those posted ahead of it still lack."""
        for same in self.from_each[flow]:
            message = self.posted.get(same[0], self.pipe.first * self.pipe.microbatches)
            while message <= index + same[0].distance + self.pipe.extra and self.runs(message):
                for channel in same:
                    self.woven.append(Action(Kind.RECEIVE, message, channel=channel))
                message += 1
            self.posted[same[0]] = message

    def _due(self) -> dict[int, list[Channel]]:
        """What comes once per batch, by the microbatch before whose backward it is posted.

        Later stages finish a batch earlier: post that much ahead what they send then.
        """
        last, due = self.pipe.microbatches - 1, dict[int, list[Channel]]()
        for channel in (c for f in Flow for c in self.into[f] if c.per_batch):
            ahead = min(max(channel.source - self.stage, 0), last)
            if channel.flow is Flow.LOSS:
                ahead = last  # it comes before the backwards
            elif channel.flow is Flow.TIED and self.pipe.late:
                ahead = 0  # it is large, and comes while the next batch runs
            due.setdefault(last - ahead, []).append(channel)
        return due


def _by_source(channels: list[Channel]) -> list[list[Channel]]:
    sources = dict.fromkeys(channel.source for channel in channels)
    return [[channel for channel in channels if channel.source == source] for source in sources]


def show(pipe: Pipeline) -> str:
    """The compute actions of every stage, one line each: F3w1 is forward 3 on weight version 1."""
    return "\n".join(
        f"{stage}: " + " ".join(str(a) for a in actions(pipe, stage) if a.channel is None)
        for stage in range(pipe.depth)
    )
