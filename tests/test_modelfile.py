import itertools
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2bw.compiler.optimizer_state import optimizer_bytes
from p2bw.compiler.program import Attribute, TensorType
from p2bw.contract.errors import ModelError, UsageError
from p2bw.modelfile.load import flatten_microbatch, load_model_file, parse_settings
from p2bw.modelfile.microbatch import map_tensors

GOOD = """
import torch
from torch import nn

def model(width=4, bias=True):
    return nn.Linear(8, width, bias=bias)

def inputs(batch_size):
    return (torch.randn(batch_size, 8),)

def targets(batch_size):
    return (torch.randn(batch_size, 4),)

def loss(outputs, wanted):
    return ((outputs - wanted) ** 2).mean()
"""


@pytest.fixture
def write(tmp_path):
    def _write(text, name="net.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


def refused(path, **options):
    with pytest.raises(ModelError) as caught:
        load_model_file(path, **options)
    return str(caught.value)


def test_step_of_a_good_file(write):
    file = load_model_file(write(GOOD), settings={"width": 4})
    model, inputs, targets = file.model(), file.inputs(3), file.targets(3)
    assert model.training
    loss = file.call(model, inputs, targets)
    assert torch.equal(loss, ((model(*inputs) - targets[0]) ** 2).mean())
    assert isinstance(file.optimizer(model.named_parameters()), torch.optim.AdamW)
    assert file.scheduler(file.optimizer(model.named_parameters())) is None


def test_an_optimizer_is_given_names_if_it_asks_for_them(write):
    by_name = """
def optimizer(named_parameters):
    named = dict(named_parameters)
    return torch.optim.SGD([{"params": [named["weight"]]}, {"params": [named["bias"]], "lr": 7.0}])
"""
    file = load_model_file(write(GOOD + by_name))
    model = file.model()
    groups = file.optimizer(model.named_parameters()).param_groups
    assert [group["lr"] for group in groups] == [1e-3, 7.0]
    assert [group["params"][0] for group in groups] == list(model.parameters())
    file = load_model_file(write(GOOD + "def optimizer(p):\n    return torch.optim.SGD(p)\n"))
    (group,) = file.optimizer(model.named_parameters()).param_groups
    assert group["params"] == list(model.parameters())


def test_state_that_depends_on_the_names_is_counted_at_its_largest(write):
    text = (
        GOOD.replace("return nn.Linear(8, width, bias=bias)", "return twins()")
        + """
def twins():
    return nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})

def optimizer(named_parameters):
    named = list(named_parameters)
    assert {n for n, _ in named} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    groups = [{"params": [p], "momentum": 0.9 * (name[0] == "b")} for name, p in named]
    return torch.optim.SGD(groups, lr=0.1)
"""
    )
    file = load_model_file(write(text))
    kinds = {"weight": TensorType((8, 8), torch.float32), "bias": TensorType((8,), torch.float32)}
    parameters = [
        Attribute((f"{module}.{name}",), kind, trainable=True)
        for module in "ab"
        for name, kind in kinds.items()
    ]
    assert optimizer_bytes(file, parameters) == {kinds["weight"]: 256, kinds["bias"]: 32}


def test_an_optimizer_that_needs_a_closure_is_refused(write):
    text = GOOD + "\ndef optimizer(params):\n    return torch.optim.LBFGS(params)\n"
    file = load_model_file(write(text))
    with pytest.raises(ModelError, match=r"LBFGS, whose step\(\) computes the loss again"):
        file.optimizer(file.model().named_parameters())


def test_a_model_may_return_its_loss_or_an_output_that_holds_it(write):
    text = """
import torch
from types import SimpleNamespace
from torch import nn

class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(3))

    def forward(self, x):
        loss = (self.weight * x).sum()
        kinds = {"tensor": loss, "object": SimpleNamespace(loss=loss), "dict": {"loss": loss}}
        return kinds.get(self.kind)

def model(kind):
    return Net(kind)

def inputs(batch_size):
    return torch.ones(batch_size, 3)
"""
    path = write(text)
    for kind in ("tensor", "object", "dict"):
        file = load_model_file(path, settings={"kind": kind})
        assert file.targets(2) is None
        assert file.call(file.model(), file.inputs(2), None) == 6
    file = load_model_file(path, settings={"kind": "nothing"})
    with pytest.raises(ModelError, match=r"the model returned no loss"):
        file.call(file.model(), file.inputs(2), None)


def test_inputs_by_name(write):
    text = GOOD.replace("(torch.randn(batch_size, 8),)", "{'input': torch.randn(batch_size, 8)}")
    file = load_model_file(write(text))
    assert file.call(file.model(), file.inputs(2), file.targets(2)).shape == ()


def test_neighbours_can_be_imported_early_and_late_and_shadow_nothing(write, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write("raise RuntimeError('a stray file')", "torch.py")
    write("raise RuntimeError('a stray file')", "re.py")
    write("width = 5", "early_neighbour_of_net.py")
    write("height = 7", "late_neighbour_of_net.py")
    text = "import re, early_neighbour_of_net\n" + GOOD
    text = text.replace("    return nn", "    import late_neighbour_of_net as late\n    return nn")
    file = load_model_file(write(text.replace("width=4", "width=early_neighbour_of_net.width")))
    assert file.model().out_features == 5


def test_an_imported_module_is_no_function_of_the_file(write):
    file = load_model_file(write("import json as data\n" + GOOD))
    assert next(file.data(2, seed=0))[1][0].shape == (2, 4)


def test_two_files_of_one_name_live_side_by_side(tmp_path):
    files = []
    for width in (3, 5):
        path = tmp_path / str(width) / "net.py"
        path.parent.mkdir()
        path.write_text(GOOD.replace("width=4", f"width={width}"))
        files.append(load_model_file(path))
    assert [file.model().out_features for file in files] == [3, 5]
    assert files[0].sha256() != files[1].sha256()


def test_a_file_edited_in_place_is_run_anew(write):
    assert load_model_file(write(GOOD)).model().out_features == 4
    assert load_model_file(write(GOOD.replace("width=4", "width=6"))).model().out_features == 6


def test_prints_of_the_model_file_do_not_reach_stdout(write, capsys):
    text = "print('loading')\n" + GOOD.replace(
        "    return nn", "    print('making')\n    return nn"
    )
    load_model_file(write(text)).model()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "loading\nmaking\n")


def test_no_such_file_is_a_usage_error(tmp_path, write):
    write(GOOD, "network.py")
    with pytest.raises(UsageError, match=r"no such file: .*netwrk.py; did you mean .*network.py"):
        load_model_file(tmp_path / "netwrk.py")
    with pytest.raises(UsageError, match="is a directory"):
        load_model_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "net.py is empty"),
        ("def model(:\n    pass", "net.py:1: SyntaxError: invalid syntax"),
        ("import torch\n\nx = 1 / 0\n", "net.py:3: importing net.py raised ZeroDivisionError"),
        ("import sys\nsys.exit(4)\n", r"net.py:2: importing net.py called sys.exit\(4\)"),
        ("import no_such_module_at_all\n", "net.py:1: importing net.py raised ModuleNotFoundError"),
        (
            "def gpt(): ...\ndef vit(): ...",
            r"no model\(\); it has gpt, vit: name one as net.py:gpt",
        ),
        ("model = 3", "model is an int, not a function"),
        ("def model(): ...", r"net.py has no inputs\(batch_size\)"),
        (GOOD.replace("def targets", "def target"), r"loss\(outputs, wanted\) but no targets"),
        (GOOD.replace("def loss", "def lost"), r"targets\(\) but no loss"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_when_it_is_loaded(write, text, message):
    path = write(text)
    with pytest.raises(ModelError, match=message):
        load_model_file(path)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "net.py"
    path.write_bytes(b"name = 'caf\xe9'\n")
    assert "net.py is not UTF-8 text" in refused(path)
    path.write_bytes(b"a\0b")
    assert "net.py" in refused(path)


def test_settings_must_fit_the_factory(write):
    path = write(GOOD)
    assert "has no setting 'widht'; did you mean width?" in refused(path, settings={"widht": 3})
    needs = write(GOOD.replace("width=4", "width"))
    assert "missing a required argument: 'width'" in refused(needs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return nn.Linear(8, width, bias=bias)", "return 3", r"model\(\) returned an int, not a"),
        ("return nn.Lin", "return nn.Line", r"net.py:6: model\(\) raised AttributeError"),
        ("(torch.randn(batch_size, 8),)", "[object()]", r"inputs\(2\): holds an object"),
        ("torch.randn(batch_size, 4)", "missing", r"net.py:12: targets\(2\) raised NameError"),
    ],
)
def test_failures_of_the_files_functions_name_the_line(write, old, new, message):
    file = load_model_file(write(GOOD.replace(old, new)))
    with pytest.raises(ModelError, match=message):
        (file.model(), file.inputs(2), file.targets(2))


def test_a_failure_in_a_neighbour_is_named_there(write):
    write("def helper():\n    raise ValueError('odd width')\n", "helper_of_net.py")
    text = "import helper_of_net\n" + GOOD.replace(
        "return nn", "return helper_of_net.helper() or nn"
    )
    file = load_model_file(write(text))
    with pytest.raises(ModelError, match=r"^helper_of_net.py:2: model\(\) raised .*odd width\n"):
        file.model()


def test_the_factory_runs_before_the_inputs(write):
    text = GOOD.replace("    return nn", "    global size\n    size = width\n    return nn")
    file = load_model_file(write(text.replace("(batch_size, 4)", "(batch_size, size)")))
    assert file.targets(3)[0].shape == (3, 4)


def test_synthetic_data_depends_on_seed_and_index_alone(write):
    file = load_model_file(write(GOOD))
    before = torch.get_rng_state()
    first = list(itertools.islice(file.data(2, seed=7), 3))
    torch.rand(5)
    second = list(itertools.islice(file.data(2, seed=7), 3))
    other = next(file.data(2, seed=8))
    for (a, b), (c, d) in zip(first, second, strict=True):
        assert torch.equal(a[0], c[0])
        assert torch.equal(b[0], d[0])
    assert not torch.equal(first[0][0][0], first[1][0][0])
    assert not torch.equal(first[0][0][0], other[0][0])
    torch.set_rng_state(before)


def test_the_users_data_may_end(write):
    text = GOOD + "\ndef data(batch_size, seed):\n    yield from [(inputs(2), targets(2))] * seed\n"
    file = load_model_file(write(text))
    assert len(list(file.data(2, seed=3))) == 3
    bad = load_model_file(write(text.replace("(inputs(2), targets(2))", "inputs(2)")))
    with pytest.raises(ModelError, match=r"data\(\) yielded a tuple as microbatch 0"):
        next(bad.data(2, seed=3))


def test_settings_are_typed():
    items = ["a=1", "b=-2.5e-3", "c=True", "d=none", "e=gelu", "f='3'", "g=a=b", "a=2"]
    expected = {"a": 2, "b": -2.5e-3, "c": True, "d": None, "e": "gelu", "f": "3", "g": "a=b"}
    assert parse_settings(items) == expected


@pytest.mark.parametrize("item", ["a", "=1", "1a=2", "a b=1", "a=nan", "a=1e999"])
def test_bad_settings_are_usage_errors(item):
    with pytest.raises(UsageError, match=f"--set {item}"):
        parse_settings([item])


nested = st.recursive(
    st.integers(0, 9).map(torch.tensor) | st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(nested, nested)
def test_flattened_tensors_put_back_give_the_microbatch(inputs, targets):
    feed = iter(flatten_microbatch(inputs, targets))
    rebuilt = map_tensors((inputs, targets), lambda name, old: next(feed))
    assert next(feed, None) is None
    assert repr(rebuilt) == repr((inputs, targets))
