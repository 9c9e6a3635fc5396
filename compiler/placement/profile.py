"""ProfileProblem: measured operators on a row of stages, each of which may have several replicas.

PipeDream's objective (SOSP 2019, its optimizer with transfers counted, one level of machines), in
seconds per minibatch, `r` the replicas of a stage, `bw` bytes per second:

    a stage          (C + 4 (r - 1) P / (bw r)) / r     C its operators' time, P their parameters
    a boundary       2 a / (bw r)     for the stage before it and for the stage after it; but the
                                      first stage does not pay for its only boundary
    the period       the largest of these

`a` is every output made before the boundary and read after it, once; its gradient goes back. A
device of a stage holds ceil(w / r) minibatches, w the workers from this stage to the last, and for
each of them the operators' activations and a version of their parameters. (PipeDream's own code
multiplies by ceil((N - r - 1) / r): by nothing, for a stage on all N machines.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What one operator costs, forward and backward, for one minibatch."""

    name: str
    time: float  # s
    parameters: float = 0.0  # bytes
    activation: float = 0.0  # bytes kept until the backward


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor: its producer and its readers, as numbers of operators."""

    producer: int
    readers: tuple[int, ...]
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileProblem:
    """Operators, their outputs, what comes before what, and the machines' links and memory."""

    operators: tuple[Operator, ...]
    outputs: tuple[Output, ...]
    order: tuple[tuple[int, int], ...]  # no later on the row than
    bandwidth: float  # bytes per second between any two machines
    memory: float = math.inf  # bytes of a machine


@dataclass(frozen=True, slots=True)
class ReplicatedStage:
    """What each replica of a stage is busy for in a minibatch's time, and what it holds."""

    load: float
    memory: float
    replicas: int


def judge_profile(
    problem: ProfileProblem, place: Sequence[int], replicas: Sequence[int]
) -> tuple[float, tuple[ReplicatedStage, ...]]:
    """The exact period of a placement, and each stage's share; by the definition alone."""
    bandwidth = problem.bandwidth
    stages = []
    busy = [0.0]
    for k, r in enumerate(replicas):
        own = [op for op, at in zip(problem.operators, place, strict=True) if at == k]
        sync = 4 * (r - 1) * math.fsum(op.parameters for op in own) / (bandwidth * r)
        flying = -(-sum(replicas[k:]) // r)
        held = math.fsum(op.parameters + op.activation for op in own)
        stage = ReplicatedStage((math.fsum(op.time for op in own) + sync) / r, flying * held, r)
        stages.append(stage)
        busy.append(stage.load)
    for k in range(1, len(replicas)):
        live = math.fsum(
            output.bytes
            for output in problem.outputs
            if place[output.producer] < k <= max(place[reader] for reader in output.readers)
        )
        payers = replicas[k - 1 : k + 1] if k > 1 else replicas[1:2]
        busy.append(2 * live / (bandwidth * min(payers)))
    return max(busy), tuple(stages)
