"""Stop: ends a search early, at a wall-clock limit or on Ctrl-C; what it has found is kept."""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from p2bw.contract.errors import TimeLimitError

POLL_S = 0.05  # how often a running CP-SAT solve is asked whether to go on
TELL_S = 1.0  # how often it is told at most

Tell = Callable[[float, float], None]  # objective of the best solution so far, its bound


class Interrupted(KeyboardInterrupt):
    """The first Ctrl-C ended a search that had found nothing yet."""


class Stop:
    """Asked often by a search: does it have to end now?

    The limit is on the time within `with stop:`, or else from the first question on. With
    `on_interrupt`, the first Ctrl-C within `with stop:` calls that and ends the search; a second
    one is Python's own KeyboardInterrupt.
    """

    def __init__(
        self, limit_s: float | None = None, on_interrupt: Callable[[], None] | None = None
    ) -> None:
        self.limit_s = limit_s
        self.interrupted = False
        self._on_interrupt = on_interrupt
        self._left_s = limit_s or 0.0
        self._deadline: float | None = None
        self._previous: Any = None

    def __call__(self) -> bool:
        if self.interrupted or self.limit_s is None:
            return self.interrupted
        if self._deadline is None:
            self._deadline = time.monotonic() + self._left_s
        return time.monotonic() >= self._deadline

    @property
    def reason(self) -> str:
        """Why the search had to end."""
        return "Ctrl-C" if self.interrupted else f"the limit of {self.limit_s:g} s"

    def error(self) -> BaseException:
        """What to raise when a search had to end before it had found anything."""
        if self.interrupted:
            return Interrupted()
        return TimeLimitError(
            f"no placement found within {self.reason}, and none ruled out; raise --limit, fix the "
            "number of stages, or offer more memory"
        )

    def __enter__(self) -> Self:
        self._deadline = None
        self()  # the clock starts
        if self._on_interrupt is not None and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._deadline is not None:
            self._left_s, self._deadline = self._deadline - time.monotonic(), None
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _interrupt(self, number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.interrupted = True
        if self._on_interrupt is not None:
            # In a thread: the signal may have come while this one was writing to the same stream.
            threading.Thread(target=self._on_interrupt).start()


def run_solver(solver: Any, model: Any, stop: Stop, tell: Tell | None = None) -> Any:
    """Solve a CP-SAT model that minimises, unless or until it has to stop; the status.

    The solve runs in a thread of its own: signals reach Python only while its main thread runs.
    """
    from ortools.sat.python import cp_model

    class Seen(cp_model.CpSolverSolutionCallback):
        best = float("inf")
        bound = 0.0

        def on_solution_callback(self) -> None:
            self.best = self.objective_value

        def raise_bound(self, bound: float) -> None:
            self.bound = bound

    seen = Seen()
    solver.best_bound_callback = seen.raise_bound
    told, when = (seen.best, seen.bound), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(solver.solve, model, seen)
        try:
            while True:
                try:
                    return running.result(POLL_S)
                except TimeoutError:
                    if stop():
                        solver.stop_search()
                now = (seen.best, seen.bound)
                if tell is not None and now != told and time.monotonic() >= when + TELL_S:
                    told, when = now, time.monotonic()
                    tell(*now)
        finally:
            while not running.done():  # a second Ctrl-C
                solver.stop_search()
                time.sleep(POLL_S)
