"""The simulation's order of events against what the runtime does, with ranks as threads."""

from collections import defaultdict
from pathlib import Path

import pytest
from handmade import write_artifact
from simulated import FREE

from p2bw.compiler.devices import find_device
from p2bw.compiler.simulation.engine import Engine
from p2bw.compiler.simulation.job import Job as Simulated
from p2bw.compiler.simulation.job import StageMemory
from p2bw.compiler.topology import Topology
from p2bw.contract.job import Job
from p2bw.contract.plan import Plan, read_plan
from p2bw.contract.schedule import Action, Kind, Pipeline, make_pipeline
from p2bw.runtime.local import train_in_threads
from p2bw.runtime.worker import Events

Spans = dict[int, list[tuple[Action, float, float]]]  # by rank: what it did, from, to


class Recorder(Events):
    tracing = True

    def __init__(self) -> None:
        self.spans: list[tuple[Action, float, float]] = []

    def action(self, action: Action, start_s: float, end_s: float) -> None:
        self.spans.append((action, start_s, end_s))


def performed(job: Job) -> Spans:
    """What every rank of a real run does, and when."""
    recorders: dict[int, Recorder] = defaultdict(Recorder)
    train_in_threads(job, events=lambda rank: recorders[rank])
    return {rank: recorder.spans for rank, recorder in recorders.items()}


def simulated(plan: Plan, pipe: Pipeline) -> Spans:
    """What the simulation has every rank do; the times of stages are arbitrary."""
    kinds = (Kind.FORWARD, Kind.BACKWARD, Kind.NORM, Kind.UPDATE, Kind.MERGE)
    job = Simulated(
        pipe=pipe,
        width=plan.width,
        ranks=tuple(stage.devices for stage in plan.stages),
        topology=Topology(name="made", device=find_device("cpu"), gpus=plan.ranks, levels=FREE),
        durations=tuple(
            {kind: 1000 * (1 + (7 * k + 3 * i) % 5) for i, kind in enumerate(kinds)}
            for k in range(plan.depth)
        ),
        own=tuple({Kind.FORWARD: 300 * (k % 2), Kind.BACKWARD: 200} for k in range(plan.depth)),
        memory=(StageMemory(0, 0, 0, 0, 0),) * plan.depth,
        sizes={channel: 500 for channel in pipe.channels},
        ring=(1000,) * plan.depth,
        factors={},
        jitter=300_000,
        seed=0,
    )
    spans: Spans = defaultdict(list)

    def record(own: int, stage: int, action: Action, began: int, now: int) -> None:
        spans[plan.stages[stage].devices[own]].append((action, began, now))

    Engine(job, record=record).run()
    return spans


def check_order_across_ranks(plan: Plan, spans: Spans) -> None:
    """A message is received after it was sent; a sum ends after all replicas have what they add."""
    sent, received, closed = {}, {}, {}
    m = plan.microbatches_per_update
    for rank, own in spans.items():
        stage, replica = plan.position(rank)
        for action, start, end in own:
            if action.kind is Kind.SEND:
                sent[replica, action.channel, action.index] = start
            elif action.kind is Kind.RECEIVE:
                received[replica, action.channel, action.index] = end
            elif action.kind is Kind.BACKWARD and action.index % m == m - 1:
                closed[stage, replica, action.index // m] = end
    assert sent.keys() == received.keys()
    assert all(sent[message] <= received[message] for message in sent)
    for rank, own in spans.items():
        stage, _ = plan.position(rank)
        for action, _, end in own:
            if action.kind is Kind.GATHER:
                assert all(closed[stage, r, action.index] <= end for r in range(plan.width))


@pytest.mark.parametrize(
    ("schedule", "depth", "width", "m", "extra", "clip_norm"),
    [
        ("2bw", 1, 1, 2, 0, None),
        ("2bw", 2, 2, 3, 1, None),
        ("2bw", 3, 1, 4, 1, 0.5),
        ("2bw", 4, 2, 5, 0, 0.5),
        ("flush", 4, 1, 3, 0, None),
        ("flush", 2, 2, 4, 0, 0.5),
        ("gpipe", 3, 2, 4, 0, None),
    ],
)
def test_every_rank_does_what_the_simulation_says_in_that_order(
    tmp_path: Path,
    schedule: str,
    depth: int,
    width: int,
    m: int,
    extra: int,
    clip_norm: float | None,
) -> None:
    """Computing, sending, and waiting for what was received: skips, ties, norms and replicas."""
    artifact = write_artifact(
        tmp_path / "a", depth=depth, width=width, microbatches=m, schedule=schedule, extra=extra
    )
    real = performed(Job(artifact=artifact, steps=4, schedule=schedule, clip_norm=clip_norm))
    plan = read_plan(artifact)
    pipe = make_pipeline(plan, batches=4, schedule=schedule, clipped=clip_norm is not None)
    model = simulated(plan, pipe)
    assert real.keys() == model.keys() == set(range(plan.ranks))
    for rank, spans in real.items():
        assert [str(a) for a, _, _ in spans] == [str(a) for a, _, _ in model[rank]]
    check_order_across_ranks(plan, real)
    check_order_across_ranks(plan, model)


def test_stages_on_different_versions_keep_their_order_too(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=3, microbatches=1, schedule="stash", tied=False)
    real = performed(Job(artifact=artifact, steps=5))
    plan = read_plan(artifact)
    model = simulated(plan, make_pipeline(plan, batches=5))
    for rank, spans in real.items():
        assert [str(a) for a, _, _ in spans] == [str(a) for a, _, _ in model[rank]]
    check_order_across_ranks(plan, model)
