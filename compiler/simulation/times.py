"""Times of stages from a file: what `p2bw rehearse --json` prints."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from p2bw.compiler.plan import Plan, wrong_field
from p2bw.compiler.simulation.job import StageTimes, planned_times
from p2bw.contract.errors import InputFileError, MismatchError, UsageError

Seconds = Annotated[float, Field(ge=0, lt=1e6)]  # sums of many stay finite


class _Read(BaseModel):
    """Of a rehearsal, what is used of it."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _Measured(_Read):
    measured: Seconds


class _Stage(_Read):
    stage: Annotated[int, Field(ge=0)]
    forward_s: _Measured
    backward_s: _Measured
    update_s: _Measured
    norm_s: _Measured


class _Rehearsal(_Read):
    stages: Annotated[tuple[_Stage, ...], Field(min_length=1)]


def read_times(path: Path, plan: Plan) -> list[StageTimes]:
    """The measured times of a plan's stages; those that were not rehearsed take what was planned.

    InputFileError for what is no rehearsal, MismatchError for one of a plan with other stages.
    """
    try:
        found = _Rehearsal.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        wrong = wrong_field(error, "the file")
        raise InputFileError(f"{path}: {wrong}; `p2bw rehearse DIR --json` prints one") from None
    times = [planned_times(plan, stage) for stage in plan.stages]
    for stage in found.stages:
        if stage.stage >= plan.depth:
            raise MismatchError(
                f"{path} has a stage {stage.stage}, the plan's are 0 to {plan.depth - 1}; rehearse "
                f"this artifact"
            )
        times[stage.stage] = StageTimes(
            forward_s=stage.forward_s.measured,
            backward_s=stage.backward_s.measured,
            update_s=stage.update_s.measured,
            # A plan that does not clip has none; simulated with clipping, it reads the gradients.
            norm_s=stage.norm_s.measured or None,
        )
    return times
