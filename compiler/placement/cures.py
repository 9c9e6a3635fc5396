"""Cures: the smallest single changes that make a problem feasible, each solved again.

"Smallest" is proven: the next smaller change of the same kind was shown to be infeasible, or the
cure says that less may do.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from p2bw.compiler import units
from p2bw.compiler.devices import GIB, MIB, Device
from p2bw.compiler.placement.candidates import make_shapes
from p2bw.compiler.placement.changes import dropped, exact_bytes, with_devices, with_memory
from p2bw.compiler.placement.dp import least_memory_by_depth
from p2bw.compiler.placement.feasible import Oracle, Request
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.plan import Schedule
from p2bw.compiler.topology import MAX_GPUS
from p2bw.contract.errors import InfeasibleError, UsageError

MAX_DEPTH = 256  # deepest pipeline that is tried
MAX_MEMORY = 2**50
MAX_DROPPED = 64  # constraints of one kind that are dropped, one at a time
SHOWN = 3  # cures of one kind in a message

Kind = Literal[
    "recompute",
    "microbatch",
    "microbatches",
    "stages",
    "schedule",
    "constraint",
    "memory",
    "devices",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cure:
    """One change that makes a problem feasible by itself."""

    kind: Kind
    text: str  # the option of the command line, or the constraint to drop
    amount: int | None  # bytes of memory, devices, stages, ...
    smallest: bool  # proven: a smaller change of this kind is not enough
    changed: Request

    def __str__(self) -> str:
        return self.text if self.smallest else f"{self.text} (less may do: not settled)"


class NoPlanError(InfeasibleError):
    """Nothing fits: why, and the changes that would make something fit."""

    def __init__(self, reason: str, cures: Sequence[Cure]) -> None:
        self.reason = reason
        self.cures = tuple(cures)
        lines = [f"\n  {text}" for text in _lines(cures)]
        what = ". What fits, each alone:" if lines else "; no single change was found that fits"
        super().__init__(reason + what + "".join(lines))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `p2bw explain --json`."""
        fields = ("kind", "text", "amount", "smallest")
        cures = [{field: getattr(cure, field) for field in fields} for cure in self.cures]
        return {"feasible": False, "reason": self.reason, "cures": cures}


def _lines(cures: Sequence[Cure]) -> Iterator[str]:
    """A line for each cure; of many constraints, the first."""
    for kind, some in groupby(cures, lambda cure: cure.kind):
        texts = list(map(str, some))
        yield from texts[:SHOWN] if kind == "constraint" else texts
        if kind == "constraint" and len(texts) > SHOWN:
            yield f"or without one of {len(texts) - SHOWN} other constraints"


def infeasible(reason: str, request: Request, limits: Limits) -> NoPlanError:
    """The error to raise where nothing fits."""
    return NoPlanError(reason, find_cures(request, limits))


def find_cures(request: Request, limits: Limits | None = None) -> list[Cure]:
    """The smallest changes of every kind that make an infeasible request feasible."""
    return list(_Cures(request, Oracle(limits or Limits())).all())


class _Cures:
    """The searches for the smallest change of each kind."""

    def __init__(self, request: Request, fits: Oracle) -> None:
        self.request = request
        self.fits = fits

    def all(self) -> Iterator[Cure]:
        """The changes that cost least to make come first."""
        yield from self._recompute()
        yield from self._microbatch()
        yield from self._stages()
        yield from self._schedule()
        yield from self._microbatches()
        yield from self._constraints()
        yield from self._memory()
        yield from self._devices()

    def _smallest(
        self, amounts: Sequence[int], change: Callable[[int], Request | None], gallop: bool
    ) -> tuple[int, bool] | None:
        """Number of the first of the amounts, from small changes to large, that is enough.

        A larger change than that is enough too. And whether less is proven not to be.
        """

        def enough(i: int) -> bool | None:
            changed = change(amounts[i])
            return self.fits(changed) if changed is not None else False

        last = len(amounts) - 1
        low, high, refuted = -1, 0 if gallop else last, True
        while not (found := enough(high)):
            low, refuted = high, found is False
            if high == last:
                return None
            high = min(2 * high + 1, last)
        while high - low > 1:
            middle = (low + high) // 2
            found = enough(middle)
            if found:
                high = middle
            else:
                low, refuted = middle, found is False
        return high, refuted

    def _cure(
        self,
        kind: Kind,
        amounts: Sequence[int],
        change: Callable[[int], Request | None],
        say: Callable[[int], str],
        gallop: bool = True,
    ) -> Iterator[Cure]:
        found = self._smallest(amounts, change, gallop) if amounts else None
        if found is not None:
            amount = amounts[found[0]]
            changed = change(amount)
            assert changed is not None
            yield Cure(
                kind=kind, text=say(amount), amount=amount, smallest=found[1], changed=changed
            )

    def _switch(self, kind: Kind, text: str, changed: Request) -> Iterator[Cure]:
        """A change that is made or not."""
        if self.fits(changed):
            yield Cure(kind=kind, text=text, amount=None, smallest=True, changed=changed)

    def _recompute(self) -> Iterator[Cure]:
        if self.request.recompute != "auto":
            changed = replace(self.request, recompute="auto")
            yield from self._switch("recompute", "--recompute auto", changed)

    def _schedule(self) -> Iterator[Cure]:
        """The one that keeps the next fewest weights and microbatches."""
        gentler: dict[Schedule, tuple[Schedule, ...]] = {
            "stash": ("2bw", "flush"),
            "2bw": ("flush",),
            "gpipe": ("flush",),
            "flush": (),
        }
        for schedule in gentler[self.request.problem.schedule]:
            changed = self.request.changed(schedule=schedule)
            found = list(self._switch("schedule", f"--schedule {schedule}", changed))
            if found:
                yield from found
                return

    def _microbatch(self) -> Iterator[Cure]:
        """The largest microbatch, below those asked for, that fits."""
        least = self.request.problem.microbatch

        def change(size: int) -> Request | None:
            problem = self.request.at(size)
            return None if problem is None else replace(self.request, problems=(problem,))

        sizes = [
            size
            for size in range(least - 1, 0, -1)
            if not isinstance(self.request.sizes, Mapping) or size in self.request.sizes
        ]
        # A problem at another size may have to be traced: few questions.
        yield from self._cure(
            "microbatch", sizes, change, lambda size: f"--microbatch {size}", gallop=False
        )

    def _microbatches(self) -> Iterator[Cure]:
        """Fewer per update where each is in flight; more where 2BW needs one for each stage, and
        where those in flight then run on fewer versions."""
        problem = self.request.problem
        most = min(MAX_DEPTH, len(problem.blocks))
        if problem.schedule in ("2bw", "stash") and problem.microbatches is not None:
            amounts = range(problem.microbatches + 1, most + 1)
        elif problem.schedule in ("gpipe", "flush"):
            now = problem.microbatches or max(self.request.depths or (problem.topology.gpus,))
            amounts = range(now - 1, 0, -1)
        else:
            return
        yield from self._cure(
            "microbatches",
            amounts,
            lambda m: self.request.changed(microbatches=m),
            lambda m: f"--microbatches {m}",
        )

    def _stages(self) -> Iterator[Cure]:
        """The number of stages nearest to those asked for."""
        depths = self.request.depths
        if depths is None or not self.fits(replace(self.request, depths=None)):
            return
        width = min(self.request.widths or (1,))
        most = min(MAX_DEPTH, self.request.problem.topology.gpus // width)
        others = set(range(1, most + 1)) - set(depths)
        smallest = True
        for depth in sorted(others, key=lambda n: (min(abs(n - d) for d in depths), n)):
            changed = replace(self.request, depths=(depth,))
            found = self.fits(changed)
            if found:
                text = f"{depth} stage{'s' if depth > 1 else ''} (--depth {depth})"
                yield Cure(
                    kind="stages", text=text, amount=depth, smallest=smallest, changed=changed
                )
                return
            smallest &= found is False

    def _devices(self) -> Iterator[Cure]:
        """More devices of the first kind, in the last group of the outermost level."""
        topology = self.request.problem.topology
        width = min(self.request.widths or (1,))
        most = min(MAX_GPUS, width * min(MAX_DEPTH, len(self.request.problem.blocks)))
        amounts = range(topology.gpus + 1, topology.gpus + most + 1)
        if not topology.wires:  # how others would be wired is not known
            yield from self._cure(
                "devices",
                amounts,
                lambda gpus: self.request.changed(topology=with_devices(topology, gpus)),
                lambda gpus: f"--gpus {gpus}",
            )

    def _memory(self) -> Iterator[Cure]:
        """More memory on the devices of one kind."""
        topology = self.request.problem.topology
        for device in topology.kinds:
            found = self._bytes(device)
            if found is not None:
                changed = self.request.changed(topology=with_memory(topology, device, found[0]))
                text = f"--memory {exact_bytes(found[0])}"
                if len(topology.kinds) > 1:
                    text = f"{exact_bytes(found[0])} of memory on each {device.name}"
                text += f" ({units.data(found[0] - device.memory_bytes)} more)"
                yield Cure(
                    kind="memory",
                    text=text,
                    amount=found[0],
                    smallest=found[1],
                    changed=changed,
                )

    def _bytes(self, device: Device) -> tuple[int, bool] | None:
        """Memory of a device that is enough, 99 % of the increase to which is not."""
        topology, now = self.request.problem.topology, device.memory_bytes

        def enough(more: int) -> bool | None:
            changed = with_memory(topology, device, now + more)
            return self.fits(self.request.changed(topology=changed))

        low, high, refuted = 0, self._missing(device) or max(1, now // 64), True
        found = enough(high)
        if not found and not enough(MAX_MEMORY - now):
            return None
        while not found:
            low, refuted = high, found is False
            high = min(2 * high, MAX_MEMORY - now)
            found = enough(high)
        first = True
        while high - low > max(1, high // 200):
            # The guess is mostly right: a little less is the first question.
            middle = max(low + 1, high - high // 200 - 1) if first else (low + high) // 2
            first = False
            found = enough(middle)
            if found:
                high = middle
            else:
                low, refuted = middle, found is False
        for unit in (GIB, MIB, 1024):
            tidy = -(-(now + high) // unit) * unit
            if (tidy - now) * 99 <= low * 100 and enough(tidy - now):
                return tidy, refuted
        return now + high, refuted

    def _missing(self, device: Device) -> int:
        """More bytes that the dynamic program asks for; a guess. 0: it has none."""
        try:
            model = self.fits.models(self.request)[0]
            shapes = make_shapes(model.instance, self.request.depths, self.request.widths)
        except (InfeasibleError, UsageError):
            return 0
        depths, width = [s.depth for s in shapes], min(s.width for s in shapes)
        needs = least_memory_by_depth((model.coarse or model).costs, max(depths), width)
        least = min(needs[depth - 1] for depth in depths)
        if not model.instance.limit < least < MAX_MEMORY:
            return 0
        return math.ceil((least - model.instance.limit) / (1 - device.lost_fraction)) + 1

    def _constraints(self) -> Iterator[Cure]:
        """Each constraint without which something fits."""
        constraints = self.request.problem.constraints
        for field, options in dropped(constraints).items():
            none = constraints.model_copy(update={field: type(getattr(constraints, field))()})
            if not options or not self.fits(self.request.changed(constraints=none)):
                continue
            for text, value in options[:MAX_DROPPED]:
                fewer = constraints.model_copy(update={field: value})
                changed = self.request.changed(constraints=fewer)
                yield from self._switch("constraint", text, changed)
        if constraints.max_stages is not None:
            most = min(MAX_DEPTH, len(self.request.problem.blocks))
            yield from self._cure(
                "constraint",
                range(constraints.max_stages + 1, most + 1),
                lambda n: self.request.changed(
                    constraints=constraints.model_copy(update={"max_stages": n})
                ),
                lambda n: f"max_stages {n}",
            )
