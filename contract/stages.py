"""The files of an artifact: its model file, and its stages as modules with the model's weights."""

import hashlib
import importlib.abc
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from p2bw.contract.errors import InputFileError, MismatchError, ModelError, P2BWError
from p2bw.contract.plan import Model, Plan, describe, read_plan
from p2bw.modelfile.load import ModelFile, load_model_file
from p2bw.modelfile.own import OwnModules


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


class Lender(Protocol):
    """Has the user's own modules, or what stands for them."""

    def blank(self, path: str) -> nn.Module: ...


# Where a stage that is being made takes the user's own modules from.
_own: ContextVar[Lender | None] = ContextVar("own", default=None)


@contextmanager
def lending(source: ModelFile | Lender | None) -> Iterator[None]:
    """Stages that are made in here take the user's own modules from this model file."""
    before = _own.set(OwnModules(source) if isinstance(source, ModelFile) else source)
    try:
        yield
    finally:
        _own.reset(before)


def opaque(stage_file: str, path: str) -> nn.Module:
    """The user's own module at a path of the model, for a stage file: it could not be traced.

    It comes from the model file that the stage's artifact was compiled from, without its weights:
    like all of a stage's, they are loaded by name.
    """
    artifact = Path(stage_file).resolve().parents[1]
    module = (_own.get() or OwnModules(find_model_file(artifact))).blank(path)
    module.register_forward_hook(partial(_check_result, path, _compiled_for(artifact, path)))
    for part in module.modules():  # for the runtime, see Weights; and for opaque_paths
        part.p2bw_opaque = path if part is module else True  # type: ignore[assignment]
    return module


def opaque_paths(stage: nn.Module) -> list[str]:
    """Where a stage holds the user's own modules that could not be traced."""
    marks = ((path, getattr(part, "p2bw_opaque", None)) for path, part in stage.named_modules())
    return [path for path, mark in marks if isinstance(mark, str)]


def _compiled_for(artifact: Path, path: str) -> list[list[str]]:
    """What the plan says that the calls of an opaque module return; [] without a plan."""
    try:
        plan = json.loads((artifact / "plan.json").read_bytes())
    except OSError:
        return []
    return next((o["returns"] for o in plan.get("opaque", []) if o["module"] == path), [])


def _check_result(
    path: str, compiled: list[list[str]], module: nn.Module, arguments: Any, result: Any
) -> None:
    """Refuse a result of another form than the plan's: ranks would wait for what never comes."""
    tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
    found = [describe(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    if compiled and found not in compiled:
        raise ModelError(
            f"{path} returned {', '.join(found)}, but it was compiled for "
            f"{', '.join(compiled[0])}; what a module that is not traced returns must have the "
            f"same shapes for all data"
        )


def load_stage(artifact: Path, index: int, source: ModelFile | Lender | None = None) -> nn.Module:
    """A new Stage from an artifact's stage file, with weights that mean nothing yet.

    `source` is the artifact's model file, for modules of the user's own; looked for if not given.
    """
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
        with lending(source), torch.random.fork_rng(devices=[]), _NoDraws():  # type: ignore[no-untyped-call]
            stage = module.Stage()
    except FileNotFoundError:
        raise InputFileError(f"{artifact} has no stages/{path.name}; compile it anew") from None
    except P2BWError:
        raise
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


def tied_parameters(plan: Plan, stage: int, module: nn.Module) -> dict[str, str]:
    """The parameters that the stage shares with others: canonical name -> the stage's own name."""
    found = {}
    names = {name for name, _ in module.named_parameters()}
    for tied in plan.tied:
        if stage in tied.stages and len(tied.stages) > 1:
            here = names.intersection(tied.names)
            if len(here) != 1:
                raise MismatchError(
                    f"stage {stage} should hold one parameter named {' or '.join(tied.names)}, "
                    f"it holds {len(here)}"
                )
            (found[tied.names[0]],) = here
    return found
