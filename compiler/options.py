"""Options that are one of a few words, checked before any long work."""

import math
from typing import Literal, get_args

from p2bw.compiler.placement.dp import Recompute
from p2bw.compiler.plan import Schedule
from p2bw.contract.errors import UsageError


def checked_schedule(schedule: str, clip_norm: float | None) -> Schedule:
    """--schedule, which --clip-norm must go with."""
    known: dict[str, Schedule] = {name: name for name in get_args(Schedule)}
    if schedule not in known:
        raise UsageError(f"--schedule {schedule}: the schedules are {', '.join(known)}")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise UsageError(f"--clip-norm {clip_norm:g}: give a number above 0")
    if clip_norm is not None and schedule == "stash":
        raise UsageError(
            "--clip-norm: under stash the stages update at different times, and there is no norm "
            "of a whole batch's gradients; use --schedule 2bw or flush"
        )
    return known[schedule]


def checked_recompute(recompute: str) -> Recompute:
    """--recompute."""
    known: dict[str, Recompute] = {"auto": "auto", "always": "always", "never": "never"}
    if recompute not in known:
        raise UsageError(f"--recompute {recompute}: give auto, always or never")
    return known[recompute]


def checked_autocast(autocast: str | None) -> Literal["bfloat16"] | None:
    """--autocast, as torch names the type."""
    if autocast not in (None, "bf16", "bfloat16"):
        raise UsageError(
            f"--autocast {autocast}: give bf16 (float16 would need its gradients scaled)"
        )
    return "bfloat16" if autocast else None
