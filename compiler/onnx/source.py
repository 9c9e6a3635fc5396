"""What a compilation starts from: the user's model file, or one made from an ONNX file."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from p2bw.contract.errors import UsageError
from p2bw.modelfile.load import Setting


@dataclass(frozen=True, slots=True)
class Source:
    """A model file to load, and what else belongs to it."""

    path: Path
    settings: Mapping[str, Setting]  # for its factory
    microbatch: int | None  # the user's, or the only one that there is
    weights: Path | None = None  # beside the model file, if that was made from an ONNX file


@contextmanager
def model_source(
    path: Path, factory: str, settings: Mapping[str, Setting], microbatch: int | None
) -> Iterator[Source]:
    """A model file as it is; for an ONNX file one in a temporary folder, until the context ends.

    Of an ONNX file the settings are the sizes of its open dimensions, by name.
    """
    if path.suffix.lower() != ".onnx":
        yield Source(path, settings, microbatch)
        return
    if factory != "model":
        raise UsageError(f"{path.name}:{factory}: an ONNX file has one model, and no factories")
    from p2bw.compiler.onnx.importer import import_onnx

    with tempfile.TemporaryDirectory(prefix="p2bw-") as scratch:
        made = import_onnx(path, Path(scratch), settings)
        if made.batch is not None and microbatch not in (None, made.batch):
            raise UsageError(
                f"--microbatch {microbatch}: {path.name} fixes the batch at {made.batch}; export "
                f"it with a batch dimension that is open, or leave --microbatch out"
            )
        yield Source(made.file, {}, made.batch or microbatch, made.weights)
