"""The files of an artifact: its model file, and its stages as modules with the model's weights."""

import hashlib
import importlib.abc
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.contract.errors import InputFileError, MismatchError, ModelError
from p2bw.contract.plan import Model, Plan, read_plan
from p2bw.modelfile.load import ModelFile, load_model_file


def find_model_file(artifact: Path, model: Path | None = None) -> ModelFile:
    """Load the model file that an artifact was compiled from.

    It is `model` if given, else the file of that name from here, else the copy in the artifact;
    its bytes must be those that were compiled.
    """
    return load_same(read_plan(artifact).model, artifact, model, owner=artifact)


def load_same(source: Model, artifact: Path, model: Path | None, owner: Path) -> ModelFile:
    """`find_model_file` for what `owner`, an artifact or a checkpoint, says of its model."""
    copy = artifact / "source" / Path(source.file).name
    found = [path for path in ([model] if model else [Path(source.file), copy]) if path.is_file()]
    for path in found:
        if hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
            return load_model_file(path, source.factory, source.settings, source.autocast)
    if model and not found:
        return load_model_file(model)  # says what is wrong with the path
    if found:
        raise MismatchError(
            f"{found[0]} is not the file that {owner} was compiled from (SHA-256 "
            f"{source.sha256[:12]}...); give that one's place with --model, or compile anew"
        )
    raise MismatchError(
        f"the model file {source.file} of {owner} is not here; give its place with --model"
    )


def stage_path(artifact: Path, index: int) -> Path:
    return artifact / "stages" / f"stage_{index}.py"


def load_stage(artifact: Path, index: int) -> nn.Module:
    """A new Stage from an artifact's stage file, with weights that mean nothing yet."""
    path = stage_path(artifact, index)
    name = f"_p2bw_stage_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    loader = _Source(path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
        # What is drawn is thrown away.
        with torch.random.fork_rng(devices=[]), _NoDraws():  # type: ignore[no-untyped-call]
            stage = module.Stage()
    except FileNotFoundError:
        raise InputFileError(f"{artifact} has no stages/{path.name}; compile it anew") from None
    except Exception as error:
        raise ModelError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    if not isinstance(stage, nn.Module):
        raise ModelError(f"stages/{path.name}: Stage() is no torch.nn.Module")
    return stage.train()


class _Source(importlib.abc.SourceLoader):
    """Imports a file without a bytecode cache: a stage edited a moment ago must never be stale."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.path.read_bytes()


class _NoDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves out the drawing of initial parameters, which is slow, and for nothing here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawing = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        if drawing and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def _place(path: Path, error: Exception) -> str:
    """stages/stage_1.py:52, the line of the stage file that an error came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return f"stages/{path.name}:{lines[-1]}" if lines else f"stages/{path.name}"


def digests(artifact: Path, plan: Plan) -> dict[str, str]:
    """SHA-256 of every file that the ranks must have in common."""
    paths = [artifact / "plan.json", *(stage_path(artifact, stage.index) for stage in plan.stages)]
    return {
        path.relative_to(artifact).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }
