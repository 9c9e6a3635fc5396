"""export_onnx: the stages of an artifact as ONNX files, in evaluation mode."""

import functools
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from p2bw.compiler.onnx.files import import_package
from p2bw.compiler.plan import read_plan as read_whole_plan
from p2bw.contract.errors import MismatchError, ModelError, UsageError
from p2bw.contract.plan import Plan, Stage, read_plan
from p2bw.contract.stages import find_model_file, load_stage
from p2bw.contract.tensors import writing
from p2bw.modelfile.initial import copy_state, fill_stage
from p2bw.modelfile.microbatch import seeded

if TYPE_CHECKING:
    import onnx

PIPELINE = "pipeline.json"
TOLERANCE = 1e-4  # of the loss, relative
# What tells of modules and of parameters; the rest names files of the machine that exported.
_KEPT = (
    "pkg.torch.onnx.name_scopes",
    "pkg.torch.onnx.class_hierarchy",
    "pkg.torch.export.graph_signature.InputSpec.kind",
)
_EMBEDDED = 1 << 30  # bytes of weights that one file holds
_RANDOM = ("RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "Dropout")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedStages:
    """What was written, and how far ONNX Runtime is from the model on one microbatch."""

    files: tuple[str, ...]
    loss: float  # of the model
    max_rel: float | None  # None: ONNX Runtime is not installed

    def to_json(self) -> dict[str, Any]:
        return {"files": list(self.files), "loss": self.loss, "max_rel": self.max_rel}


def export_onnx(
    artifact: str | Path,
    *,
    out: str | Path,
    model: str | Path | None = None,
    weights: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> ExportedStages:
    """Write a file for each stage, for the microbatch of the plan, and what connects them.

    The weights are the model file's, or those of safetensors files. The files keep the parameters'
    names; nothing is folded. They are checked, and run against the model where ONNX Runtime is
    installed.
    """
    _import_exporter()
    artifact, out = Path(artifact), Path(out)
    plan = read_plan(artifact)
    for opaque in read_whole_plan(artifact).opaque:
        raise ModelError(
            f"{opaque.module} was not traced ({opaque.reason}), so it cannot be written as ONNX"
        )
    file = find_model_file(artifact, Path(model) if model else None)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--onnx {out} exists and is not an empty folder; name another")
    with seeded("export"), torch.no_grad():
        original = file.model().eval()
        if weights is not None:
            fill_stage(file, original, seed=0, weights=Path(weights))
        inputs, targets = file.inputs(plan.microbatch), file.targets(plan.microbatch)
        tensors = file.flatten_microbatch(inputs, targets)
        values = dict(zip((spec.name for spec in plan.inputs), tensors, strict=True))
        loss = file.call(original, inputs, targets).item()
        with writing(out), _all_or_nothing(out) as fresh:
            names = _write_stages(artifact, plan, original, dict(values), fresh, progress)
            text = json.dumps(_pipeline(plan, names), indent=2) + "\n"
            (fresh / PIPELINE).write_text(text, encoding="utf-8")
            progress("running the files")
            got = _run(fresh, plan, names, values)
            difference = None if got is None else abs(got - loss) / max(abs(loss), 1e-12)
            if difference is not None and not difference <= TOLERANCE:
                raise MismatchError(
                    f"the loss of the files is {got:.7g} in ONNX Runtime, and {loss:.7g} in the "
                    f"model in evaluation mode: they are not kept. PyTorch's exporter does not "
                    f"keep all that the model does (of cross_entropy it drops label_smoothing), or "
                    f"the stages' code differs between training and evaluation"
                )
    return ExportedStages(files=(*names, PIPELINE), loss=loss, max_rel=difference)


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place once all is well, and is gone otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        fresh = Path(scratch, "new")
        fresh.mkdir()
        yield fresh
        fresh.replace(out)  # which is not there, or empty


def _import_exporter() -> None:
    import_package()
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UsageError(
            "writing ONNX files needs the onnxscript package: pip install 'p2bw[onnx]'"
        ) from None


def _write_stages(
    artifact: Path,
    plan: Plan,
    original: nn.Module,
    values: dict[str, Tensor],
    out: Path,
    progress: Callable[[str], None],
) -> list[str]:
    """Write each stage; `values` gets what the stages send each other."""
    names = []
    for spec in plan.stages:
        names.append(f"stage_{spec.index}.onnx")
        progress(f"writing {names[-1]}")
        stage = _evaluating(load_stage(artifact, spec.index))
        copy_state(original, stage)
        arguments = tuple(values[name] for name in spec.arguments)
        results = stage(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        values.update(zip(spec.results, results, strict=True))
        _save(_exported(stage, arguments, spec), out / names[-1], spec)
    return names


class _Evaluation(TorchFunctionMode):
    """Functions that were traced in training mode, as they are in evaluation mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            kwargs["training"] = False
        elif func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        elif func is F.batch_norm:
            kwargs["training"] = False
        return func(*args, **kwargs)


def _evaluating(stage: nn.Module) -> nn.Module:
    """The stage with its functions in evaluation mode too."""
    forward = stage.eval().forward

    @functools.wraps(forward)
    def evaluate(*arguments: Tensor) -> Any:
        with _Evaluation():
            return forward(*arguments)

    stage.forward = evaluate  # a module around it would change the names of the parameters
    return stage


def _exported(stage: nn.Module, arguments: tuple[Tensor, ...], spec: Stage) -> "onnx.ModelProto":
    with _quiet():
        try:
            program = torch.onnx.export(
                stage, arguments, dynamo=True, optimize=False, verbose=False
            )
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise ModelError(f"stage {spec.index} cannot be exported to ONNX: {line}") from error
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    _rename(proto, spec)
    module = type(stage).__module__  # named after a place on this machine
    for node in proto.graph.node:
        for prop in node.metadata_props:
            prop.value = prop.value.replace(f"{module}.", "")
    return proto


def _rename(proto: "onnx.ModelProto", spec: Stage) -> None:
    """Call inputs and outputs as the plan does, and inner values that are called so otherwise."""
    graph = proto.graph
    wanted = {*spec.arguments, *spec.results}
    made = {name for node in graph.node for name in node.output}
    names = {name: f"{name}.inner" for name in made if name in wanted}
    names |= {v.name: name for v, name in zip(graph.input, spec.arguments, strict=True)}
    old = [value.name for value in graph.output]
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.value_info, *graph.input):
        value.name = names.get(value.name, value.name)
    for value, before, name in zip(graph.output, old, spec.results, strict=True):
        value.name = name
        given = names.get(before, before)
        if given != name:
            graph.node.add(op_type="Identity", input=[given], output=[name], name=f"to.{name}")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs about what is no concern of the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _save(proto: "onnx.ModelProto", path: Path, spec: Stage) -> None:
    """Write a file without places of this machine in it, and check it."""
    import onnx

    drawn = sorted({n.op_type for n in proto.graph.node if n.op_type.startswith(_RANDOM)})
    if drawn:
        raise ModelError(
            f"stage {spec.index} draws random numbers in evaluation mode too ({', '.join(drawn)}): "
            f"use nn.Dropout in the model, or F.dropout(x, p, self.training)"
        )
    graph = proto.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        kept = [prop for prop in item.metadata_props if prop.key in _KEPT]
        del item.metadata_props[:]
        item.metadata_props.extend(kept)
        item.doc_string = ""
    del proto.metadata_props[:]
    del graph.metadata_props[:]
    size = sum(len(tensor.raw_data) for tensor in graph.initializer)
    onnx.save_model(
        proto,
        str(path),
        save_as_external_data=size > _EMBEDDED,
        location=f"{path.name}.data",
    )
    onnx.checker.check_model(str(path), full_check=True)


def _pipeline(plan: Plan, names: list[str]) -> dict[str, Any]:
    """What connects the files: each input is the user's or comes from an earlier stage."""

    def tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        return {"name": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}

    inputs = {spec.name: spec for spec in plan.inputs}
    stages = []
    for stage, name in zip(plan.stages, names, strict=True):
        takes = [
            {**tensor(i, inputs[i].shape, inputs[i].dtype), "from": "input"} for i in stage.inputs
        ]
        takes += [{**tensor(t.tensor, t.shape, t.dtype), "from": t.peer} for t in stage.receives]
        stages.append({"file": name, "inputs": takes, "outputs": list(stage.results)})
    loss = next(stage.loss for stage in plan.stages if stage.loss)
    return {"schema": 1, "microbatch": plan.microbatch, "loss": loss, "stages": stages}


def _run(out: Path, plan: Plan, names: list[str], values: dict[str, Tensor]) -> float | None:
    """The loss of one microbatch, stage after stage in ONNX Runtime, if that is installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    arrays = {name: tensor.numpy() for name, tensor in values.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, spec in zip(names, plan.stages, strict=True):
        session = onnxruntime.InferenceSession(
            str(out / name), options, providers=["CPUExecutionProvider"]
        )
        needed = {value.name for value in session.get_inputs()}
        feeds = {key: arrays[key] for key in spec.arguments if key in needed}
        arrays.update(zip(spec.results, session.run(list(spec.results), feeds), strict=True))
    return float(next(arrays[stage.loss] for stage in plan.stages if stage.loss))
