"""How a failure of one rank becomes the failure of all, said once; and how a run is stopped."""

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from p2bw.contract.errors import P2BWError, PeerError, StoppedError
from p2bw.contract.plan import Plan
from p2bw.contract.schedule import Action, Kind
from p2bw.contract.store import Place, Store
from p2bw.contract.tensors import renamed
from p2bw.runtime.place import within

FAILURE_FILE = "P2BW_FAILURE_FILE"  # environment: where a rank leaves why it failed
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: StoppedError.exit_code}

_POLL_S = 0.3
_SILENT = 17  # polls without a sign of life (5 s) are too many; counted, as this rank may sleep too
_LEAVE_S = 2  # so long a rank may take to say why it leaves
_leaving = threading.Lock()


def fail(error: BaseException, place: Place, store: Store | None) -> NoReturn:
    """Say once, for all ranks, what failed first; then leave at once, as peers may never answer."""
    if not _leaving.acquire(timeout=_LEAVE_S):  # by another thread, caught by a dead store
        os._exit(PeerError.exit_code)
    known = isinstance(error, P2BWError)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    record: dict[str, Any] = {
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, P2BWError) else P2BWError.exit_code,
        "rank": place.rank,
        "message": message if isinstance(error, StoppedError) else f"rank {place.rank}: {message}",
        "traceback": "" if known else "".join(traceback.format_exception(error)),
    }
    first, said = record, place.local_rank != 0  # if the store is gone: once on each machine
    with suppress(RuntimeError):
        if store is not None:
            first = json.loads(store.compare_set("failure", "", json.dumps(record)))
            said = first["rank"] != place.rank
    if not said and not _leave_record(record):
        print(f"{record['traceback']}p2bw: {record['message']}", file=sys.stderr, flush=True)
    os._exit(first["exit_code"])


def restarted(place: Place, run: Store) -> str:
    """Why torchrun has started all ranks anew; StoppedError if they were to stop."""
    if run.check(["stopped"]):
        raise StoppedError("not restarted, as the run was asked to stop")
    if place.local_rank == 0 and FAILURE_FILE in os.environ:
        Path(os.environ[FAILURE_FILE]).unlink(missing_ok=True)
    before = within(run, place.attempt - 1)
    why = json.loads(before.get("failure"))["message"] if before.check(["failure"]) else "a death"
    return f"restart {place.attempt} of {os.environ['TORCHELASTIC_MAX_RESTARTS']} after {why}"


def _leave_record(record: Mapping[str, Any]) -> bool:
    """Leave the first error for `p2bw run` to raise; false if it did not start this rank."""
    name = os.environ.get(FAILURE_FILE)
    if name and not Path(name).exists():
        with renamed(Path(name)) as beside:
            beside.write_text(json.dumps(record), encoding="utf-8")
    return bool(name)


class Stop:
    """Ends the run after the same batch on all ranks, however far each has come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.highest = -1  # batch that has been allowed here
        self.asked = False
        self.last: int | None = None  # batch of the run, once all ranks have said their highest

    def allows(self, batch: int) -> bool:
        """Whether a batch may begin; waits while that is being decided."""
        with self.changed:
            if not self.asked:
                self.highest = max(self.highest, batch)
            elif batch > self.highest:
                self.changed.wait_for(lambda: self.last is not None)
            return batch <= (self.highest if self.last is None else self.last)

    def ask(self) -> int:
        """Nothing more is allowed before `decide`; the highest batch that was."""
        with self.changed:
            self.asked = True
            return self.highest

    def decide(self, last: int) -> None:
        with self.changed:
            self.last = last
            self.changed.notify_all()


class Watched(Protocol):
    """What the watchdog looks at from its own thread: the worker."""

    at: Action | None  # what it performs
    waits: Action | None  # and the receive, send or sum that it waits for


class Watchdog:
    """Two threads of each rank that watch the other ranks, its own progress and its signals.

    They see a rank that died, froze or cannot be reached even while this one computes or waits
    inside gloo, where no exception reaches it. They count polls and not seconds: a machine that
    slept, or code that held the interpreter for long, must not make the others look dead.
    """

    def __init__(self, place: Place, run: Store, timeout_s: float) -> None:
        """`run`: over a connection of its own, as a thread that waits on one keeps it busy."""
        self.place, self.run, self.timeout_s = place, run, timeout_s
        self.store = within(run, place.attempt)
        self.stop = Stop()
        self.signal: signal.Signals | None = None  # that asked this rank to stop
        self.plan: Plan | None = None
        self.worker: Watched | None = None
        self.polls = self.asked = 0
        self.at: Action | None = None
        self.since_s = 0.0  # when it was first seen in that action
        self.heard: dict[int, tuple[int, int]] = {}  # polls of a rank, and ours when we heard it
        self.closed = threading.Event()
        self.signals = _catch_signals()
        self._say(self._status())  # now: a rank may freeze before its first poll
        self.threads = [
            threading.Thread(target=target, daemon=True) for target in (self._watch, self._listen)
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, plan: Plan, worker: Watched, first: int) -> None:
        """Watch a worker too, whose first batch is `first`."""
        self.stop.highest = first - 1
        self.plan, self.worker = plan, worker

    def close(self) -> None:
        """End the threads: one that the interpreter's end finds inside the store aborts."""
        self.closed.set()
        for thread in self.threads:
            thread.join(timeout=_SILENT * _POLL_S)

    def stopped(self, said: str) -> StoppedError:
        """The error that ends a run which was asked to stop."""
        number = signal.Signals(int(self.store.get("stop")))
        error = StoppedError(f"stopped by {number.name} {said}")
        error.exit_code = EXIT_CODES[number]
        return error

    def _listen(self) -> None:
        """Wait for signals, and see to it that the other thread is not caught by a dead store."""
        polls = ticks = 0
        while not self.closed.is_set():
            for number in _received(self.signals, _POLL_S):
                if self.signal is number is signal.SIGINT:  # pressed twice
                    os._exit(EXIT_CODES[number])
                self.signal = self.signal or number
            ticks = ticks + 1 if self.polls == polls else 0
            polls = self.polls
            if ticks > _SILENT and not self.closed.is_set():
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                fail(PeerError(f"the launcher at {where} does not answer"), self.place, None)

    def _watch(self) -> None:
        try:
            while not self.closed.wait(_POLL_S):
                self._poll()
        except RuntimeError as error:
            if not self.closed.is_set():
                lost = PeerError(f"the launcher, which keeps the ranks' store, is gone: {error}")
                fail(lost, self.place, None)
        except Exception as error:
            fail(error, self.place, self.store)

    def _poll(self) -> None:
        self.polls += 1
        status, ranks = self._status(), range(self.place.world)
        self._say(status)
        if self.store.check(["failure"]):
            raise PeerError("another rank has failed")  # and has said why
        if self.heard or self.store.check([f"status/{rank}" for rank in ranks]):  # all have begun
            # One rank watches all and all watch it, so that many ranks can share a store.
            self._listen_to(list(ranks) if self.place.rank == 0 else [0])
            if status["for_s"] > self.timeout_s:
                raise self._hang(self._read(list(ranks)))
        self._agree_to_stop()

    def _status(self) -> dict[str, Any]:
        """What this rank does, for the others to read."""
        worker = self.worker
        at, waits = (worker.at, worker.waits) if worker else (None, None)
        if at is not self.at:
            self.at, self.since_s = at, time.monotonic()
        return {
            "polls": self.polls,
            "name": self._name(self.place.rank),
            "pid": os.getpid(),
            "agent": os.environ.get("GROUP_RANK"),
            "action": "its start or end" if at is None else str(at),
            "for_s": 0.0 if at is None else time.monotonic() - self.since_s,
            "line": _line(),
            "waits": "" if waits is None else self._message(waits),
        }

    def _say(self, status: Mapping[str, Any]) -> None:
        self.store.set(f"status/{self.place.rank}", json.dumps(status))

    def _name(self, rank: int) -> str:
        """A rank and, once this one knows the plan, its stage."""
        if self.plan is None:
            return f"rank {rank}"
        return f"rank {rank} (stage {self.plan.position(rank)[0]})"

    def _runs(self, stage: int) -> str:
        """Who runs a stage in this rank's replica."""
        assert self.plan is not None
        _, replica = self.plan.position(self.place.rank)
        return self._name(self.plan.stages[stage].devices[replica])

    def _message(self, action: Action) -> str:
        """What a receive, a send or a sum over replicas is about."""
        channel = action.channel
        if channel is None:
            return f"the sum of batch {action.index} over the replicas"
        unit = "batch" if channel.per_batch else "microbatch"
        what = f"{channel.flow} {channel.tensor} of {unit} {action.index}"
        if action.kind is Kind.SEND:
            return f"{self._runs(channel.target)} to take {what}"
        return f"{what} from {self._runs(channel.source)}"

    def blame(self, error: PeerError) -> PeerError:
        """Say which message failed, too."""
        waits = self.worker.waits if self.worker else None
        return PeerError(f"waiting for {self._message(waits)}: {error}") if waits else error

    def _listen_to(self, ranks: Sequence[int]) -> None:
        for rank, status in zip(ranks, self._read(ranks), strict=True):
            polls, when = self.heard.get(rank, (-1, 0))
            if status["polls"] != polls:
                self.heard[rank] = status["polls"], self.polls
            elif self.polls - when > _SILENT:
                if status["agent"] == os.environ.get("GROUP_RANK") is not None:
                    _kill_sibling(status["pid"])  # or torchrun waits 30 s for it
                raise PeerError(
                    f"{self._name(rank)} is gone (frozen, killed, or its machine or network "
                    f"failed): no sign of life for {_SILENT * _POLL_S:.0f} s, in {status['action']}"
                )

    def _read(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        return list(map(json.loads, self.store.multi_get([f"status/{rank}" for rank in ranks])))

    def _hang(self, statuses: Sequence[Mapping[str, Any]]) -> PeerError:
        """Find who keeps the others waiting: whoever waits for nobody, for the longest time."""
        waiting = [status for status in statuses if status["waits"]]
        working = [status for status in statuses if not status["waits"]]
        text = f"nothing has moved for {self.timeout_s:.0f} s (--timeout): "
        if working:
            culprit = max(working, key=lambda status: status["for_s"])
            text += "{name} has been in {action} for {for_s:.0f} s, at {line}".format_map(culprit)
        text += "".join(f"; {status['name']} waits for {status['waits']}" for status in waiting)
        return PeerError(text)

    def _agree_to_stop(self) -> None:
        """Every rank says how far it went; the farthest decides."""
        if self.signal is not None and not self.asked:
            self.store.compare_set("stop", "", str(int(self.signal)))
        if self.stop.last is not None or not self.store.check(["stop"]):
            return
        keys = [f"allowed/{rank}" for rank in range(self.place.world)]
        if not self.asked:
            self.asked = self.polls
            self.run.set("stopped", "")  # for torchrun's restarts
            self.store.set(keys[self.place.rank], str(self.stop.ask()))
        if self.place.rank == 0 and self.store.check(keys):
            self.store.set("last", str(max(map(int, self.store.multi_get(keys)))))
        if self.store.check(["last"]):
            if self.worker is None:
                raise self.stopped("before it began")
            self.stop.decide(int(self.store.get("last")))
        elif self.polls - self.asked > _SILENT:
            missing = [key.removeprefix("allowed/") for key in keys if not self.store.check([key])]
            raise PeerError(f"ranks {', '.join(missing)} did not answer: gone?")


def _kill_sibling(pid: int) -> None:
    """Kill a frozen rank of this machine, if that is still what has this process id."""
    with suppress(OSError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if parent == str(os.getppid()):
            os.kill(pid, signal.SIGKILL)


def _line() -> str:
    """Where the program's main thread is: stage_1.py:52."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _catch_signals() -> int:
    """A pipe that the numbers of signals are written to, even while the main thread is in C."""
    receiving, sending = os.pipe()
    for end in (receiving, sending):
        os.set_blocking(end, False)
    for number in EXIT_CODES:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_release_signals)  # workers that load data
    return receiving


def _release_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL)


def _received(pipe: int, timeout_s: float) -> list[signal.Signals]:
    ready, _, _ = select.select([pipe], [], [], timeout_s)
    numbers = os.read(pipe, 64) if ready else b""
    return [signal.Signals(number) for number in numbers if number in set(EXIT_CODES)]
