"""ONNX files that are broken or mean harm: one clear message, and no other file touched."""

import ast
import builtins
import functools
import keyword
import os
import pickle
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxfiles import mlp
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.onnx.importer import import_onnx
from p2bw.compiler.onnx.names import attribute, identifier
from p2bw.contract.errors import InputFileError, P2BWError, UsageError
from p2bw.modelfile.load import load_model_file

Edit = Callable[[onnx.ModelProto], None]


def edited(change: Edit) -> Callable[[Path], None]:
    """A good model with one thing changed."""

    def write(path: Path) -> None:
        model = onnx.load(str(mlp(path)))
        change(model)
        path.write_bytes(model.SerializeToString())

    return write


def node(op: str, **attributes: Any) -> Edit:
    """A model with one more node."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node.insert(1, helper.make_node(op, ["h"], ["extra"], **attributes))

    return change


def weight(change: Callable[[Any], None]) -> Edit:
    return lambda model: change(model.graph.initializer[0])


def external(location: str, offset: str = "0", length: str = "128") -> Edit:
    """The first weight (128 bytes) in another file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=value)

    return change


def dims(*sizes: int) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sizes)

    return change


def opset(version: int) -> Edit:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "r"


def _function(model: onnx.ModelProto) -> None:
    relu = helper.make_node("Relu", ["a"], ["b"])
    made = helper.make_function("own", "Mine", ["a"], ["b"], [relu], [helper.make_opsetid("", 20)])
    model.functions.append(made)
    model.opset_import.append(helper.make_opsetid("own", 1))


def _control(model: onnx.ModelProto) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["h"], ["b"])], "branch", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 8])],
    )  # fmt: skip
    flag = numpy_helper.from_array(np.array(True), "flag")
    model.graph.initializer.append(flag)
    model.graph.node.insert(
        1, helper.make_node("If", ["flag"], ["i"], then_branch=branch, else_branch=branch)
    )


def _strings(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"text"]))


def _sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor("places", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


def _open_width(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"


def _no_weights(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]))


def _no_inputs(model: onnx.ModelProto) -> None:
    del model.graph.input[:]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 4), np.float32), "x"))


def _only_integers(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("ArgMax", ["y"], ["i"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("i", TensorProto.INT64, [1, 2]))


def _two_unknown(model: onnx.ModelProto) -> None:
    for i, op in enumerate(["NonZero", "Unique", "NonZero"]):
        outputs = [f"e{i}"]
        model.graph.node.append(helper.make_node(op, ["h"], outputs))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model", "x")


class _Bomb:
    def __reduce__(self) -> Any:
        return exec, ("import builtins; builtins.canary = True",)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "garbage": (lambda p: p.write_bytes(bytes(range(256)) * 20), "not an ONNX model"),
    "text": (lambda p: p.write_text("import os\nos.abort()\n"), "not an ONNX model"),
    "zip": (zipped, "not an ONNX model"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(_Bomb())), "not an ONNX model"),
    "truncated": (lambda p: p.write_bytes(mlp(p).read_bytes()[:200]), "not "),
    "no nodes": (edited(lambda m: m.graph.ClearField("node")), "no graph with nodes"),
    "no weights": (edited(_no_weights), "nothing to train"),
    "integers only": (edited(_only_integers), "no output of floats"),
    "no inputs": (edited(_no_inputs), "no inputs"),
    "a cycle": (edited(_cycle), "not a valid ONNX model"),
    "an undefined input": (edited(lambda m: m.graph.node[1].input.__setitem__(0, "q")), "valid"),
    "an output made twice": (edited(lambda m: m.graph.node[1].output.__setitem__(0, "h")), "valid"),
    "short data": (edited(weight(lambda t: setattr(t, "raw_data", t.raw_data[:50]))), "needs 128"),
    "long data": (edited(weight(lambda t: setattr(t, "raw_data", t.raw_data * 2))), "needs 128"),
    "huge shape": (edited(dims(10**9, 10**9)), "bytes for its shape"),
    "overflowing shape": (edited(dims(2**62, 4)), "bytes for its shape"),
    "negative size": (edited(dims(-8, -4)), "negative size"),
    "opset 999": (edited(opset(999)), "opset 999"),
    "opset 5": (edited(opset(5)), "opset 5"),
    "no opset": (edited(lambda m: m.ClearField("opset_import")), "opset"),
    "foreign operators": (edited(node("Evil", domain="com.microsoft")), "not ONNX's own"),
    "own functions": (edited(_function), "functions of its own (Mine)"),
    "unknown operators": (edited(_two_unknown), "NonZero (2), Unique (1)"),
    "operators that are none": (edited(node("Exec")), "Exec"),
    "control flow": (edited(_control), "If (1)"),
    "strings": (edited(_strings), "STRING"),
    "sparse weights": (edited(_sparse), "sparse"),
    "two open sizes": (edited(_open_width), "--set width=128"),
    "data above": (edited(external("../secret.bin")), "own folder"),
    "data at a place": (edited(external("/etc/passwd")), "own folder"),
    "data by detour": (edited(external("a/../../secret.bin")), "own folder"),
    "data by backslash": (edited(external("..\\secret.bin")), "own folder"),
    "data by url": (edited(external("file://secret.bin")), "own folder"),
    "data in a symbolic link": (edited(external("link.bin")), "no plain file"),
    "data in a hard link": (edited(external("hard.bin")), "no plain file"),
    "data in a linked folder": (edited(external("linked/secret.bin")), "no plain file"),
    "data in a folder": (edited(external("folder")), "no plain file"),
    "data in a device": (edited(external("pipe")), "no plain file"),
    "data nowhere": (edited(external("nowhere.bin")), "not there"),
    "data too short": (edited(external("short.bin")), "needs 128"),
    "data before its start": (edited(external("data.bin", offset="-64")), "needs 128"),
    "data beyond its end": (edited(external("data.bin", offset=str(2**62))), "needs 128"),
    "data of another length": (edited(external("data.bin", length="4")), "needs 128"),
    "data with words for numbers": (edited(external("data.bin", offset="0x0")), "no number"),
}


@contextmanager
def opened() -> Iterator[list[str]]:
    """The files that Python code opens meanwhile."""
    _OPENED.clear()
    _WATCHING.append(True)
    try:
        yield _OPENED
    finally:
        _WATCHING.clear()


_OPENED: list[str] = []
_WATCHING: list[bool] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHING and event == "open" and isinstance(arguments[0], (str, bytes)):
        _OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


def neighbourhood(folder: Path) -> Path:
    """A folder for a model, with files around it that no model may touch; the model's path."""
    home = folder / "home"
    (home / "folder").mkdir(parents=True)
    secret = folder / "secret.bin"
    secret.write_bytes(bytes(256))
    (home / "link.bin").symlink_to(secret)
    (home / "linked").symlink_to(folder)
    os.link(secret, home / "hard.bin")
    os.mkfifo(home / "pipe")
    (home / "short.bin").write_bytes(bytes(100))
    (home / "data.bin").write_bytes(bytes(256))
    return home / "model.onnx"


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_a_clear_message(case: str, tmp_path: Path) -> None:
    path = neighbourhood(tmp_path)
    write, says = BAD[case]
    write(path)
    before = sorted(tmp_path.rglob("*"))
    with opened() as files, pytest.raises(InputFileError) as error:
        import_onnx(path, tmp_path / "out")
    message = str(error.value)
    assert says in message
    assert len(message) < 1000
    assert message.isprintable()
    assert str(tmp_path) not in message
    assert sorted(tmp_path.rglob("*")) == before
    touched = {name for name in files if name.startswith((str(tmp_path), "/etc"))}
    assert touched <= {str(path)}
    assert not hasattr(builtins, "canary")


def test_at_least_thirty_bad_files() -> None:
    assert len(BAD) >= 30


def test_a_path_that_is_no_file_is_a_mistake_of_usage(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.onnx"):
        with pytest.raises(UsageError):
            import_onnx(path, tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(InputFileError, match="no regular file"):
        import_onnx(tmp_path / "pipe.onnx", tmp_path / "out")


def test_external_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    path = neighbourhood(tmp_path)
    values = np.arange(64, dtype=np.float32)
    (path.parent / "data.bin").write_bytes(values.tobytes())
    edited(external("data.bin", offset="64"))(path)
    model = load_model_file(import_onnx(path, tmp_path / "out").file).model()
    assert torch.equal(model.first.weight.detach(), torch.arange(16, 48.0).view(8, 4))


def test_the_command_says_it_in_one_line_and_exits_6(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    edited(node("Evil", domain="<script>\n\x1b[31m"))(path)
    out = tmp_path / "artifact"
    done = CliRunner().invoke(
        app, ["compile", str(path), "--gpus", "2", "--out", str(out), "--quiet"]
    )
    assert done.exit_code == 6
    (line,) = done.stderr.splitlines()
    assert line.startswith("p2bw: model.onnx uses operators that are not ONNX's own")
    assert line.isprintable()
    assert done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


CODE = "import builtins; builtins.canary = True"
NASTY = (
    *("__class__", "__init__", "self", "forward", "torch", "nn", "F", "import", "None", "_", ""),
    *("0", "0.0", "..", "a..b", "a.0.b", "a.1", "x.weight", "weight", "training", "\uff41", "if"),
    f"x\n{CODE}\n", f'"); {CODE} #', f"'); {CODE} #", f'"""\n{CODE}\n"""', f"x: {CODE}",
    f"a\r{CODE}\r", "{0.__class__}", "⟦%0⟧", "⟦@x⟧", "⟦$0⟧", "\\", "\\\n", "\u2028", "a" * 300,
    "super", "parameters", "model", "inputs", "loss", "Tensor", "Path", "WEIGHTS", "x" + "." * 40,
    "../../x", "/etc/passwd", "state_dict", "register_buffer", "_modules", "T_destination",
)  # fmt: skip
names = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.builds("{}.{}".format, st.sampled_from(NASTY), st.sampled_from(NASTY)),
)
NAMES = st.lists(names, min_size=13, max_size=13)


@functools.cache
def _good(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(mlp(folder / "model.onnx")))


def renamed(path: Path, chosen: list[str]) -> None:
    """A model whose every name, of values, nodes, scopes and itself, is a chosen one."""
    model = onnx.ModelProto()
    model.CopyFrom(_good(path.parent))
    unique = dict.fromkeys(name or "empty" for name in chosen[:8])
    found = [*unique, *(f"spare{i}" for i in range(8 - len(unique)))]
    old = ["x", "h", "r", "y", *(tensor.name for tensor in model.graph.initializer)]
    new = dict(zip(old, found, strict=True))
    for item in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        item.name = new[item.name]
    model.graph.name, model.producer_name, model.doc_string = chosen[8], chosen[9], chosen[10]
    for place, item in enumerate(model.graph.node):
        item.input[:] = [new[name] for name in item.input]
        item.output[:] = [new[name] for name in item.output]
        item.name, item.doc_string = f"{chosen[8]}{place}", chosen[10]
        scopes, classes = ["", chosen[11], item.name], [chosen[12], chosen[9], "op"]
        for key, value in (("name_scopes", scopes), ("class_hierarchy", classes)):
            item.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=str(value))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = chosen[9]
    path.write_bytes(model.SerializeToString())


def check_names(folder: Path, chosen: list[str], *, train: bool) -> None:
    """Import a model with such names and run its file; with `train`, its gradients too."""
    path, out = folder / "model.onnx", folder / "out"
    renamed(path, chosen)
    try:
        made = import_onnx(path, out)
    except P2BWError:
        return  # the checker has rules of its own for names
    finally:
        assert not hasattr(builtins, "canary")
    source = made.file.read_text(encoding="utf-8")
    assert source.isascii()
    tree = ast.parse(source)
    imported = {
        alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
    }
    assert imported == {"hashlib", "torch", "torch.nn.functional"}
    file = load_model_file(made.file)
    assert not hasattr(builtins, "canary")
    if not train:
        return
    model = file.model()
    file.call(model, file.inputs(2), file.targets(2)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(list(model.parameters())) == 4
    assert not hasattr(builtins, "canary")
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "out"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory, where there is a place for that: thousands of small files are written there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("names")
        return
    with tempfile.TemporaryDirectory(dir=memory) as found:
        yield Path(found)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(chosen=NAMES)
def test_hostile_names_are_only_names(folder: Path, chosen: list[str]) -> None:
    check_names(folder, chosen, train=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None)
@given(chosen=NAMES)
def test_ten_thousand_hostile_names_are_only_names(folder: Path, chosen: list[str]) -> None:
    check_names(folder, chosen, train=False)


@given(st.one_of(names, st.text()))
def test_an_identifier_is_one(text: str) -> None:
    for found in (identifier(text), attribute(text)):
        assert found.isidentifier()
        assert found.isascii()
        assert not keyword.iskeyword(found)
        assert not found.startswith("_")
    assert not hasattr(torch.nn.Module(), attribute(text))
    assert not hasattr(builtins, identifier(text))
