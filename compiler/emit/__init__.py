"""Stage code: from a cut program to Python that reads as if a person had written it."""

from collections.abc import Mapping, Sequence

from p2bw.compiler.emit.header import StageHeader, format_header, stage_header
from p2bw.compiler.emit.names import tensor_names
from p2bw.compiler.emit.stage import emit_stage, titled
from p2bw.compiler.plan import Plan
from p2bw.compiler.program import Program
from p2bw.compiler.split import StageGraph

__all__ = [
    "StageHeader",
    "emit_stage",
    "emit_stages",
    "format_header",
    "tensor_names",
    "with_headers",
]


def emit_stages(program: Program, cut: Sequence[StageGraph]) -> dict[str, str]:
    """The stage files of an artifact, without their headers: relative name -> text."""
    return {f"stages/stage_{stage.index}.py": emit_stage(program, stage, len(cut)) for stage in cut}


def with_headers(texts: Mapping[str, str], program: Program, plan: Plan) -> dict[str, str]:
    """Stage files with a plan's numbers at their tops."""
    names = tensor_names(program)
    return {
        name: titled(text, stage_header(plan, index, names))
        for index, (name, text) in enumerate(texts.items())
    }
