"""What rank 0 tells about a run: a line of progress, and the result."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from p2bw.runtime.prepare import Prepared

_PAUSE_S = 1.0  # between two lines of progress


class Report:
    """Collects the losses of a run and prints how it goes to stderr."""

    def __init__(self, prepared: Prepared, *, say: bool) -> None:
        plan = prepared.plan
        self.steps = prepared.pipeline.batches
        self.samples = plan.microbatch * plan.width * prepared.pipeline.microbatches  # per step
        self.say = say
        self.losses: list[float] = []
        self.started_s = self.stopped_s = self.told_s = 0.0
        self.told = 0

    def start(self) -> None:
        self.started_s = self.told_s = time.perf_counter()

    def stop(self) -> float:
        """Seconds since the start."""
        self.stopped_s = time.perf_counter()
        return self.stopped_s - self.started_s

    def update(self, batch: int, loss: float) -> None:
        """One more batch is done; prints at most one line a second, and the last one."""
        self.losses.append(loss)
        now_s = time.perf_counter()
        step = batch + 1
        if self.say and (step in (1, self.steps) or now_s - self.told_s >= _PAUSE_S):
            rate = (step - self.told) * self.samples / (now_s - self.told_s)
            width = len(str(self.steps))
            print(
                f"step {step:{width}}/{self.steps}  loss {loss:.4f}  {rate:.4g} samples/s",
                file=sys.stderr,
                flush=True,
            )
            self.told, self.told_s = step, now_s

    def summary(self, utilisation: float) -> dict[str, Any]:
        elapsed_s = self.stopped_s - self.started_s
        return {
            "losses": self.losses,
            "samples_per_s": self.steps * self.samples / elapsed_s,
            "utilisation": utilisation,
        }


def write_result(path: Path, summary: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    os.replace(beside, path)
