"""The files of a checkpoint: which belong together, whether they are whole, and what is in them.

    DIR/step-00000012/stage-0.safetensors            what stage 0 needs to go on, by replica 0
                      stage-0-replica-1.safetensors  the buffers of another replica, if any
                      manifest.json                  which files belong together, with their sums
                      COMMITTED                      the SHA-256 of manifest.json

A file of tensors holds the state of the stage's parameters and buffers (see StageState), and frozen
parameters as frozen/NAME: a checkpoint is the whole model. Its metadata hold the state's values.
All of it is data from a file, and is checked as such; none of it is ever run.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from p2bw.contract.errors import MismatchError
from p2bw.contract.plan import BadValueError, Model, Plan, describe, read_value

SCHEMA = 1
KINDS = ("weights", "frozen", "buffers")  # of state that is the model's own
MANIFEST, MARK = "manifest.json", "COMMITTED"
_BLOCK = 1 << 22  # bytes read at a time
_FILE = re.compile(r"stage-\d+(-replica-\d+)?\.safetensors")
_TENSOR = re.compile(r"(optimizer/[^/]+|[^/]+)/(.+)", re.DOTALL)  # key and name


@dataclass(frozen=True, slots=True)
class StageState:
    """What one rank needs to go on from a weight version, by the model's names of parameters.

    Tensors are called weights/NAME, previous/NAME (a version before; previous2/NAME two before),
    master/NAME, buffers/NAME and optimizer/KEY/NAME. `values` holds for each NAME the plain
    numbers of its "state" in the optimizer and the hyperparameters of its "group".
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)


class DamageError(MismatchError):
    """A checkpoint is not as it was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of a checkpoint."""

    name: str
    bytes: int
    sha256: str
    stage: int
    replica: int
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is of, and its files."""

    schema: int
    step: int  # updates done
    items: int  # microbatches of data used up by all replicas together
    seed: int
    schedule: str
    depth: int
    width: int
    microbatch: int
    microbatches: int  # per update
    model: Model
    tied: tuple[tuple[str, ...], ...]
    files: tuple[File, ...]

    def items_of(self, microbatch: int) -> int:
        """The items of data used up, in microbatches of another size."""
        return self.items * self.microbatch // microbatch

    def differs(self, plan: Plan, seed: int) -> str:
        """Why a run of a plan cannot go on from here."""
        was, now = self.model, plan.model
        if was.sha256 != now.sha256:
            return (
                f"is of another model file (SHA-256 {was.sha256[:12]}..., the plan's "
                f"{now.sha256[:12]}...); p2bw export and --weights take over its weights alone"
            )
        if (was.factory, was.settings) != (now.factory, now.settings):
            theirs = {"factory": was.factory, **was.settings}
            ours = {"factory": now.factory, **now.settings}
            return f"is of {_less(theirs, ours)}; the plan is of {_less(ours, theirs)}"
        if self.seed != seed:
            return f"is of a run with --seed {self.seed}, from which its data follow; give that"
        if self.items * self.microbatch % plan.microbatch:
            return (
                f"has used up {self.items} microbatches of {self.microbatch} samples, no whole "
                f"number of {plan.microbatch}; compile with --microbatch {self.microbatch}"
            )
        return ""


def _less(settings: Mapping[str, object], known: Mapping[str, object]) -> str:
    shared = known.items()
    more = [f"{name}={value!r}" for name, value in settings.items() if (name, value) not in shared]
    return ", ".join(more) or "no such settings"


def commits(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first; it is not said that they are whole."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in paths if re.fullmatch(r"step-\d{8}", p.name)), reverse=True)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the state of a name is: the file, the name there, and its keys."""

    file: File
    name: str
    keys: list[str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint, whose manifest is as it was written."""

    folder: Path
    manifest: Manifest

    def sources(self, tied: Iterable[Sequence[str]], replica: int = 0) -> dict[str, Source]:
        """Where the state of each name is, a tied parameter's under all of its names.

        What several stages hold is taken from the first. A replica has its own buffers; one more
        than there were takes those of the last.
        """
        found: dict[str, Source] = {}
        replica = min(replica, self.manifest.width - 1)
        for file in sorted(self.manifest.files, key=lambda file: (-file.replica, file.stage)):
            here: dict[str, Source] = {}
            for key, name in _tensors(file) if file.replica in (0, replica) else ():
                here.setdefault(name, Source(file, name, [])).keys.append(key)
            found = here | found
        for names in tied:
            if known := next((found[name] for name in names if name in found), None):
                found |= dict.fromkeys(names, known)
        return found

    def read_stage(self, module: nn.Module, plan: Plan, replica: int, seed: int) -> StageState:
        """What a stage needs to go on, which is not changed; it must be of the same model and data.

        A buffer outside the module's state_dict may be missing: it may be a constant of the stage's
        code, which is not taken over to another size of microbatch as it can depend on it.
        """
        if wrong := self.manifest.differs(plan, seed):
            raise MismatchError(f"{self.folder} {wrong}")
        sources = self.sources((tied.names for tied in plan.tied), replica)
        kept = module.state_dict(keep_vars=True).keys()
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        if missing := sorted(name for name in tensors if name in kept and name not in sources):
            raise MismatchError(f"{self.folder} lacks {', '.join(missing[:9])} of the model")
        if self.manifest.microbatch != plan.microbatch:
            tensors = {name: tensor for name, tensor in tensors.items() if name in kept}
        state = self.read({name: sources[name] for name in tensors if name in sources})
        for kind, name in itertools.product(KINDS, tensors):
            found, want = state.tensors.get(f"{kind}/{name}"), tensors[name]
            if found is not None and (found.shape, found.dtype) != (want.shape, want.dtype):
                raise MismatchError(
                    f"{self.folder} has {name} as {describe(tuple(found.shape), found.dtype)}, "
                    f"the model as {describe(tuple(want.shape), want.dtype)}"
                )
        return state

    def read(self, sources: Mapping[str, Source]) -> StageState:
        """The state of some names, once the files that it is in have the right sums."""
        state = StageState()
        files = {source.file.name: source.file for source in sources.values()}
        for file in files.values():
            self.verify(file)
        for file in files.values():
            try:
                with safe_open(self.folder / file.name, framework="pt") as content:
                    values = json.loads(content.metadata()["p2bw"])
                    for name, source in sources.items():
                        for key in source.keys if source.file == file else ():
                            tensor = content.get_tensor(f"{key}/{source.name}")
                            state.tensors[f"{key}/{name}"] = tensor
                            if source.name in values:
                                state.values[name] = values[source.name]
            except (SafetensorError, LookupError, TypeError, ValueError) as error:
                raise DamageError(f"{self.folder / file.name} is no such file: {error}") from None
        return state

    def verify(self, file: File) -> None:
        """Compare a file with its sum; DamageError if it is another."""
        digest, size, path = hashlib.sha256(), 0, self.folder / file.name
        try:
            with path.open("rb") as content:
                while block := content.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error.strerror}") from None
        if size != file.bytes:
            raise DamageError(f"{path} has {size} bytes of {file.bytes}")
        if digest.hexdigest() != file.sha256:
            raise DamageError(f"{path} is not as it was written: its SHA-256 differs")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest; DamageError if it is not what was committed."""
    path = folder / MANIFEST
    try:
        text, mark = path.read_bytes(), (folder / MARK).read_bytes()
    except OSError as error:
        raise DamageError(f"{error.filename} cannot be read: {error.strerror}") from None
    if hashlib.sha256(text).hexdigest().encode() != mark:
        raise DamageError(f"{path} is not as it was written: its SHA-256 differs")
    try:
        value = json.loads(text)
        schema = value.get("schema") if isinstance(value, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise MismatchError(f"{folder} has schema {schema}, this version reads up to {SCHEMA}")
        manifest: Manifest = read_value(Manifest, value, "")
        _check(manifest)
    except (BadValueError, ValueError, RecursionError) as error:
        raise DamageError(f"{path} is no manifest: {error}") from None
    return Checkpoint(folder, manifest)


def _check(manifest: Manifest) -> None:
    """What its types do not say."""
    names = [file.name for file in manifest.files]
    if len(set(names)) < len(names) or not all(map(_FILE.fullmatch, names)):
        raise BadValueError("its files have other names than a checkpoint's")
    if not all(_TENSOR.fullmatch(name) for file in manifest.files for name in file.tensors):
        raise BadValueError("its tensors have other names than a checkpoint's")
    if not min(manifest.microbatch, manifest.microbatches, manifest.width, manifest.depth):
        raise BadValueError("a size is zero")


def _tensors(file: File) -> Iterator[tuple[str, str]]:
    for tensor in file.tensors:
        if match := _TENSOR.fullmatch(tensor):
            yield match[1], match[2]
