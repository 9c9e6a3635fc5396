"""Schedules as data: drawn, proven for many pipelines, and broken on purpose."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from handmade import write_artifact
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2bw.contract.actions import actions, show
from p2bw.contract.check import ScheduleError, check, check_actions, planned_stash
from p2bw.contract.errors import UsageError
from p2bw.contract.plan import read_plan
from p2bw.contract.schedule import (
    SCHEDULES,
    Action,
    Channel,
    Flow,
    Kind,
    Pipeline,
    make_pipeline,
    most_extra,
)


def pipeline(
    schedule: str = "2bw",
    depth: int = 3,
    microbatches: int = 4,
    batches: int = 3,
    edges: frozenset[tuple[int, int, bool]] = frozenset(),
    tied: frozenset[int] = frozenset(),
    replicated: bool = False,
    clipped: bool = False,
    first: int = 0,
    extra: int = 0,
) -> Pipeline:
    """A chain of stages, with more edges (producer, consumer, gradient) and a tied weight."""
    chain = {(k, k + 1, True) for k in range(depth - 1)}
    channels = []
    for producer, consumer, gradient in sorted(chain | edges):
        name = f"t{producer}{consumer}{gradient:d}"
        channels.append(Channel(Flow.ACTIVATION, producer, consumer, name))
        if gradient:
            channels.append(Channel(Flow.GRADIENT, consumer, producer, name))
    channels += [Channel(Flow.TIED, a, b, "w") for a in tied for b in tied if a != b]
    if clipped:
        channels += [Channel(Flow.NORMS, k, k - 1, "all") for k in range(depth - 1, 0, -1)]
        channels += [Channel(Flow.NORM, 0, k, "all") for k in range(1, depth)]
    if depth > 1:
        channels.append(Channel(Flow.LOSS, depth - 1, 0, "loss"))
    return Pipeline(
        schedule=schedule,
        depth=depth,
        microbatches=microbatches,
        first=first,
        batches=first + batches,
        channels=tuple(channels),
        replicated=replicated,
        clipped=clipped,
        extra=extra
        and min(extra, most_extra(schedule, depth, microbatches, replicated or clipped)),
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    schedule = draw(st.sampled_from(SCHEDULES))
    depth = draw(st.integers(1, 8))
    stage = st.integers(0, depth - 1)
    edge = st.tuples(stage, stage, st.booleans()).filter(lambda e: e[0] < e[1])
    return pipeline(
        schedule=schedule,
        depth=depth,
        microbatches=draw(st.integers(depth if schedule == "2bw" else 1, 32)),
        batches=draw(st.integers(1, 4)),
        first=draw(st.sampled_from([0, 0, 1, 7])),
        edges=draw(st.frozensets(edge, max_size=6)) if depth > 1 else frozenset(),
        tied=frozenset() if schedule == "stash" else draw(st.frozensets(stage, max_size=3)),
        replicated=draw(st.booleans()),
        clipped=schedule != "stash" and draw(st.booleans()),
        extra=draw(st.sampled_from([0, 0, 1, 2, 9])),
    )


SHOWN = [
    ("2bw", 3, {}),
    ("2bw", 4, {"tied": frozenset({0, 2}), "replicated": True, "clipped": True}),
    ("2bw", 3, {"tied": frozenset({0, 2})}),
    ("2bw", 3, {"replicated": True, "first": 5}),
    ("2bw", 3, {"extra": 1}),
    ("2bw", 4, {"tied": frozenset({0, 2}), "replicated": True, "clipped": True, "extra": 1}),
    ("flush", 2, {"clipped": True}),
    ("flush", 4, {"extra": 1}),
    ("gpipe", 3, {}),
    ("stash", 1, {}),
    ("stash", 2, {"first": 1}),
]


def test_the_schedules_as_they_were_drawn(golden: Callable[[str, str], None]) -> None:
    """F: forward, B: backward, C: the batch's gradients are closed, G: summed over replicas,
    N: their norms are added up, U: update, M: update of parameters on several stages."""
    parts = []
    for schedule, m, options in SHOWN:
        named = ", ".join(
            f"{k} {sorted(v) if isinstance(v, frozenset) else v}" for k, v in options.items()
        )
        title = f"{schedule}, 3 stages, {m} microbatches per update" + (
            f", {named}" if named else ""
        )
        parts.append(f"{title}\n{show(pipeline(schedule, microbatches=m, **options))}\n")
    golden("schedules.txt", "\n".join(parts))


@settings(max_examples=100, deadline=None)
@given(pipelines())
def test_every_schedule_is_proven(pipe: Pipeline) -> None:
    proof = check(pipe)
    batches = min(pipe.batches - pipe.first, 4)
    for stage in range(pipe.depth):
        total = pipe.microbatches * (1 if pipe.drains else batches)
        assert proof.stash[stage] == min(planned_stash(pipe, stage), total)
        assert proof.versions[stage] <= pipe.copies(stage)
        assert proof.gradients[stage] <= min(1 + pipe.late, batches)


@settings(max_examples=30, deadline=None)
@given(pipelines())
def test_the_delay_is_exactly_one_everywhere(pipe: Pipeline) -> None:
    """Of synchronous schedules zero; under stash it is smaller the later the stage."""
    assume(pipe.schedule != "stash")
    delay = 1 if pipe.schedule == "2bw" else 0
    for stage in range(pipe.depth):
        for action in actions(pipe, stage):
            if action.kind in (Kind.FORWARD, Kind.BACKWARD):
                batch = action.index // pipe.microbatches
                assert action.version == max(batch - delay, 0)


@settings(max_examples=30, deadline=None)
@given(pipelines(), st.integers(0, 4))
def test_a_run_that_ends_early_is_a_shorter_run(pipe: Pipeline, length: int) -> None:
    end = min(pipe.first + length, pipe.batches)
    shorter = replace(pipe, batches=end)
    for stage in range(pipe.depth):
        stopped = actions(pipe, stage, lambda batch: batch < end)
        assert list(stopped) == list(actions(shorter, stage))


def test_stash_uses_the_newest_version_that_the_stage_has() -> None:
    pipe = pipeline("stash", depth=3, microbatches=1, batches=6)
    assert [pipe.copies(stage) for stage in range(3)] == [3, 2, 1]
    assert [pipe.version(0, i) for i in range(6)] == [0, 0, 0, 1, 2, 3]
    assert [pipe.version(2, i) for i in range(6)] == [0, 1, 2, 3, 4, 5]


# Each takes the actions of all stages and breaks one thing.
Mutation = Callable[[list[list[Action]]], None]


def first(schedule: list[list[Action]], kind: Kind, index: int = 0, stage: int = 0) -> int:
    return next(i for i, a in enumerate(schedule[stage]) if (a.kind, a.index) == (kind, index))


def drop(kind: Kind, index: int = 0, stage: int = 0) -> Mutation:
    def mutate(schedule: list[list[Action]]) -> None:
        del schedule[stage][first(schedule, kind, index, stage)]

    return mutate


def twice(kind: Kind, index: int = 0, stage: int = 0) -> Mutation:
    def mutate(schedule: list[list[Action]]) -> None:
        at = first(schedule, kind, index, stage)
        schedule[stage].insert(at, schedule[stage][at])

    return mutate


def version(kind: Kind, index: int, by: int) -> Mutation:
    def mutate(schedule: list[list[Action]]) -> None:
        at = first(schedule, kind, index)
        action = schedule[0][at]
        schedule[0][at] = action._replace(version=action.version + by)

    return mutate


def sooner(kind: Kind, index: int, before: Kind, before_index: int, stage: int = 0) -> Mutation:
    def mutate(schedule: list[list[Action]]) -> None:
        action = schedule[stage].pop(first(schedule, kind, index, stage))
        schedule[stage].insert(first(schedule, before, before_index, stage), action)

    return mutate


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (drop(Kind.RECEIVE, 1, 1), "instead of message 1"),
        (drop(Kind.RECEIVE, 11, 1), "deadlock|11 of 12"),
        (drop(Kind.SEND, 3), "instead of message 3"),
        (drop(Kind.SEND, 11), "deadlock"),
        (twice(Kind.SEND, 5), "instead of message 6"),
        (sooner(Kind.SEND, 1, Kind.SEND, 0), "before there is anything|instead of message 0"),
        (version(Kind.FORWARD, 8, +1), "should use version"),
        (version(Kind.FORWARD, 4, +1), "should use version"),
        (version(Kind.BACKWARD, 8, -1), "its forward used version"),
        (version(Kind.UPDATE, 1, +1), "makes another version"),
        (drop(Kind.UPDATE, 0), "out of order"),
        (twice(Kind.UPDATE, 0), "instead of U1"),
        (sooner(Kind.UPDATE, 0, Kind.BACKWARD, 3), "before the gradients are summed"),
        (sooner(Kind.BACKWARD, 1, Kind.BACKWARD, 0), "instead of B0"),
        (sooner(Kind.FORWARD, 3, Kind.BACKWARD, 0), "holds more than 3"),
        (drop(Kind.CLOSE, 1), "instead of C1|while another batch's gradients"),
        (sooner(Kind.CLOSE, 0, Kind.BACKWARD, 2), "C0 after 2 backwards"),
        (drop(Kind.GATHER, 1), "instead of G1|before there is anything"),
        (drop(Kind.NORM, 0), "before there is anything"),
        (drop(Kind.NORM, 0, 1), "before there is anything"),
        (sooner(Kind.NORM, 1, Kind.GATHER, 1), "before the gradients are summed"),
        (drop(Kind.MERGE, 0), "before version 1 is made|unfinished version"),
        (drop(Kind.MERGE, 2), "ended at version"),
        (sooner(Kind.RECEIVE, 2, Kind.FORWARD, 0), "instead of message"),
    ],
)
def test_a_broken_schedule_is_caught(mutation: Mutation, message: str) -> None:
    pipe = pipeline(tied=frozenset({0, 2}), replicated=True, clipped=True)
    schedule = [list(actions(pipe, stage)) for stage in range(pipe.depth)]
    check_actions(pipe, schedule)
    mutation(schedule)
    with pytest.raises(ScheduleError, match=message):
        check_actions(pipe, schedule)


def test_two_versions_are_too_few_for_fewer_microbatches_than_stages() -> None:
    """Why 2bw refuses m < d: a batch would start before the one that its weights need is over."""
    with pytest.raises(ScheduleError, match="G0 before the batch is closed"):
        check(pipeline(depth=4, microbatches=2, batches=4))


def test_sends_that_wait_for_each_other_are_a_deadlock() -> None:
    """Without receives posted ahead, two neighbours may block in a send to each other."""
    pipe = pipeline(depth=2, microbatches=3)

    def late(todo: list[Action]) -> Iterator[Action]:
        waiting = [a for a in todo if a.kind is Kind.RECEIVE]
        for action in todo:
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE):
                flow = {Kind.FORWARD: Flow.ACTIVATION, Kind.BACKWARD: Flow.GRADIENT}
                for receive in list(waiting):
                    assert receive.channel is not None
                    wanted = flow.get(action.kind, Flow.LOSS)
                    if (receive.channel.flow, receive.index) == (wanted, action.index):
                        waiting.remove(receive)
                        yield receive
            if action.kind is not Kind.RECEIVE:
                yield action

    schedule = [list(late(list(actions(pipe, stage)))) for stage in range(2)]
    with pytest.raises(ScheduleError, match="deadlock at channel capacity 0: stage 0 at S1"):
        check_actions(pipe, schedule)


@settings(max_examples=30, deadline=None)
@given(pipelines(), st.data())
def test_no_action_can_be_left_out(pipe: Pipeline, data: st.DataObject) -> None:
    schedule = [list(actions(pipe, stage)) for stage in range(pipe.depth)]
    stage = data.draw(st.integers(0, pipe.depth - 1))
    assume(schedule[stage])
    del schedule[stage][data.draw(st.integers(0, len(schedule[stage]) - 1))]
    with pytest.raises(ScheduleError):
        check_actions(pipe, schedule)


def test_what_cannot_run_is_refused_with_what_would_do(tmp_path: Path) -> None:
    plan = read_plan(write_artifact(tmp_path / "a", depth=3))
    with pytest.raises(
        UsageError, match="--microbatches 3 or more, a plan of at most 2 stages, or"
    ):
        make_pipeline(plan, batches=1, microbatches=2)
    assert make_pipeline(plan, batches=1, microbatches=2, schedule="flush").copies(0) == 1
    with pytest.raises(UsageError, match=r"no schedule 'gpip'.*2bw, flush, gpipe, stash"):
        make_pipeline(plan, batches=1, schedule="gpip")
    with pytest.raises(UsageError, match="nothing to do"):
        make_pipeline(plan, batches=0)
    with pytest.raises(UsageError, match=r"under stash .* no norm of a whole batch"):
        make_pipeline(plan, batches=1, schedule="stash", clipped=True)
    with pytest.raises(UsageError, match=r"wte.weight lives on the stages 0, 2, which under stash"):
        make_pipeline(plan, batches=1, schedule="stash")


def test_actions_are_made_as_they_are_used() -> None:
    """A run of a billion steps starts at once."""
    endless = actions(pipeline(batches=10**9), 0)
    assert [next(endless).kind for _ in range(3)] == [Kind.RECEIVE, Kind.FORWARD, Kind.SEND]
