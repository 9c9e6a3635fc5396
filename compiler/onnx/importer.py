"""import_onnx: a model file of plain PyTorch, and its weights, from an ONNX file."""

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from p2bw.compiler.onnx.files import quote, read_model
from p2bw.compiler.onnx.filling import FILLING
from p2bw.compiler.onnx.graph import translate
from p2bw.compiler.onnx.helpers import HELPERS
from p2bw.compiler.onnx.layers import LAYERS
from p2bw.compiler.onnx.layout import LAYOUT
from p2bw.compiler.onnx.modules import Modules, build
from p2bw.compiler.onnx.names import class_name, file_name, identifier, unique
from p2bw.compiler.onnx.pointwise import POINTWISE
from p2bw.compiler.onnx.shapes import Shapes, Size, infer
from p2bw.compiler.onnx.values import Constant, Translate, Translation
from p2bw.contract.errors import InputFileError

WEIGHTS = "weights.safetensors"
OPERATORS: Mapping[str, Translate] = {**POINTWISE, **LAYOUT, **FILLING, **LAYERS}


@dataclass(frozen=True, slots=True)
class Imported:
    """The model file that an ONNX file has become; its weights lie beside it."""

    file: Path
    weights: Path
    batch: int | None  # the only microbatch that the ONNX file allows, where it fixes one


def import_onnx(path: Path, folder: Path, sizes: Mapping[str, Any] | None = None) -> Imported:
    """Translate an ONNX file into a model file in `folder`; the file itself is never trusted.

    `sizes` are for its symbolic dimensions other than the batch, by name.
    """
    path = Path(path)
    model = read_model(path)
    shapes = infer(path, model, sizes or {})
    translation = translate(path, model, shapes, OPERATORS)
    names: dict[str, str] = {}
    for mark, name in translation.inputs.items():
        names[mark] = unique(identifier(name, "x"), names.values())
    modules = build(translation, names, class_name(path.stem, "Model"))
    if not any(c is not None and c.role == "parameter" for c in modules.tensors.values()):
        raise InputFileError(
            f"{path.name} has nothing to train: no output depends on a weight (a float "
            f"initializer with dimensions)"
        )
    outputs = [(value.name, _output(path, shapes, value.name)) for value in model.graph.output]
    if not any("float" in dtype for _, (_, dtype) in outputs):
        raise InputFileError(f"{path.name} has no output of floats that a loss could come from")
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    save_file({name: _tensor(c) for name, c in modules.tensors.items()}, weights)
    with weights.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    source = _source(path, shapes, translation, modules, outputs, digest)
    _check_source(source)
    file = folder / f"{file_name(path.stem)}.py"
    file.write_text(source, encoding="utf-8")
    return Imported(file, weights, shapes.batch)


def _tensor(constant: Constant | None) -> Tensor:
    if constant is None:
        return torch.zeros((), dtype=torch.int64)
    array = constant.array
    tensor = torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
    tensor = tensor.view(torch.bfloat16) if constant.dtype == "bfloat16" else tensor
    return tensor.reshape(constant.shape).contiguous()


def _output(path: Path, shapes: Shapes, name: str) -> tuple[tuple[Size, ...], str]:
    """Shape and type of an output."""
    found = shapes.sizes.get(name)
    if found is None or None in found:
        raise InputFileError(
            f"{path.name}: the shape of output {quote(name)} cannot be inferred; give the model "
            f"the shapes of its outputs, or remove that output"
        )
    return tuple(size for size in found if size is not None), shapes.dtypes.get(name, "float32")


def _source(
    path: Path,
    shapes: Shapes,
    translation: Translation,
    modules: Modules,
    outputs: list[tuple[str, tuple[tuple[Size, ...], str]]],
    digest: str,
) -> str:
    """The text of the model file."""
    kinds = [kind for _, kind in outputs]
    helpers = [HELPERS[name] for name in sorted(translation.helpers)]
    blocks = [
        _head(path, modules, kinds, digest),
        *helpers,
        *modules.classes,
        _model(modules.name),
        _inputs(shapes, translation),
        *_training(kinds),
    ]
    return "\n\n\n".join(blocks) + "\n"


_INTRO = '''"""{title}

Weights are the ONNX file's float initializers with dimensions, except the statistics of batch
normalisation and masks with infinities, which are buffers. Batch normalisation trains (as in
PyTorch: the batch's own statistics), whatever mode the file was exported in.
{loss}
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("{weights}")
SHA256 = "{digest}"  # of the weights'''

_LOSS = """
An ONNX file has no loss: loss() is the mean square of the difference from targets(), random numbers
until you put your own here."""
_OWN_LOSS = """
The model's only output is one number, which is taken for its loss."""


def _head(
    path: Path, modules: Modules, outputs: list[tuple[tuple[Size, ...], str]], digest: str
) -> str:
    own = len(outputs) == 1 and not outputs[0][0]
    return _INTRO.format(
        title=f"{modules.name}, from the ONNX file {file_name(path.stem)}.onnx.",
        loss=_OWN_LOSS if own else _LOSS,
        weights=WEIGHTS,
        digest=digest,
    )


def _model(name: str) -> str:
    return f'''def model() -> {name}:
    """The model with the weights of the ONNX file."""
    with WEIGHTS.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise ValueError(f"{{WEIGHTS.name}} is not the file that was made with this one")
    net = {name}()
    with torch.no_grad(), safe_open(WEIGHTS, "pt") as weights:
        for name, tensor in net.state_dict().items():
            tensor.copy_(weights.get_tensor(name))
    return net'''


def _inputs(shapes: Shapes, translation: Translation) -> str:
    marks = {name: mark for mark, name in translation.inputs.items()}
    lines = []
    for value in shapes.inputs:
        sizes = ", ".join(map(str, value.sizes))
        shape = f"({sizes}{',' if len(value.sizes) == 1 else ''})"
        dtype = f"dtype=torch.{value.dtype}"
        limit = translation.limits.get(marks[value.name])
        if "float" in value.dtype:
            kind = "" if value.dtype == "float32" else f", {dtype}"
            lines.append(f"torch.randn({shape}{kind})")
        elif limit is not None:
            kind = "" if value.dtype == "int64" else f", {dtype}"
            lines.append(f"torch.randint({limit}, {shape}{kind})")
        else:
            lines.append(f"torch.ones({shape}, {dtype})")
    fixed = ""
    if shapes.batch is not None:
        fixed = (
            f"    if batch_size != {shapes.batch}:\n"
            f'        raise ValueError("the ONNX file fixes the batch at {shapes.batch}")\n'
        )
    return (
        f"def inputs(batch_size: int) -> tuple[Tensor, ...]:\n"
        f'    """Random numbers, and indices below the number of rows that they pick from."""\n'
        f"{fixed}    return ({', '.join(lines)}{',' if len(lines) == 1 else ''})"
    )


def _training(outputs: list[tuple[tuple[Size, ...], str]]) -> list[str]:
    """targets() and loss()."""
    if len(outputs) == 1 and not outputs[0][0]:
        return ["def loss(output: Tensor) -> Tensor:\n    return output"]
    places = [i for i, (_, dtype) in enumerate(outputs) if "float" in dtype]
    made = []
    for sizes, dtype in (outputs[i] for i in places):
        shape = f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
        made.append(f"torch.randn({shape}{'' if dtype == 'float32' else f', dtype=torch.{dtype}'})")
    comma = "," if len(made) == 1 else ""
    targets = (
        f"def targets(batch_size: int) -> tuple[Tensor, ...]:\n"
        f"    return ({', '.join(made)}{comma})"
    )
    if len(outputs) == 1:
        loss = (
            "def loss(output: Tensor, target: Tensor) -> Tensor:\n"
            "    return F.mse_loss(output, target)"
        )
    else:
        terms = " + ".join(f"F.mse_loss(outputs[{i}], targets[{k}])" for k, i in enumerate(places))
        loss = (
            f"def loss(outputs: tuple[Tensor, ...], *targets: Tensor) -> Tensor:\n"
            f"    return {terms}"
        )
    return [targets, loss]


def _check_source(source: str) -> None:
    """The last door: what is written parses, and refers to nothing that was not meant."""
    for node in ast.walk(ast.parse(source)):
        for name in ("id", "attr", "arg", "name"):
            text = getattr(node, name, None)
            if isinstance(text, str) and text.startswith("_"):
                assert text in ("__init__", "__file__", "_"), text
        assert not isinstance(node, (ast.Global, ast.Nonlocal, ast.Lambda, ast.Await))
