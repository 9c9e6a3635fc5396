"""The trace of a simulation, in the format of a run's."""

from collections import defaultdict
from pathlib import Path

from p2bw.compiler.plan import Plan
from p2bw.compiler.simulation.job import PS, Job
from p2bw.contract.schedule import Action
from p2bw.telemetry.trace import Trace, join_parts


class Spans:
    """What each class of replicas did at each stage, and the memory that it had."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.spans: dict[tuple[int, int], list[tuple[Action, int, int]]] = defaultdict(list)
        self.memory: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)

    def record(self, own: int, stage: int, action: Action, began: int, now: int) -> None:
        self.spans[own, stage].append((action, began, now))

    def usage(self, own: int, stage: int, now: int, used: int) -> None:
        self.memory[own, stage].append((now, used))

    def write(self, path: Path, plan: Plan, classes: tuple[tuple[int, ...], ...]) -> None:
        """Every rank's, those of a class alike."""
        run = plan.for_runtime()
        for own, replicas in enumerate(classes):
            for stage in plan.stages:
                for replica in replicas:
                    rank = stage.devices[replica]
                    trace = Trace(path, run, self.job.pipe, rank, 0.0)
                    for action, began, now in self.spans[own, stage.index]:
                        trace.action(action, began / PS, now / PS)
                    for at, used in self.memory[own, stage.index]:
                        trace.memory(used, at / PS)
        join_parts(path, run.ranks)
