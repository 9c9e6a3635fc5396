"""All ranks as threads of one process, and the transport between them: for tests, and one GPU."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from p2bw.contract.errors import PeerError
from p2bw.contract.job import Job
from p2bw.contract.schedule import Channel
from p2bw.runtime.prepare import initial_stage, prepare
from p2bw.runtime.transport import Arrival, Reduction
from p2bw.runtime.worker import Events, Start, Update, Worker


class Hub:
    """Where the ranks of one process meet. When one fails, all that wait are told."""

    def __init__(self, timeout_s: float = 60) -> None:
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.messages: dict[tuple[int, Channel], deque[Tensor]] = defaultdict(deque)
        self.sums: dict[tuple[int, int], dict[int, Sequence[Tensor]]] = defaultdict(dict)
        self.failure: BaseException | None = None

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Call with `changed` held."""
        if not self.changed.wait_for(lambda: ready() or self.failure is not None, self.timeout_s):
            raise PeerError(f"{what}: nothing came in {self.timeout_s:g} s")
        if self.failure is not None:
            raise PeerError(f"{what}: another rank failed")

    def take(self, messages: deque[Tensor], what: str) -> Tensor:
        with self.changed:
            self.wait_for(lambda: bool(messages), what)
            return messages.popleft()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()


class LocalTransport:
    """One rank's end of a hub; messages keep their strides."""

    def __init__(self, hub: Hub, stage: int, replica: int, width: int) -> None:
        self.hub = hub
        self.stage = stage
        self.replica = replica
        self.width = width
        self.reductions = 0

    def send(self, channel: Channel, tensor: Tensor) -> None:
        with self.hub.changed:
            self.hub.messages[self.replica, channel].append(tensor.clone())
            self.hub.changed.notify_all()

    def receive(self, channel: Channel) -> Arrival:
        with self.hub.changed:
            return partial(self.hub.take, self.hub.messages[self.replica, channel], str(channel))

    def reduce(self, tensors: Sequence[Tensor]) -> Reduction:
        with self.hub.changed:
            given = self.hub.sums[self.stage, self.reductions]
            given[self.replica] = [tensor.clone() for tensor in tensors]
            if len(given) == self.width:  # the sums that wait for them have them
                del self.hub.sums[self.stage, self.reductions]
            self.reductions += 1
            self.hub.changed.notify_all()
        return partial(self._sum, given, tensors)

    def _sum(self, given: Mapping[int, Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
        with self.hub.changed:
            self.hub.wait_for(lambda: len(given) == self.width, "the sum over replicas")
        for index, tensor in enumerate(tensors):
            total = given[0][index].clone()
            for replica in range(1, self.width):
                total += given[replica][index]
            tensor.copy_(total)

    def finish(self) -> None:
        pass


@dataclass(slots=True)
class Trained(Events):
    """What a run in one process gives: losses by batch, and each rank's final state."""

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)

    def update(self, update: Update) -> None:
        self.losses.append(update.loss)
        self.norms.append(update.norm)


def train_in_threads(
    job: Job,
    device: torch.device | None = None,
    events: Callable[[int], Events] | None = None,
    starts: Sequence[Start] | None = None,
) -> Trained:
    """Run all ranks of a job as threads of this process, over the in-process transport.

    `events` makes the listener of a rank; `starts` holds what each rank goes on from.
    """
    prepared = prepare(job, starts[0].step if starts else 0)
    plan = prepared.plan
    device = device or torch.device("cpu")
    hub, trained, alone = Hub(), Trained(), threading.RLock()
    for rank in range(plan.ranks):
        stage, replica = plan.position(rank)
        module = initial_stage(prepared, stage, device)
        transport = LocalTransport(hub, stage, replica, plan.width)
        listener = events(rank) if events else trained
        start = starts[rank] if starts else None
        trained.workers.append(
            Worker(prepared, rank, module, device, transport, listener, alone, start)
        )
    count = torch.get_num_threads()
    threads = [threading.Thread(target=_run, args=(w, hub, count)) for w in trained.workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hub.failure is not None:
        raise hub.failure
    trained.states = [worker.final_state() for worker in trained.workers]
    return trained


def _run(worker: Worker, hub: Hub, threads: int) -> None:
    torch.set_num_threads(threads)  # new threads do not follow the main one
    try:
        worker.run()
    except BaseException as error:  # whatever it is: the caller raises it, the others stop
        hub.fail(error)
