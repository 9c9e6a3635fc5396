"""How long a rank has been computing, and when."""

import time
from collections import deque
from collections.abc import Callable

import torch

from p2bw.contract.schedule import Action

Record = Callable[[Action, float, float], None]  # an action, and from when to when: seconds
Point = float | torch.cuda.Event  # in time: seconds of time.perf_counter, or what a GPU comes by


class Clock:
    """Sums up the time from `begin()` to `end()`; on a GPU by its own events, without waiting.

    `record` is told of each action's span, in seconds of time.perf_counter. (Calls of context
    managers would be nicer, but each takes 30 us where computing has taken the caches.)
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

    def begin(self) -> Point:
        """Now, for the action that begins."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def end(self, action: Action, start: Point) -> None:
        """An action that began at `start` is done, or all of it that a GPU is given."""
        if isinstance(start, float):
            self._add(action, start, time.perf_counter())
            return
        end = torch.cuda.Event(True)  # type: ignore[no-untyped-call]
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
