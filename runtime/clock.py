"""How long a rank has been computing."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums up the time spent inside `computing()`; on a GPU by its own events, without waiting."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.summed_s = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def computing(self) -> Iterator[None]:
        if not self.on_gpu:
            start_s = time.perf_counter()
            yield
            self.summed_s += time.perf_counter() - start_s
            return
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self.pending.append((start, end))
        while self.pending and self.pending[0][1].query():  # type: ignore[no-untyped-call]
            self._take()

    def busy_s(self) -> float:
        while self.pending:
            self.pending[0][1].synchronize()
            self._take()
        return self.summed_s

    def _take(self) -> None:
        start, end = self.pending.popleft()
        self.summed_s += start.elapsed_time(end) / 1000
