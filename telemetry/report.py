"""What rank 0 tells about a run: lines of progress, metrics, TensorBoard, and the result."""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from p2bw.contract.errors import UsageError
from p2bw.contract.job import Options
from p2bw.contract.tensors import renamed
from p2bw.runtime.prepare import Prepared
from p2bw.telemetry.clock import Clock

_PAUSE_S = 1.0  # between two lines of progress
_WINDOW = 8  # steps whose speed is told: the last ones may end together, as updates are late
_Mark = tuple[float, int, float]  # seconds on the clock, steps of this run, seconds of computing


class Lines:
    """A file that grows during a run. Where it no longer can, that is said and training goes on."""

    def __init__(self, path: Path, option: str) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            fact = f"{path} cannot be written: {error.strerror}"
            raise UsageError(f"{fact}; name another file with {option}") from None

    def add(self, text: str) -> None:
        try:
            if self.file is not None:
                os.write(self.file, text.encode())
        except OSError as error:
            print(f"p2bw: {self.path} ends here: {error.strerror}", file=sys.stderr, flush=True)
            self.file = None


class Report:
    """Collects the losses of a run, and says how it goes: on stderr, and in files if opened."""

    def __init__(self, prepared: Prepared, *, say: bool) -> None:
        plan = prepared.plan
        self.default = prepared.job.artifact / "metrics.jsonl"
        self.steps = prepared.pipeline.batches
        self.samples = plan.microbatch * plan.width * prepared.pipeline.microbatches  # per step
        self.say = say
        self.losses: list[float] = []
        self.clock: Clock | None = None
        self.metrics: Lines | None = None
        self.board: Any = None
        self.started = self.stopped = self.told = self._mark()
        self.seen = deque([self.started], _WINDOW)

    def note(self, line: str) -> None:
        """Something that happened, on stderr."""
        if self.say:
            print(f"p2bw: {line}", file=sys.stderr, flush=True)

    def open(self, options: Options, done: int) -> None:
        """Begin the files; those of a run that is resumed after step `done` go on from there."""
        path = options.metrics or self.default
        kept = "".join(_lines_until(path, done))
        self.metrics = Lines(path, "--metrics")
        self.metrics.add(kept)
        if options.tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard: pip install tensorboard first") from None
            self.board = SummaryWriter(str(options.tensorboard), purge_step=done + 1)

    def start(self, clock: Clock) -> None:
        self.clock = clock
        self.started = self.told = self._mark()
        self.seen = deque([self.started], _WINDOW)

    def stop(self) -> float:
        """Seconds since the start."""
        self.stopped = self._mark()
        if self.board is not None:
            self.board.close()
        return self.stopped[0] - self.started[0]

    def update(
        self, batch: int, loss: float, lr: float | None = None, norm: float | None = None
    ) -> None:
        """One more batch is done; prints at most one line a second, and the last one."""
        self.losses.append(loss)
        now, step = self._mark(), batch + 1
        since = self.seen[0]
        rate, share = self._speed(since, now)
        self.seen.append(now)
        values = {"loss": loss, "lr": lr, "grad_norm": norm, "samples_per_s": rate}
        self._record(step, values | {"utilisation": share})
        if self.say and (now[1] == 1 or step == self.steps or now[0] - self.told[0] >= _PAUSE_S):
            rate, share = self._speed(min(since, self.told), now)
            left = timedelta(seconds=round((self.steps - step) * self.samples / rate))
            print(
                f"step {step:{len(str(self.steps))}}/{self.steps}  loss {loss:.4f}  "
                f"{rate:.4g} samples/s  utilisation {share:.2f}  {left} left",
                file=sys.stderr,
                flush=True,
            )
            self.told = now

    def summary(self, utilisation: float) -> dict[str, Any]:
        rate, _ = self._speed(self.started, self.stopped)
        return {"losses": self.losses, "samples_per_s": rate, "utilisation": utilisation}

    def _mark(self) -> _Mark:
        """On a GPU the time of computing is known a little late, so that nobody waits for it."""
        busy_s = self.clock.summed_s if self.clock else 0.0
        return time.perf_counter(), len(self.losses), busy_s

    def _speed(self, since: _Mark, now: _Mark) -> tuple[float, float]:
        """Samples per second of the whole run, and how much of the time this rank computed."""
        took_s = now[0] - since[0]
        return (now[1] - since[1]) * self.samples / took_s, min((now[2] - since[2]) / took_s, 1.0)

    def _record(self, step: int, values: dict[str, float | None]) -> None:
        known = {n: v for n, v in values.items() if v is not None and math.isfinite(v)}
        if self.metrics is not None:
            self.metrics.add(json.dumps({"step": step, **known, "time": time.time()}) + "\n")
        if self.board is not None:
            for name, value in known.items():
                self.board.add_scalar(name, value, step)


def _lines_until(path: Path, done: int) -> Iterator[str]:
    """The metrics that a run has already written up to step `done`; none of another run's."""
    lines = path.read_text(encoding="utf-8", errors="replace") if done and path.is_file() else ""
    for line in lines.splitlines(keepends=True):
        try:
            if 0 < json.loads(line)["step"] <= done:
                yield line.rstrip() + "\n"
        except (ValueError, KeyError, TypeError):
            continue  # cut off where the run ended


def write_result(path: Path, summary: dict[str, Any]) -> None:
    with renamed(path) as beside:
        beside.write_text(json.dumps(summary) + "\n", encoding="utf-8")
