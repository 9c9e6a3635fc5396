"""The text of stages/stage_K.py."""

import ast

from p2bw.compiler.emit.build import Builder
from p2bw.compiler.emit.check import check
from p2bw.compiler.emit.classes import classify
from p2bw.compiler.emit.header import StageHeader, format_header
from p2bw.compiler.emit.names import tensor_names
from p2bw.compiler.emit.regions import lay_out_regions
from p2bw.compiler.emit.render import Writer
from p2bw.compiler.program import Program
from p2bw.compiler.split import StageGraph


def emit_stage(
    program: Program, stage: StageGraph, depth: int, header: str | StageHeader = ""
) -> str:
    """Python source of one stage, which ends with `class Stage(nn.Module)`.

    It imports torch alone, and where a module could not be traced, p2bw's way to it.
    """
    layout = lay_out_regions(program, stage)
    names = tensor_names(program)
    sent = [name for name in stage.results if name != program.loss.name]
    label = names[sent[0]] if len(stage.results) == 1 and sent else ""
    builder = Builder(layout, names)
    root = builder.build()
    root.bodies[0].passed_on = tuple(stage.arguments.index(name) for name in stage.passed_on)
    classes = classify(root)
    blocks = []
    for cls in classes.order:
        writer = Writer(classes, cls)
        if cls.sample is root:
            blocks.append("\n".join(writer.text(builder.attributes.ties(), label)))
        else:
            blocks.append("\n".join(writer.text()))
    code = "\n\n\n".join(blocks) + "\n"
    text = f'"""Stage {stage.index} of {depth}."""\n\n{_imports(code)}\n\n\n{code}'
    return titled(text, header) if header else _checked(text)


def titled(text: str, header: str | StageHeader) -> str:
    """A stage's source with other words at its top."""
    words = format_header(header) if isinstance(header, StageHeader) else header
    _, _, code = text.partition('"""\n\n')
    return _checked(f'"""{words}"""\n\n{code}')


def _checked(text: str) -> str:
    check(text)
    return text


def _imports(code: str) -> str:
    """The imports that the code needs, as ruff sorts them."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    lines = []
    if "OrderedDict" in used:
        lines += ["from collections import OrderedDict", ""]
    if "torch" in used:
        lines.append("import torch")
    if "F" in used:
        lines.append("import torch.nn.functional as F")
    lines.append(f"from torch import {', '.join(n for n in ('Tensor', 'nn') if n in used)}")
    if "opaque" in used:
        lines += ["", "from p2bw import opaque"]
    return "\n".join(lines)
