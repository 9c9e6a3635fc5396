"""A trace of a run as it was: JSON in Chrome's trace event format, which ui.perfetto.dev opens."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from p2bw.contract.plan import Plan
from p2bw.contract.schedule import Action, Kind, Pipeline
from p2bw.contract.store import Store
from p2bw.contract.tensors import renamed
from p2bw.telemetry.report import Lines

RUN = "p2bw run"  # an event that says what was run
_ROUNDS = 4  # in which a rank asks for the time


class Trace:
    """One rank's part of a trace, in a file of its own that Perfetto opens even if it is cut off.

    Each rank is a process with two tracks: what it computes, and when it begins to send and waits
    for what it receives. An arrow goes from a message's send to its receive.
    """

    def __init__(
        self, path: Path, plan: Plan, pipeline: Pipeline, rank: int, zero_s: float
    ) -> None:
        stage, self.replica = plan.position(rank)
        channels = pipeline.channels
        self.number = {c: i * plan.width + self.replica for i, c in enumerate(channels)}
        self.messages = plan.width * len(channels)
        self.rank, self.zero_s = rank, zero_s
        self.lines = Lines(_part(path, rank), "--trace")
        self.lines.add("[\n")
        run = {
            "schedule": pipeline.schedule,
            "microbatches": pipeline.microbatches,
            "clipped": pipeline.clipped,
            "depth": plan.depth,
            "width": plan.width,
        }
        self._add(ph="M", name=RUN, args=run)  # Perfetto skips what it does not know
        name = f"rank {rank}: stage {stage}" + f", replica {self.replica}" * (plan.width > 1)
        self._add(ph="M", name="process_name", args={"name": name})
        self._add(ph="M", name="process_sort_index", args={"sort_index": rank})
        for track, called in enumerate(("compute", "messages")):
            self._add(ph="M", tid=track, name="thread_name", args={"name": called})

    def action(self, action: Action, start_s: float, end_s: float) -> None:
        """A span. That of a receive, and of a sum over replicas, is the time of waiting for it."""
        start, end = (round((s - self.zero_s) * 1e9) for s in (start_s, end_s))
        end = max(end, start + 2)  # ns
        channel, tid = action.channel, int(action.channel is not None or action.kind is Kind.GATHER)
        span: dict[str, object] = {"tid": tid, "ts": start / 1000, "dur": (end - start) / 1000}
        if channel is None:
            args = {"index": action.index, "version": action.version, "replica": self.replica}
            self._add(ph="X", name=str(action).replace("w", " w"), args=args, **span)
            return
        sends = action.kind is Kind.SEND
        way = f"to {channel.target}" if sends else f"from {channel.source}"
        name = f"{action.kind}{action.index} {channel.flow} {channel.tensor} {way}"
        args = {"index": action.index, "replica": self.replica}
        self._add(ph="X", name=name, cat=channel.flow, args=args, **span)
        flow = {"ph": "s", "ts": (start + 1) / 1000} if sends else {"ph": "f", "bp": "e"}
        number = action.index * self.messages + self.number[channel]
        flow = {"tid": tid, "id": number, "name": channel.tensor, "ts": (end - 1) / 1000} | flow
        self._add(cat=channel.flow, **flow)

    def memory(self, used: int, at_s: float) -> None:
        """How many bytes the rank uses from now on."""
        at = round((at_s - self.zero_s) * 1e9) / 1000
        self._add(ph="C", name="memory", ts=at, args={"bytes": used})

    def _add(self, **event: object) -> None:
        self.lines.add(json.dumps({"pid": self.rank} | event) + ",\n")


def join_parts(path: Path, ranks: int) -> None:
    """Make one trace of the ranks' parts, if any are on this machine and not joined yet."""
    parts = [part for rank in range(ranks) if (part := _part(path, rank)).exists()]
    if not parts:
        return
    with renamed(path) as beside, beside.open("w", encoding="utf-8") as file:
        before = '{"displayTimeUnit": "ms", "traceEvents": [\n'
        for event in (event for part in parts for event in _events(part)):
            file.write(before + event)
            before = ",\n"
        file.write("\n]}\n")
    for part in parts:
        part.unlink()
    if missing := ranks - len(parts):
        print(f"{path} lacks {missing} ranks: their parts are elsewhere", file=sys.stderr)


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank{rank}")


def _events(part: Path) -> Iterator[str]:
    """Those that are there as a whole."""
    with part.open(encoding="utf-8", errors="replace") as file:
        yield from (line[:-2] for line in file if line.endswith("},\n"))


def align(store: Store, rank: int, world: int) -> float:
    """When rank 0 came here, by this rank's clock: the zero that all ranks count from.

    A difference between two clocks too small to tell from the way to rank 0 and back is taken to
    be none: on one machine all processes have the same clock.
    """
    now = time.perf_counter
    rounds = []
    if rank == 0:
        store.set("clock", repr(now()))
    for key in (f"clock/{r}/{i}" for r in range(1, world) for i in range(_ROUNDS)):
        if rank == 0:
            store.get(key)
            store.set(f"{key}/answer", repr(now()))
        elif key.startswith(f"clock/{rank}/"):
            asked_s = now()
            store.set(key, "")
            theirs_s, answered_s = float(store.get(f"{key}/answer")), now()
            rounds.append((answered_s - asked_s, theirs_s - (asked_s + answered_s) / 2))
    trip_s, ahead_s = min(rounds, default=(0.0, 0.0))
    return float(store.get("clock")) - (ahead_s if abs(ahead_s) > trip_s / 2 else 0)
