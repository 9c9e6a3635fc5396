"""Reading an ONNX file that nobody vouches for: refused with one message, or safe to translate.

The file is data. Its names reach generated code through names.py alone, and the files that it
refers to are opened only if they are plain ones inside its own folder and as large as it says.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from p2bw.contract.errors import InputFileError, UsageError

if TYPE_CHECKING:
    import onnx

LARGEST = (1 << 31) - 1  # bytes of one protobuf message
_MOST_NODES = 1_000_000
OPSETS = range(13, 27)  # those whose operators are tested

# ONNX's number of each type -> numpy's name for it; bfloat16 (16) is handled by its bits.
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
          10: "float16", 11: "float64", 16: "bfloat16"}  # fmt: skip
_BITS = {"bfloat16": "uint16"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: what it is, and how to get its values when they are needed."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    proto: Any  # onnx.TensorProto
    file: Path | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        return "float" in self.dtype

    def read(self) -> "np.ndarray[Any, Any]":
        """Its values; bfloat16 as the numbers that have its bits."""
        kind = np.dtype(_BITS.get(self.dtype, self.dtype)).newbyteorder("<")
        if self.file is not None and self.size:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size * kind.itemsize)
        elif self.proto.HasField("raw_data"):
            data = self.proto.raw_data
        else:
            from onnx import numpy_helper

            return np.asarray(numpy_helper.to_array(self.proto)).view(kind).reshape(self.shape)
        return np.frombuffer(data, kind).reshape(self.shape)


def import_package() -> None:
    """Say how to get the onnx package, which is an extra, where it is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise UsageError(
            "reading ONNX files needs the onnx package: pip install 'p2bw[onnx]'"
        ) from None


def read_model(path: Path) -> "onnx.ModelProto":
    """An ONNX model that the checker and our own limits have passed, its external data unread."""
    import_package()
    import onnx

    data = _read(path)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise InputFileError(f"{path.name} is not an ONNX model: {_line(error)}") from None
    if not model.ir_version or not model.graph.node:
        raise InputFileError(f"{path.name} is not an ONNX model: it has no graph with nodes")
    if len(model.graph.node) > _MOST_NODES:
        raise InputFileError(
            f"{path.name} has {len(model.graph.node):,} nodes; the limit is {_MOST_NODES:,}"
        )
    _check_domains(path, model)
    for tensor in _all_tensors(path, model.graph):
        stored(path, tensor)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's own, and those of C++ beneath it
        raise InputFileError(
            f"{path.name} is not a valid ONNX model: {_line(error, path)}"
        ) from None
    return model


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a directory; name the ONNX file in it")
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputFileError(f"{path.name} is no regular file")
        size = path.stat().st_size
        if not size:
            raise InputFileError(f"{path.name} is empty, not an ONNX model")
        if size > LARGEST:
            raise InputFileError(
                f"{path.name} has {size:,} bytes, and one ONNX file can have 2 GiB; save its "
                f"weights as external data"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _line(error: Exception, path: Path | None = None) -> str:
    """The first line with content of a foreign message, shortened, without control characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "unreadable")
    if path is not None:
        text = text.replace(str(path), path.name)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_domains(path: Path, model: "onnx.ModelProto") -> None:
    """Only the default domain, in an opset whose operators are tested."""
    if model.functions:
        names = sorted({quote(f.name) for f in model.functions})[:5]
        raise InputFileError(
            f"{path.name} defines functions of its own ({', '.join(names)}); inline them first, "
            f"with onnx.inliner.inline_local_functions(model)"
        )
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise InputFileError(f"{path.name} does not say which opset it uses, exactly once")
    if versions[0] not in OPSETS:
        raise InputFileError(
            f"{path.name} uses opset {versions[0]}; {OPSETS.start} to {OPSETS.stop - 1} can be "
            f"read, so export it again with opset_version=20"
        )
    foreign = Counter(
        f"{quote(n.domain)}:{quote(n.op_type)}"
        for n in model.graph.node
        if n.domain not in ("", "ai.onnx")
    )
    if foreign:
        raise InputFileError(
            f"{path.name} uses operators that are not ONNX's own: {counted(foreign)}; "
            f"export it without them"
        )


def counted(names: Mapping[str, int]) -> str:
    """Gelu (12), Loop (1)."""
    return ", ".join(f"{name} ({names[name]})" for name in sorted(names))


def quote(text: str) -> str:
    """A foreign string in a message."""
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return shown if shown.isidentifier() else ascii(shown)


def _all_tensors(path: Path, graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    if graph.sparse_initializer:
        raise InputFileError(f"{path.name} has sparse initializers; save it with dense ones")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def stored(path: Path, tensor: Any) -> Stored:
    """A tensor's description, checked against the bytes that there are."""
    name, shape = tensor.name, tuple(tensor.dims)
    what = f"{path.name}: tensor {quote(name)}"
    if tensor.data_type not in DTYPES:
        from onnx import TensorProto

        known = dict(zip(TensorProto.DataType.values(), TensorProto.DataType.keys(), strict=True))
        kind = known.get(tensor.data_type, str(tensor.data_type))
        raise InputFileError(f"{what} is of type {kind}, which cannot be trained or indexed with")
    if any(size < 0 for size in shape):
        raise InputFileError(f"{what} has a negative size in {list(shape)}")
    dtype = DTYPES[tensor.data_type]
    wanted = prod(shape) * np.dtype(_BITS.get(dtype, dtype)).itemsize
    if tensor.data_location == 1:
        file, offset = _external(path, tensor, what, wanted)
        return Stored(name, shape, dtype, tensor, file, offset)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != wanted:
            raise InputFileError(
                f"{what} needs {wanted:,} bytes for its shape {list(shape)}, and has "
                f"{len(tensor.raw_data):,}"
            )
    else:
        field = {1: "float_data", 7: "int64_data", 11: "double_data"}
        values = len(getattr(tensor, field.get(tensor.data_type, "int32_data")))
        if values != prod(shape):
            raise InputFileError(
                f"{what} needs {prod(shape):,} values for its shape {list(shape)}, and has "
                f"{values:,}"
            )
    return Stored(name, shape, dtype, tensor)


def _external(path: Path, tensor: Any, what: str, wanted: int) -> tuple[Path, int]:
    """File and offset of external data: a plain file inside the model's folder, large enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"{what} is in the file {quote(location)}"
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or location[0] in "/\\" or ".." in parts or ":" in location:
        raise InputFileError(f"{where}; external data must lie in the model's own folder")
    folder = os.path.realpath(path.parent)
    file = Path(folder, location)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(wanted)))
    except ValueError:
        raise InputFileError(f"{where}, with an offset or length that is no number") from None
    try:
        status = file.lstat()
    except (OSError, ValueError):
        raise InputFileError(f"{where}, which is not there") from None
    # A link, hard or symbolic, is another file's content under this name.
    plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if not plain or os.path.realpath(file) != str(file):
        raise InputFileError(f"{where}, which is no plain file inside the model's folder")
    if offset < 0 or length != wanted or offset + wanted > status.st_size:
        raise InputFileError(
            f"{where}: bytes {offset:,} to {offset + length:,} of {status.st_size:,}, and its "
            f"shape {list(tensor.dims)} needs {wanted:,}"
        )
    return file, offset
