"""Weights of a whole model in safetensors files, as Hugging Face and `p2bw run --save` write them.

Of a file only what is asked for is read, and its pages are let go of after each tensor.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from p2bw.contract.errors import InputFileError, MismatchError, UsageError

_INDEX = ".safetensors.index.json"
_SAMPLE = 1 << 16  # bytes
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it


class WeightFiles:
    """The tensors of a file, of a folder with one file, or of a folder with an index of several."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _find(path)  # name of a tensor -> the file that has it
        self.casts: set[tuple[str, str]] = set()  # dtypes in the file and in the model

    def values(
        self, model: nn.Module, stage: nn.Module, otherwise: Callable[[str, Tensor], Tensor]
    ) -> Callable[[str, Tensor], Tensor]:
        """What gives a stage the files' tensors, and buffers that they lack from elsewhere.

        A tied parameter may be there under any of its names.
        """
        names: dict[int, list[str]] = {}
        found: dict[str, str] = {}  # name in the model -> in the files
        for name, tensor in _named(model):
            names.setdefault(id(tensor), []).append(name)
        for aliases in names.values():
            if known := [alias for alias in aliases if alias in self.files]:
                found |= {alias: alias if alias in known else known[0] for alias in aliases}
        missing = [name for name, _ in stage.named_parameters() if name not in found]
        if missing:
            raise MismatchError(
                f"{self.path} lacks {_some(missing)}, which the model needs; it has "
                f"{_some(sorted(self.files.keys() - set(found.values()))) or 'nothing else'}. The "
                f"names must be those of model.state_dict()"
            )

        def value(name: str, tensor: Tensor) -> Tensor:
            return self._read(found[name], tensor) if name in found else otherwise(name, tensor)

        return value

    def _read(self, name: str, like: Tensor) -> Tensor:
        path = self.files[name]
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputFileError(f"{path}: cannot read {name}: {error}") from None
        if tensor.shape != like.shape:
            raise MismatchError(
                f"{path}: {name} is {list(tensor.shape)}, in the model {list(like.shape)}"
            )
        if tensor.dtype != like.dtype:
            self.casts.add((_dtype(tensor), _dtype(like)))
        return tensor


def fingerprint(path: Path) -> str:
    """What tells one set of weights from another, wherever it lies: of each file the size, what
    tensors it has, and a sample of its data, as reading all of them on each rank takes long."""
    digest = hashlib.sha256()
    for file in sorted(set(_find(path).values())):
        size = file.stat().st_size
        with file.open("rb") as data:
            header = min(int.from_bytes(data.read(8), "little"), _LONGEST)
            digest.update(f"{file.name} {size}".encode() + data.read(header + _SAMPLE))
            data.seek(max(0, size - _SAMPLE))
            digest.update(data.read(_SAMPLE))
    return digest.hexdigest()


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _find(path: Path) -> dict[str, Path]:
    if path.is_dir():
        indexes = sorted(path.glob(f"*{_INDEX}"))
        files = sorted(path.glob("*.safetensors"))
        if len(indexes) == 1:
            return _read_index(indexes[0])
        if indexes or len(files) != 1:
            raise InputFileError(
                f"{path} has {len(indexes)} indexes and {len(files)} safetensors files; name one "
                f"of them, or a folder with one index (model{_INDEX}) or one file"
            )
        path = files[0]
    if not path.is_file():
        raise UsageError(f"--weights {path}: no such file or folder")
    if path.name.endswith(_INDEX):
        return _read_index(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError) as error:
        raise InputFileError(f"{path} is not a safetensors file: {error}") from None


def _read_index(path: Path) -> dict[str, Path]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path} is not JSON: {error}") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise InputFileError(f"{path} has no weight_map from names of tensors to files")
    for file in sorted(set(files.values())):
        if Path(file).name != file or not (path.parent / file).is_file():
            raise InputFileError(f"{path} names {file!r}, which is no file beside it")
    return {name: path.parent / file for name, file in files.items()}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
