"""Schedules as data: drawn, proven for many pipelines, and broken on purpose."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from handmade import write_artifact
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from p2bw.runtime.check import ScheduleError, check, check_actions
from p2bw.runtime.errors import UsageError
from p2bw.runtime.plan import read_plan
from p2bw.runtime.schedule import (
    Action,
    Channel,
    Flow,
    Kind,
    Pipeline,
    actions,
    make_pipeline,
    show,
)


def pipeline(
    schedule: str = "2bw",
    depth: int = 3,
    microbatches: int = 4,
    batches: int = 3,
    edges: frozenset[tuple[int, int, bool]] = frozenset(),
    tied: frozenset[int] = frozenset(),
    replicated: bool = False,
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
    if depth > 1:
        channels.append(Channel(Flow.LOSS, depth - 1, 0, "loss"))
    return Pipeline(
        schedule=schedule,
        depth=depth,
        microbatches=microbatches,
        batches=batches,
        channels=tuple(channels),
        replicated=replicated,
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    schedule = draw(st.sampled_from(["2bw", "flush"]))
    depth = draw(st.integers(1, 8))
    stage = st.integers(0, depth - 1)
    edge = st.tuples(stage, stage, st.booleans()).filter(lambda e: e[0] < e[1])
    return pipeline(
        schedule=schedule,
        depth=depth,
        microbatches=draw(st.integers(depth if schedule == "2bw" else 1, 20)),
        batches=draw(st.integers(1, 4)),
        edges=draw(st.frozensets(edge, max_size=6)) if depth > 1 else frozenset(),
        tied=draw(st.frozensets(stage, max_size=3)),
        replicated=draw(st.booleans()),
    )


def test_2bw_runs_ahead_once_and_never_drains() -> None:
    assert show(pipeline(depth=3, microbatches=3, batches=3)) == (
        "0: F0w0 F1w0 F2w0 B0w0 F3w0 B1w0 F4w0 B2w0 U0w1 F5w0 B3w0 F6w1 B4w0 F7w1 B5w0 U1w2 "
        "F8w1 B6w1 B7w1 B8w1 U2w3\n"
        "1: F0w0 F1w0 B0w0 F2w0 B1w0 F3w0 B2w0 U0w1 F4w0 B3w0 F5w0 B4w0 F6w1 B5w0 U1w2 F7w1 "
        "B6w1 F8w1 B7w1 B8w1 U2w3\n"
        "2: F0w0 B0w0 F1w0 B1w0 F2w0 B2w0 U0w1 F3w0 B3w0 F4w0 B4w0 F5w0 B5w0 U1w2 F6w1 B6w1 "
        "F7w1 B7w1 F8w1 B8w1 U2w3"
    )


def test_flush_drains_after_every_batch() -> None:
    assert show(pipeline("flush", depth=2, microbatches=3, batches=2)) == (
        "0: F0w0 F1w0 B0w0 F2w0 B1w0 B2w0 U0w1 F3w1 F4w1 B3w1 F5w1 B4w1 B5w1 U1w2\n"
        "1: F0w0 B0w0 F1w0 B1w0 F2w0 B2w0 U0w1 F3w1 B3w1 F4w1 B4w1 F5w1 B5w1 U1w2"
    )


def test_shared_weights_and_replicas_are_waited_for_late() -> None:
    text = show(
        pipeline(depth=2, microbatches=2, batches=3, tied=frozenset({0, 1}), replicated=True)
    )
    assert text == (
        "0: F0w0 F1w0 B0w0 F2w0 B1w0 A0 F3w0 U0w1 B2w0 M0w1 F4w1 B3w0 A1 F5w1 U1w2 B4w1 B5w1 A2 "
        "M1w2 U2w3 M2w3\n"
        "1: F0w0 B0w0 F1w0 B1w0 A0 F2w0 U0w1 B2w0 F3w0 B3w0 A1 M0w1 F4w1 U1w2 B4w1 F5w1 B5w1 A2 "
        "M1w2 U2w3 M2w3"
    )


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_every_schedule_is_proven(pipe: Pipeline) -> None:
    proof = check(pipe)
    total = pipe.microbatches * min(pipe.batches, 4)
    for stage, (stash, versions) in enumerate(zip(proof.stash, proof.versions, strict=True)):
        most = min(pipe.depth - stage, total if pipe.schedule == "2bw" else pipe.microbatches)
        assert stash == most
        assert versions <= pipe.copies


@settings(max_examples=20, deadline=None)
@given(pipelines())
def test_the_delay_is_exactly_one_everywhere(pipe: Pipeline) -> None:
    delay = 1 if pipe.schedule == "2bw" else 0
    for stage in range(pipe.depth):
        for action in actions(pipe, stage):
            if action.kind in (Kind.FORWARD, Kind.BACKWARD):
                batch = action.index // pipe.microbatches
                assert action.version == max(batch - delay, 0)


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
        schedule[0][at] = replace(action, version=action.version + by)

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
        (drop(Kind.UPDATE, 0), "before there is anything"),
        (twice(Kind.UPDATE, 0), "instead of update"),
        (sooner(Kind.UPDATE, 0, Kind.BACKWARD, 3), "of 4 backwards"),
        (sooner(Kind.BACKWARD, 1, Kind.BACKWARD, 0), "instead of backward"),
        (sooner(Kind.FORWARD, 3, Kind.BACKWARD, 0), "holds more than 3"),
        (drop(Kind.REDUCE, 1), "before the sum"),
        (drop(Kind.MERGE, 0), "before version 1 is made|unfinished version"),
        (drop(Kind.MERGE, 2), "ended after"),
        (sooner(Kind.RECEIVE, 2, Kind.FORWARD, 0), "instead of message"),
    ],
)
def test_a_broken_schedule_is_caught(mutation: Mutation, message: str) -> None:
    pipe = pipeline(tied=frozenset({0, 2}), replicated=True)
    schedule = [list(actions(pipe, stage)) for stage in range(pipe.depth)]
    check_actions(pipe, schedule)
    mutation(schedule)
    with pytest.raises(ScheduleError, match=message):
        check_actions(pipe, schedule)


def test_two_versions_are_too_few_for_fewer_microbatches_than_stages() -> None:
    """Why 2bw refuses m < d: a batch would start before the version that it runs on is made."""
    with pytest.raises(ScheduleError, match="F4w1 before version 1 is made"):
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


def test_too_few_microbatches_are_refused_with_what_would_do(tmp_path: Path) -> None:
    plan = read_plan(write_artifact(tmp_path / "a", depth=3))
    with pytest.raises(UsageError, match="--microbatches 3 or more, or --schedule flush"):
        make_pipeline(plan, batches=1, microbatches=2)
    assert make_pipeline(plan, batches=1, microbatches=2, schedule="flush").copies == 1
    with pytest.raises(UsageError, match="no schedule 'gpipe'"):
        make_pipeline(plan, batches=1, schedule="gpipe")
    with pytest.raises(UsageError, match="nothing to do"):
        make_pipeline(plan, batches=0)


def test_actions_are_made_as_they_are_used() -> None:
    """A run of a billion steps starts at once."""
    endless = actions(pipeline(batches=10**9), 0)
    assert [next(endless).kind for _ in range(3)] == [Kind.RECEIVE, Kind.FORWARD, Kind.SEND]
