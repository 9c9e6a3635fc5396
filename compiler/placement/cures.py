"""Cures: the smallest single changes that make a problem feasible, each solved again.

"Smallest" is proven: the next smaller change of the same kind was shown to be infeasible, or the
cure says that less may do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from p2bw.compiler import units
from p2bw.compiler.devices import GIB, MIB, Device
from p2bw.compiler.placement.candidates import Model, make_models
from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.placement.result import Limits
from p2bw.compiler.placement.search import search_models
from p2bw.compiler.plan import Schedule
from p2bw.compiler.problem import Constraints, PlacementProblem
from p2bw.compiler.topology import MAX_GPUS, Topology
from p2bw.runtime.errors import InfeasibleError, ModelError, UsageError

DETERMINISTIC_S = 20.0  # of CP-SAT for all cures
ONE_S = 2.0  # of that, for one question
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


@dataclass(frozen=True, slots=True)
class Request:
    """What `solve` was asked: which shapes of which problems."""

    problems: tuple[PlacementProblem, ...]  # by microbatch size
    depths: tuple[int, ...] | None
    widths: tuple[int, ...] | None
    recompute: Recompute
    # The problem at other microbatch sizes.
    sizes: Mapping[int, PlacementProblem] | Callable[[int], PlacementProblem]

    @property
    def problem(self) -> PlacementProblem:
        return self.problems[0]

    def changed(self, **fields: object) -> "Request":
        """With other fields in all problems."""
        return replace(self, problems=tuple(p.model_copy(update=fields) for p in self.problems))

    def at(self, size: int) -> PlacementProblem | None:
        """The problem at a microbatch size, if there is one."""
        if isinstance(self.sizes, Mapping):
            return self.sizes.get(size)
        try:
            return self.sizes(size)
        except ModelError:  # some models refuse some sizes
            return None


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
    return list(_Cures(request, _Oracle(limits or Limits())).all())


class _Oracle:
    """Says of a request whether anything fits; None: not settled within the limits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = replace(limits, any_will_do=True)
        self._left = min(DETERMINISTIC_S, limits.deterministic_s)
        self._key: object = None
        self._models: list[Model] = []

    def __call__(self, request: Request) -> bool | None:
        if self._limits.stop():
            return None
        limits = replace(self._limits, deterministic_s=max(0.0, min(self._left, ONE_S)))
        try:
            models = self._make(request)
            search = search_models(models, request.depths, request.widths, limits)
        except (InfeasibleError, UsageError):  # contradictory, or too many stages to ask for
            return False
        self._left -= search.spent
        if search.best is not None:
            return True
        return None if search.open() else False

    def _make(self, request: Request) -> list[Model]:
        key = (tuple(map(id, request.problems)), request.recompute)
        if self._key != key:
            problems = _least(request.problems)
            self._models = make_models(problems, request.recompute, self._limits.ideals)
            self._key = key
            self._problems = request.problems  # kept, so that their ids stay theirs
        return self._models


def _least(problems: Sequence[PlacementProblem]) -> list[PlacementProblem]:
    """Without those that need as much as another everywhere, or more: they fit only if it does."""
    kept: list[PlacementProblem] = []
    for problem in problems:
        if not any(_is_no_more(known, problem) for known in kept):
            kept.append(problem)
    return kept


def _is_no_more(one: PlacementProblem, other: PlacementProblem) -> bool:
    """The same blocks, tensors and parameters, none of them larger."""
    if [(t.producer, t.consumers) for t in one.tensors] != [
        (t.producer, t.consumers) for t in other.tensors
    ] or [p.blocks for p in one.parameters] != [p.blocks for p in other.parameters]:
        return False
    first, second = _sizes(one), _sizes(other)
    return len(first) == len(second) and all(map(int.__le__, first, second))


def _sizes(problem: PlacementProblem) -> list[int]:
    found = [b.stash_bytes for b in problem.blocks]
    found += [b.transient_bytes for b in problem.blocks]
    found += [b.buffer_bytes for b in problem.blocks]
    for p in problem.parameters:
        found += [p.bytes, p.gradient_bytes, p.optimizer_bytes]
    for t in problem.tensors:
        found += [t.bytes, t.gradient_bytes, int(t.saved)]
    return found


class _Cures:
    """The searches for the smallest change of each kind."""

    def __init__(self, request: Request, fits: _Oracle) -> None:
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
        """Fewer per update where each is in flight; more where 2BW needs one for each stage."""
        problem = self.request.problem
        most = min(MAX_DEPTH, len(problem.blocks))
        if problem.schedule == "2bw" and problem.microbatches is not None:
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

        if not enough(MAX_MEMORY - now):
            return None
        low, high, refuted = 0, max(1, now // 64), True
        while not (found := enough(high)):
            low, refuted = high, found is False
            high = min(2 * high, MAX_MEMORY - now)
        while high - low > max(1, high // 200):
            middle = (low + high) // 2
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

    def _constraints(self) -> Iterator[Cure]:
        """Each constraint without which something fits."""
        constraints = self.request.problem.constraints
        for field, options in _dropped(constraints).items():
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


def _dropped(constraints: Constraints) -> dict[str, list[tuple[str, object]]]:
    """For each field: what to say, and the field's value without one of its entries."""

    def without(entries: tuple[object, ...], i: int) -> object:
        return entries[:i] + entries[i + 1 :]

    pin = constraints.pin
    return {
        "pin": [
            (
                f"without the pin of {name} to stage {stage}",
                {other: k for other, k in pin.items() if other != name},
            )
            for name, stage in pin.items()
        ],
        "together": [
            (f"without {_few(names)} together", without(constraints.together, i))
            for i, names in enumerate(constraints.together)
        ],
        "apart": [
            (f"without {a} and {b} apart", without(constraints.apart, i))
            for i, (a, b) in enumerate(constraints.apart)
        ],
        "never_cut": [
            (f"without never_cut of {name}", without(constraints.never_cut, i))
            for i, name in enumerate(constraints.never_cut)
        ],
    }


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]}"


def with_memory(topology: Topology, device: Device, size: int) -> Topology:
    """Another memory on all devices of one kind."""
    larger = replace(device, memory_bytes=size)
    return replace(
        topology,
        device=larger if topology.device == device else topology.device,
        more=tuple(
            replace(run, device=larger) if run.device == device else run for run in topology.more
        ),
    )


def with_devices(topology: Topology, gpus: int) -> Topology:
    """More devices of the first kind; the outermost level takes them."""
    inside = 1
    for level in topology.levels[:-1]:
        inside *= level.size
    outer = topology.levels[-1]
    outer = replace(outer, size=max(outer.size, -(-gpus // inside)))
    return replace(topology, gpus=gpus, levels=(*topology.levels[:-1], outer))


def exact_bytes(size: int) -> str:
    """'17412MiB': bytes as the option --memory takes them, exactly."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}B"
