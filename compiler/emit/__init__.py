"""Stage code: from a cut program to Python that reads as if a person had written it."""

from collections.abc import Sequence

from p2bw.compiler.emit.header import StageHeader, format_header, stage_header
from p2bw.compiler.emit.names import tensor_names
from p2bw.compiler.emit.stage import emit_stage
from p2bw.compiler.plan import Plan
from p2bw.compiler.program import Program
from p2bw.compiler.split import StageGraph

__all__ = ["StageHeader", "emit_stage", "emit_stages", "format_header", "tensor_names"]


def emit_stages(program: Program, cut: Sequence[StageGraph], plan: Plan) -> dict[str, str]:
    """The stage files of an artifact: relative name -> text."""
    names = tensor_names(program)
    return {
        f"stages/stage_{stage.index}.py": emit_stage(
            program, stage, plan.depth, stage_header(plan, stage.index, names)
        )
        for stage in cut
    }
