"""Search: of shapes at all microbatch sizes the best placement, and a bound on all others.

Bounds rule out most shapes, a dynamic program solves or bounds the others, and an integer program
settles what it leaves open; all share the best placement found so far.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from p2bw.compiler.placement.candidates import Candidate
from p2bw.compiler.placement.cpsat import solve_shape
from p2bw.compiler.placement.dp import StepCosts, feasible_chain, step_costs
from p2bw.compiler.placement.layouts import best_kinds, improve, lay_out, list_layouts
from p2bw.compiler.placement.relays import Judgement, judge, relayed_tensors
from p2bw.compiler.placement.result import Limits, Placement, Progress
from p2bw.compiler.placement.rows import row_placements
from p2bw.compiler.placement.windows import TOLERANCE
from p2bw.compiler.units import several

OnProgress = Callable[[Progress], None]


def judge_candidate(candidate: Candidate, stages: Sequence[int]) -> Judgement:
    """The exact numbers of a placement with the best choice of recomputation and relays."""
    model = candidate.model
    return judge(model.instance, candidate.shape, stages, model.recompute, start=candidate.relayed)


class Search:
    """The candidates, and the best placement so far."""

    def __init__(
        self, candidates: list[Candidate], limits: Limits, progress: OnProgress | None
    ) -> None:
        self.candidates = candidates
        self.stop = limits.stop
        self.spent = 0.0  # of CP-SAT's deterministic time
        self._any = limits.any_will_do
        self.best: Candidate | None = None
        self.rate = 0.0  # of the best
        self.allow(limits.gap)
        self._progress = progress

    def open(self) -> list[Candidate]:
        """What may still hold something better, the most promising first."""
        for candidate in self.candidates:
            if not candidate.closed_by and candidate.bound <= self._enough:
                candidate.closed_by = "bounds"
        left = [candidate for candidate in self.candidates if not candidate.closed_by]
        return sorted(left, key=lambda candidate: candidate.order)

    def allow(self, gap: float) -> None:
        """From now on, do not look for what is better by no larger a share."""
        self._gap = max(gap, TOLERANCE)

    @property
    def _enough(self) -> float:
        """What has no higher bound is not looked into."""
        return self.rate * (1 + self._gap)

    def longest_s(self, candidate: Candidate) -> float:
        """How long a device may be busy in a placement that is worth finding."""
        # Short of what is enough, so that what is proven to take longer has a bound within that.
        wanted = 1 + (0.999 * self._gap if self._gap > TOLERANCE else 0.0)
        return candidate.seconds(self.rate * wanted)

    def _over(self) -> bool:
        return self.stop() or (self._any and self.best is not None)

    def dynamic_program(self) -> None:
        """Solve by the dynamic program whatever the bounds leave."""
        tried: set[int] = set()
        while True:
            left = [candidate for candidate in self.open() if id(candidate) not in tried]
            if not left or self._over():
                return
            self._report("dynamic program")
            tried.add(id(left[0]))
            unbounded = self.rate == 0 and not self._any
            chain = self._any_layout if left[0].shape.layout == "any" else self._chain
            chain(left[0])
            if unbounded and not left[0].closed_by:
                chain(left[0])  # a placement to beat makes the bound tighter

    def integer_program(self, limit: float) -> None:
        """Settle by CP-SAT what is still open, within a limit of deterministic time."""
        tried: set[int] = set()
        if limit <= 0:
            return
        while True:
            left = [
                candidate
                for candidate in self.open()
                if id(candidate) not in tried and candidate.shape.layout != "any"
            ]
            if not left or self._over():
                return
            candidate = left[0]
            self._report("CP-SAT")
            tried.add(id(candidate))
            self._rows(candidate)
            if candidate.closed_by:
                continue
            found = solve_shape(
                candidate.model.instance,
                candidate.shape,
                candidate.model.recompute,
                upper_s=self.longest_s(candidate),
                hint=candidate.stages,
                limit=limit / len(left),
                stop=self.stop,
                any_will_do=self._any,
                tell=partial(self._report, "CP-SAT", candidate),
            )
            limit -= found.spent
            self.spent += found.spent
            candidate.bound = min(candidate.bound, self._bound(candidate, found.bound_s))
            if found.stages is not None:
                candidate.relayed = found.relayed
                self.offer(candidate, found.stages)
            self._close(candidate, "CP-SAT")

    def _rows(self, candidate: Candidate) -> None:
        """Offer what cuts of a row of the groups give, if that is better than all so far."""
        model = candidate.model
        for stages in row_placements(model.instance, candidate.shape):
            found = judge(model.instance, candidate.shape, stages, model.recompute)
            rate = candidate.rate(found.evaluation.busiest_s)
            if found.evaluation.feasible and rate > self.rate * (1 + TOLERANCE):
                candidate.relayed = found.relayed
                self.offer(candidate, stages)
        self._close(candidate, "rows")

    def _costs(self, candidate: Candidate, upper_s: float) -> StepCosts:
        model, steps = candidate.model, candidate.model.costs.steps
        steps = steps.where((steps.forward_s + steps.backward_s).min(axis=0) <= upper_s)
        return step_costs(model.instance, steps, model.recompute, candidate.shape, upper_s)

    def _any_layout(self, candidate: Candidate) -> None:
        """Bound all layouts at once; try one of the best; list them all where they are few."""
        model, shape = candidate.model, candidate.shape
        instance, upper_s = model.instance, self.longest_s(candidate)
        bound_s, mixes = best_kinds(self._costs(candidate, upper_s), upper_s)
        if model.family.complete or shape.depth == 1:
            candidate.bound = min(candidate.bound, self._bound(candidate, min(bound_s, upper_s)))
        if mixes is not None:
            tried = Candidate(model, lay_out(instance, shape, mixes), candidate.bound)
            self._chain(tried)
            if tried.stages is not None:
                self._tidy(tried)
        self._close(candidate, "dynamic program")
        layouts = None
        if not candidate.closed_by:
            layouts = list_layouts(instance, shape.depth, shape.width)
        if layouts is not None:
            candidate.closed_by = "layouts"
            self.candidates += [Candidate(model, found, candidate.bound) for found in layouts]

    def _tidy(self, tried: Candidate) -> None:
        """Exchange devices as long as that makes the period shorter, or links less busy."""
        assert tried.stages is not None
        instance, recompute = tried.model.instance, tried.model.recompute
        better = Candidate(
            tried.model, improve(instance, tried.shape, tried.stages, recompute), tried.bound
        )
        if better.shape != tried.shape:
            self._chain(better)
            if self.best is tried and better.stages is not None:
                old, new = (judge_candidate(c, c.stages or ()).evaluation for c in (tried, better))
                if new.busiest_s <= old.busiest_s * (1 + TOLERANCE):
                    self.best = better

    def _chain(self, candidate: Candidate) -> None:
        model, shape = candidate.model, candidate.shape
        upper_s = self.longest_s(candidate)
        costs = self._costs(candidate, upper_s)
        bound_s, stages = feasible_chain(costs, upper_s)
        if model.family.complete or shape.depth == 1:
            candidate.bound = min(candidate.bound, self._bound(candidate, min(bound_s, upper_s)))
        if stages is not None:
            self.offer(candidate, stages)
        self._close(candidate, "dynamic program")

    def _bound(self, candidate: Candidate, busiest_s: float) -> float:
        return candidate.rate(busiest_s) if busiest_s < float("inf") else 0.0

    def offer(self, candidate: Candidate, stages: tuple[int, ...]) -> None:
        """Take a feasible placement if it is better than the best."""
        evaluation = judge_candidate(candidate, stages).evaluation
        assert evaluation.feasible, evaluation.problems
        candidate.stages = stages
        rate = candidate.rate(evaluation.busiest_s)
        if rate > self.rate * (1 + TOLERANCE):
            self.best, self.rate = candidate, rate

    def offer_start(self, start: Placement) -> None:
        """Take a placement of another problem of the same blocks, if it fits and is better."""
        for candidate in self.candidates:
            instance, shape = candidate.model.instance, candidate.shape
            if instance.problem.microbatch == start.microbatch and (
                (shape.depth, shape.width, shape.layout) == (start.depth, start.width, start.layout)
            ):
                names = [block.name for block in instance.problem.blocks]
                stages = tuple(start.stage_of_block[names[own[0]]] for own in instance.groups)
                if judge_candidate(candidate, stages).evaluation.feasible:
                    self.offer(candidate, stages)
                return

    def _close(self, candidate: Candidate, by: str) -> None:
        if candidate.bound <= self._enough:
            candidate.closed_by = by

    def _report(
        self,
        phase: Literal["dynamic program", "CP-SAT"],
        now: Candidate | None = None,
        best_s: float = float("inf"),
        bound_s: float = 0.0,
    ) -> None:
        """Tell how far it is; `best_s` and `bound_s` are what CP-SAT counts for a candidate."""
        if self._progress is not None:
            left = self.open()
            rate = max(self.rate, now.rate(best_s)) if now else self.rate
            self._progress(
                Progress(
                    phase=phase,
                    done=len(self.candidates) - len(left),
                    total=len(self.candidates),
                    samples_per_s=rate or None,
                    bound=self.bound(now, bound_s),
                )
            )

    def bound(self, now: Candidate | None = None, busiest_s: float = 0.0) -> float:
        """Samples per second that nothing exceeds; the best's rate where the difference is none.

        One candidate may be known to keep something busy for so long.
        """
        bounds = [
            min(c.bound, c.rate(busiest_s)) if c is now else c.bound
            for c in self.candidates
            if c.closed_by != "layouts"
        ]
        bound = max(bounds, default=0.0)
        return bound if bound > self.rate * (1 + TOLERANCE) else self.rate

    def placement(self) -> Placement:
        """The best placement, with the proof over all candidates."""
        assert self.best is not None
        assert self.best.stages is not None
        left = self.open()
        bound = self.bound()
        judgement = judge_candidate(self.best, self.best.stages)
        evaluation = judgement.evaluation
        instance, shape = self.best.model.instance, self.best.shape
        problem = instance.problem
        busy_s = math.fsum(stage.forward_s + stage.backward_s for stage in evaluation.stages)
        return Placement(
            depth=shape.depth,
            width=shape.width,
            microbatch=problem.microbatch,
            microbatches_per_update=problem.microbatches_at(shape.depth),
            layout=shape.layout,
            stage_of_block=instance.blocks_to_stages(self.best.stages),
            recompute=judgement.recompute,
            relayed=relayed_tensors(instance, judgement.relayed),
            devices=tuple(
                tuple(shape.rank(k, replica) for replica in range(shape.width))
                for k in range(shape.depth)
            ),
            stages=evaluation.stages,
            links=evaluation.links,
            period_s=evaluation.period_s,
            samples_per_s=self.rate,
            utilisation=busy_s * shape.width / (problem.topology.gpus * evaluation.period_s),
            bytes_per_sample=evaluation.sent_bytes / problem.microbatch,
            status="feasible" if left or bound > self.rate else "optimal",
            bound=bound,
            gap=bound / self.rate - 1,
            search_space=self._search_space(),
        )

    def _search_space(self) -> str:
        """What was searched and how it was settled, in one line."""
        sizes = sorted({c.model.instance.problem.microbatch for c in self.candidates})
        depths = [candidate.shape.depth for candidate in self.candidates]
        span = f"{min(depths)}..{max(depths)}" if min(depths) < max(depths) else f"{depths[0]}"
        counts = Counter(candidate.closed_by or "open" for candidate in self.candidates)
        how = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
        allowed = self._gap > TOLERANCE and self.bound() > self.rate
        within = f", a gap of {100 * self._gap:g} % allowed" if allowed else ""
        model = self.candidates[0].model
        topology = model.instance.problem.topology
        return (
            f"{topology.summary}, {span} stage{'s' * (span != '1')}, "
            f"microbatch {', '.join(map(str, sizes))}, "
            f"recompute {model.recompute}: {several(len(self.candidates), 'shape')} ({how})"
            f"{within}"
            f"{f'; stopped by {self.stop.reason}' if counts['open'] and self.stop() else ''}"
        )
