"""How long a rank has been computing, and when."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from p2bw.contract.schedule import Action

Record = Callable[[Action, float, float], None]  # an action, and from when to when: seconds


class Clock:
    """Sums up the time spent inside `computing()`; on a GPU by its own events, without waiting.

    `record` is told of each action's span, in seconds of time.perf_counter.
    """

    def __init__(self, device: torch.device, record: Record | None = None) -> None:
        self.on_gpu = device.type == "cuda"
        self.record = record
        self.summed_s = 0.0
        self.pending: deque[tuple[Action, torch.cuda.Event, torch.cuda.Event]] = deque()
        if self.on_gpu:  # a point that both clocks know: the last that has been taken
            self.known = torch.cuda.Event(True)  # type: ignore[no-untyped-call]
            self.known.record()
            self.known.synchronize()
            self.known_s = time.perf_counter()

    @contextmanager
    def computing(self, action: Action) -> Iterator[None]:
        if not self.on_gpu:
            start_s = time.perf_counter()
            yield
            self._add(action, start_s, time.perf_counter())
            return
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self.pending.append((action, start, end))
        while self.pending and self.pending[0][2].query():  # type: ignore[no-untyped-call]
            self._take()

    def busy_s(self) -> float:
        while self.pending:
            self.pending[0][2].synchronize()
            self._take()
        return self.summed_s

    def _take(self) -> None:
        action, start, end = self.pending.popleft()
        start_s = self.known_s + self.known.elapsed_time(start) / 1000
        end_s = start_s + start.elapsed_time(end) / 1000
        self.known, self.known_s = end, end_s
        self._add(action, start_s, end_s)

    def _add(self, action: Action, start_s: float, end_s: float) -> None:
        self.summed_s += end_s - start_s
        if self.record is not None:
            self.record(action, start_s, end_s)
