"""The weights of a checkpoint as safetensors files, by the names of the user's own model."""

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch._subclasses import FakeTensorMode

from p2bw.contract.checkpoint import (
    KINDS,
    MANIFEST,
    Checkpoint,
    DamageError,
    commits,
    open_checkpoint,
)
from p2bw.contract.errors import MismatchError, UsageError
from p2bw.contract.plan import describe
from p2bw.contract.stages import load_same
from p2bw.contract.tensors import renamed, sync_folder, write_synced, write_tensors, writing
from p2bw.modelfile.build import build
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import seeded

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    checkpoint: Path
    step: int
    files: tuple[str, ...]
    tensors: int
    bytes: int  # of the tensors
    initial: tuple[str, ...]  # that no stage holds: as the model file makes them

    def to_json(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "initial": list(self.initial),
        }


def export(
    source: str | Path,
    *,
    out: str | Path,
    model: str | Path | None = None,
    artifact: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write what `load_state_dict` of the user's model takes, strictly: every name of it, no other.

    `source` is a checkpoint, a folder of checkpoints or an artifact: of these the newest that is
    whole. A tied parameter is written under each of its names. One tensor is in memory at a time.
    The model file is `model` if given, else the file of that name from here, else the copy in the
    `artifact`, which the checkpoint lies in by default.
    """
    out = Path(out)
    saved = _whole_checkpoint(Path(source), progress)
    around = Path(artifact) if artifact else saved.folder.resolve().parent.parent
    given = Path(model) if model else None
    file = load_same(saved.manifest.model, around, given, owner=saved.folder)
    tensors = _Tensors(saved, file)
    with writing(out), ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        tensors.open(stack)
        shards = tensors.shards()
        for name, names in shards.items():
            progress(f"writing {out / name}")
            like = {tensor: tensors.like[tensor] for tensor in names}
            with renamed(out / name) as beside:
                write_tensors(beside, like, tensors.read, {"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.like.values())
        weight_map = {tensor: name for name, names in shards.items() for tensor in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        with renamed(out / INDEX) as beside:
            write_synced(beside, [json.dumps(index, indent=2).encode() + b"\n"])
        sync_folder(out)
    return Exported(
        checkpoint=saved.folder,
        step=saved.manifest.step,
        files=(*shards, INDEX),
        tensors=len(tensors.like),
        bytes=size,
        initial=tuple(tensors.initial),
    )


class _Tensors:
    """The tensors of a model's state_dict, found in a checkpoint."""

    def __init__(self, saved: Checkpoint, file: ModelFile) -> None:
        self.saved = saved
        self.like = _state_dict(file)
        aliases = defaultdict(list)
        for name, tensor in self.like.items():
            aliases[id(tensor)].append(name)
        self.sources = saved.sources((*saved.manifest.tied, *aliases.values()))
        unused = [name for name in self.like if name not in self.sources]
        self.initial = _initial(file, saved.manifest.seed, unused)
        self.contents: dict[str, Any] = {}  # open files

    def open(self, stack: ExitStack) -> None:
        for file in self.saved.manifest.files:
            content = safe_open(self.saved.folder / file.name, framework="pt")
            self.contents[file.name] = stack.enter_context(content)

    def read(self, name: str) -> Tensor:
        if name in self.initial:
            return self.initial[name]
        source, want = self.sources[name], self.like[name]
        key = next(key for key in source.keys if key in KINDS)
        tensor: Tensor = self.contents[source.file.name].get_tensor(f"{key}/{source.name}")
        if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
            raise MismatchError(
                f"{name} is {describe(tuple(tensor.shape), tensor.dtype)} in {self.saved.folder}, "
                f"{describe(tuple(want.shape), want.dtype)} in the model"
            )
        return tensor

    def shards(self) -> dict[str, list[str]]:
        """The files to write: one for each stage, and one for what no stage holds."""
        stages = defaultdict(list)
        for name in self.like:
            known = self.sources.get(name)
            stages[known.file.stage if known else self.saved.manifest.depth].append(name)
        count = len(stages)
        return {
            f"model-{number:05}-of-{count:05}.safetensors": stages[stage]
            for number, stage in enumerate(sorted(stages), 1)
        }


def _whole_checkpoint(source: Path, progress: Callable[[str], None]) -> Checkpoint:
    """A checkpoint of which all files have the right sums."""
    alone = (source / MANIFEST).is_file()
    folder = source / "checkpoints" if (source / "plan.json").is_file() else source
    for path in [source] if alone else commits(folder):
        try:
            saved = open_checkpoint(path)
            for file in saved.manifest.files:
                saved.verify(file)
        except DamageError as error:
            if alone:
                raise
            progress(f"{error}; an earlier checkpoint is used")
            continue
        return saved
    raise UsageError(f"{folder} has no whole checkpoint: p2bw run --checkpoint-every makes them")


def _state_dict(file: ModelFile) -> dict[str, Tensor]:
    """Of the user's model, built without memory."""
    with seeded("export"):
        state = build(file, FakeTensorMode(allow_non_fake_inputs=True)).state_dict(keep_vars=True)
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise MismatchError(f"the model's state_dict has {other[0]}, which is no tensor")
    return dict(state)


def _initial(file: ModelFile, seed: int, names: list[str]) -> dict[str, Tensor]:
    """What no stage computes with, as the model file makes it under the seed."""
    if not names:
        return {}
    with seeded(seed):
        state = file.model().state_dict()
    return {name: state[name].detach().clone() for name in names}
