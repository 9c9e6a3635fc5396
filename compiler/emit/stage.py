"""The text of stages/stage_K.py."""

import ast
import sys
from collections.abc import Collection

from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload

from p2bw.compiler.emit.build import Builder
from p2bw.compiler.emit.check import check
from p2bw.compiler.emit.classes import classify
from p2bw.compiler.emit.header import StageHeader, format_header
from p2bw.compiler.emit.names import tensor_names
from p2bw.compiler.emit.regions import lay_out_regions
from p2bw.compiler.emit.render import Writer
from p2bw.compiler.program import Program
from p2bw.compiler.split import StageGraph
from p2bw.modelfile.usercode import is_installed


def emit_stage(
    program: Program, stage: StageGraph, depth: int, header: str | StageHeader = ""
) -> str:
    """Python source of one stage, which ends with `class Stage(nn.Module)`.

    It imports torch alone; where a module could not be traced, p2bw's way to it; and the libraries
    whose own operators it calls.
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
    libraries = _libraries(program, stage)
    text = f'"""Stage {stage.index} of {depth}."""\n\n{_imports(code, libraries)}\n\n\n{code}'
    return titled(text, header) if header else _checked(text, libraries)


def titled(text: str, header: str | StageHeader) -> str:
    """A stage's source with other words at its top."""
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import)]
    names = [alias.name for node in imports for alias in node.names]
    libraries = [name for name in names if name.partition(".")[0] != "torch"]
    words = format_header(header, libraries) if isinstance(header, StageHeader) else header
    _, _, code = text.partition('"""\n\n')
    return _checked(f'"""{words}"""\n\n{code}', libraries)


def _checked(text: str, libraries: Collection[str]) -> str:
    check(text, libraries)
    return text


def _libraries(program: Program, stage: StageGraph) -> list[str]:
    """The installed modules that define operators which the stage calls, other than torch's."""
    found = set()
    for name in stage.nodes:
        target = program.node(name).target
        if isinstance(target, OpOverload) and (operator := OPDEFS.get(target._schema.name)):
            module = operator._init_fn.__module__
            file = str(getattr(sys.modules.get(module), "__file__", ""))
            plain = all(part.isidentifier() for part in module.split("."))
            if plain and is_installed(file) and not module.startswith("torch."):
                found.add(module)
    return sorted(found)


def _imports(code: str, libraries: Collection[str]) -> str:
    """The imports that the code needs, as ruff sorts them."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    lines = []
    if "OrderedDict" in used:
        lines += ["from collections import OrderedDict", ""]
    if "torch" in used:
        lines.append("import torch")
    if "F" in used:
        lines.append("import torch.nn.functional as F")
    lines += [f"import {name}  # noqa: F401, its operators" for name in libraries]
    lines.append(f"from torch import {', '.join(n for n in ('Tensor', 'nn') if n in used)}")
    if "opaque" in used:
        lines += ["", "from p2bw import opaque"]
    return "\n".join(lines)
