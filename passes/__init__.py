"""Pure functions from Program to Program; `pipeline` is their order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from p2bw.compiler.devices import Device
from p2bw.compiler.program import MissingFactError, Program
from p2bw.passes.annotate_autograd import annotate_autograd
from p2bw.passes.annotate_cost import annotate_cost
from p2bw.passes.annotate_time import annotate_time
from p2bw.passes.group_blocks import group_blocks


@dataclass(frozen=True, slots=True)
class Pass:
    """A function from Program to Program, and the passes that must have run before it."""

    name: str
    function: Callable[[Program], Program]
    needs: tuple[str, ...] = ()


def pipeline(device: Device) -> tuple[Pass, ...]:
    """All passes in their order; `device` is the slowest kind that the program will run on."""
    return (
        Pass("annotate_autograd", partial(annotate_autograd, on_gpu=device.on_gpu), ("trace",)),
        Pass("annotate_cost", annotate_cost, ("annotate_autograd",)),
        Pass("annotate_time", partial(annotate_time, device=device), ("annotate_cost",)),
        Pass("group_blocks", group_blocks, ("annotate_autograd", "annotate_time")),
    )


def run_passes(
    program: Program,
    passes: Iterable[Pass],
    *,
    after: Callable[[Program], None] = lambda program: None,
) -> Program:
    """Apply passes in order; `after` sees the program behind each.

    A pass whose needs have not run is refused with MissingFactError. Any other exception keeps its
    type and carries a note of where it happened.
    """
    for step in passes:
        missing = [name for name in step.needs if name not in program.history]
        if missing:
            raise MissingFactError(f"{step.name} needs {missing[0]}: run {missing[0]} first")
        try:
            program = step.function(program)
        except Exception as error:
            error.add_note(f"in pass {step.name}, after {', '.join(program.history)}")
            raise
        after(program)
    return program
