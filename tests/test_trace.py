import gc
import keyword
import subprocess
import sys

import pytest
import torch
from corpus import CORPUS, ROOT
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.interpret import interpret
from p2bw.compiler.program import TensorType
from p2bw.compiler.trace import trace
from p2bw.contract.errors import ModelError
from p2bw.modelfile import build as building
from p2bw.modelfile.load import flatten_microbatch, load_model_file

HEAD = """\
import math
import random
import torch
import torch.nn.functional as F
from torch import nn


def inputs(batch_size):
    return (torch.randn(batch_size, 8),)


def targets(batch_size):
    return (torch.randn(batch_size, 8),)


def loss(outputs, wanted):
    return F.mse_loss(outputs, wanted)


"""
FIRST = HEAD.count("\n") + 1  # the line after HEAD


@pytest.fixture
def program_of(tmp_path):
    """program_of(text): the file HEAD + text, and its Program for two samples."""

    def load(text, head=HEAD, **settings):
        path = tmp_path / "net.py"
        path.write_text(head + text)
        file = load_model_file(path, settings=settings)
        return file, trace(file, 2)

    return load


def step(file, run, batch_size=2):
    """Loss, gradients and buffers after one step of a freshly built model, all seeds fixed."""
    torch.manual_seed(0)
    model = file.model()
    inputs, targets = file.inputs(batch_size), file.targets(batch_size)
    torch.manual_seed(1)
    loss = run(model, inputs, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, dict(model.named_buffers())


def assert_equals_eager(file, program, batch_size=2):
    def by_graph(model, inputs, targets):
        return interpret(program, model, flatten_microbatch(inputs, targets))

    eager, graph = step(file, file.call, batch_size), step(file, by_graph, batch_size)
    for a, b in zip(eager, graph, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def assert_well_formed(program):
    program.graph.lint()
    names = [node.name for node in program.graph.nodes]
    assert all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    assert list(program.inputs) == [
        node.name for node in program.graph.nodes if node.op == "placeholder"
    ]
    attributes = {**program.parameters, **program.buffers, **program.constants}
    read = [node.target for node in program.graph.nodes if node.op == "get_attr"]
    assert len(read) == len(set(read))
    assert set(read) <= set(attributes)
    assert all(type(tensor) is torch.Tensor for tensor in program.constants.values())
    assert program.facts.keys() == set(names)
    for node in program.compute_nodes:
        assert isinstance(node.target, OpOverload) or node.target.__name__ == "getitem"
        assert "_assert" not in str(node.target)
        assert not program.facts[node.name].source.startswith(("/", "trace", "modelfile"))


@pytest.mark.parametrize("architecture", CORPUS, ids=lambda a: a.name)
def test_examples_equal_eager_bit_for_bit(architecture):
    if architecture.name.startswith("hf_"):
        pytest.importorskip("transformers")
    file = load_model_file(architecture.path, architecture.factory)
    program = trace(file, architecture.batch)
    assert_well_formed(program)
    assert all(program.facts[node.name].source for node in program.compute_nodes)
    assert_equals_eager(file, program, architecture.batch)


def test_names_scopes_and_sources():
    program = trace(load_model_file(ROOT / "examples" / "gpt.py", "tiny", {"layers": 2}), 2)
    assert {name: str(kind) for name, kind in program.inputs.items()} == {
        "tokens": "i64[2, 64]",
        "labels": "i64[2, 64]",
    }
    tied = program.parameters["wte.weight"]
    assert tied.names == ("wte.weight", "head.weight")
    assert tied.trainable
    assert tied.type == TensorType((256, 64), torch.float32)
    (node,) = (n for n in program.graph.nodes if n.target == "h.1.ln_2.weight")
    assert node.name == "h_1_ln_2_weight"
    facts = [program.facts[n.name] for n in program.compute_nodes]
    inner = [f.scopes for f in facts if f.scopes and f.scopes[-1].path == "h.1.ln_2"]
    assert [s.path for s in inner[0]] == ["", "h.1", "h.1.ln_2"] or len(inner[0]) >= 3
    assert inner[0][0].type_name == "gpt.GPT"
    assert program.facts[program.loss.name].scopes == ()
    lines = (ROOT / "examples" / "gpt.py").read_text().splitlines()
    file, _, number = program.facts[program.loss.name].source.partition(":")
    assert file == "gpt.py"
    assert "F.cross_entropy(" in lines[int(number) - 1]


def test_every_module_call_is_a_scope_of_its_own(program_of):
    _, program = program_of("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        return self.twice(self.twice(x))


def model():
    return Net()
""")
    scopes = [program.facts[n.name].scopes for n in program.compute_nodes]
    assert [(s[-1].path, s[-1].call) for s in scopes if s][:2] == [("twice", 0), ("twice", 1)]


def test_regions_are_flattened(program_of):
    file, program = program_of("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.fc(x)
        with torch.no_grad():
            scale = x.abs().mean()
            with torch.enable_grad():
                y = x.sin()
            torch.set_grad_enabled(True)
        with torch.autocast("cpu", enabled=False):
            y = y.cos()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.fc(y)
            with torch.no_grad():
                z = z + self.fc(x)
            with torch.autocast("cpu", enabled=False):
                z = self.fc(z.float())
        return z * scale


def model():
    return Net()
""")
    context = [(str(n.target), program.facts[n.name].context) for n in program.compute_nodes]
    cast = "autocast(bfloat16)"
    assert [c for c in context if c[0] in ("aten.linear.default", "aten.abs.default")] == [
        ("aten.linear.default", ()),
        ("aten.abs.default", ("no_grad",)),
        ("aten.linear.default", (cast,)),
        ("aten.linear.default", ("no_grad", cast)),
        ("aten.linear.default", ()),
    ]
    assert ("aten.sin.default", ()) in context
    assert ("aten.cos.default", ()) in context
    assert_well_formed(program)
    assert_equals_eager(file, program)


STATE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.unused = nn.Linear(3, 3)
        self.fc.bias.requires_grad_(False)
        self.table = torch.linspace(0, 1, 8)
        self.tables = [torch.arange(8.0)]
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("scale", torch.ones(8), persistent=False)
        self.register_buffer("also", self.scale, persistent=False)

    def forward(self, x):
        x = F.relu(self.norm(self.fc(x)), inplace=True)
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        dead = x.exp() + 1
        assert dead.shape == x.shape
        y = x * self.scale + self.table - self.tables[0] + torch.tensor(0.5) + self.also
        y[:, 0] = 0
        return y - self.mean


def model():
    return Net()
"""


def test_state_constants_and_dead_code(program_of):
    file, program = program_of(STATE)
    assert_well_formed(program)
    assert_equals_eager(file, program)
    assert not program.parameters["fc.bias"].trainable
    assert "unused.weight" in program.parameters
    assert program.buffers["mean"].persistent
    assert not program.buffers["scale"].persistent
    assert program.buffers["scale"].names == ("scale", "also")
    generated = {f"constant_{i}" for i in range(len(program.constants) - 1)}
    assert program.constants.keys() == {"table", *generated}
    assert torch.equal(program.constants["table"], torch.linspace(0, 1, 8))
    targets = [str(n.target) for n in program.compute_nodes]
    assert "aten.exp.default" not in targets
    assert not any("lift_fresh" in t or "detach_" in t for t in targets)


def test_a_copy_of_a_constant_that_is_written_stays(program_of):
    file, program = program_of("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        step = torch.tensor([1.0, 2.0])
        step.view(2)[0] += 1
        return self.fc(x) * step[0]


def model():
    return Net()
""")
    assert_equals_eager(file, program)
    assert_equals_eager(file, program)


NEEDS_VALUES = """
class Net(nn.Module):
    def __init__(self, size):
        super().__init__()
        rates = torch.linspace(0, 0.5, 3).tolist()
        self.rate = rates[-1] + torch.arange(4).sum().item()
        self.fc = nn.Linear(8, 8)
        big = torch.empty(size).fill_(2.0)
        self.table = big.cumsum(0)[:8]
        self.number = {number}

    def forward(self, x):
        return self.fc(x) * self.rate * self.number + self.table


def model(size=8):
    return Net(size)
"""


@pytest.mark.parametrize("number", ["1.0", "float(big.sum())"])
@pytest.mark.parametrize("size", [8, 100_000])
def test_constructors_may_use_values(program_of, number, size):
    file, program = program_of(NEEDS_VALUES.replace("{number}", number), size=size)
    assert_equals_eager(file, program)


def test_a_large_model_that_needs_values_is_refused(program_of, monkeypatch):
    monkeypatch.setattr(building, "REAL_BYTES", 100)
    text = NEEDS_VALUES.replace("{number}", "float(big.sum())")
    with pytest.raises(ModelError, match=r"net.py:\d+: model\(\) raised .*\n.*\n.*register_buffer"):
        program_of(text, size=100_000)
    with pytest.raises(ModelError, match=r"table, f32.*has no value"):
        program_of(NEEDS_VALUES.replace("{number}", "1.0"), size=100_000)


def test_a_model_on_meta_is_never_materialised(program_of):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if type(out) is torch.Tensor and not out.is_meta:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    text = """
def model():
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(8, 2, 1 << 20, batch_first=True) for _ in range(2)]
        net = nn.Sequential(nn.Linear(8, 1 << 36), nn.Linear(1 << 36, 8), *layers)
    net[0].weight.requires_grad_(False)
    return net


def inputs(batch_size):
    return (torch.randn(batch_size, 3, 8),)


def targets(batch_size):
    return (torch.randn(batch_size, 3, 8),)
"""
    with Watch():
        _, program = program_of(text)
    assert largest < 1 << 20
    assert program.parameters["0.weight"].type.bytes == 32 << 36
    assert not program.parameters["0.weight"].trainable
    assert program.parameters["2.linear1.weight"].trainable


def test_copied_layers_and_containers(program_of):
    file, program = program_of("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=True)
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(2)])
        self.weight = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        x = self.encoder(x.unsqueeze(1).expand(-1, 3, -1))
        x, _ = self.lstm(x)
        return self.weight(x.mean(1)) * self.scales[0] + self.scales[1]


def model():
    return Net()
""")
    assert_well_formed(program)
    assert_equals_eager(file, program)
    assert "encoder.layers.1.linear1.weight" in program.parameters


def test_nested_inputs_with_plain_values(program_of):
    file, program = program_of("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, pair, *, input, mode, scale=1):
        assert mode == "double"
        return self.fc(pair["left"] + pair["right"][0]) * input * scale


def model():
    return Net()


def inputs(batch_size):
    left, right, given = torch.randn(3, batch_size, 8)
    pair = {"left": left, "right": [right, None]}
    return {"pair": pair, "input": given, "mode": "double", "scale": 2}
""")
    assert list(program.inputs) == ["left", "right", "input_1", "wanted"]
    assert_equals_eager(file, program)


NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.count = torch.zeros(8)

    def forward(self, x):
        y = self.fc(x)
        return BODY


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def model():
    return Net()
"""
AT = f"^net.py:{FIRST + 9}: "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y if y.sum() > 0 else -y", AT + "the model decides by the values.*\n.*return y if"),
        ("y * float(y.detach().numpy().max())", AT + "the model decides by the values"),
        ("y + y[y > 0].sum()", AT + "the result depends on the values"),
        ("y * y.max().item()", AT + "the result depends on the values"),
        ("y + torch.ones(7)", AT + "the training step of model.*\n.*\n.*forward.x.*x: f32.2, 8"),
        ("Round.apply(y)", AT + "Round is a torch.autograd.Function"),
        ("y + self.count.add_(1)", AT + "forward changes the tensor count"),
        ("y * torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,))", AT + "the model uses cond"),
        ("y * random.random()", "^net.py: forward draws numbers from Python's random"),
        ("(y, y)", r"^net.py:17: the training step of model\(\) raised AttributeError.*\n.*mse"),
        ("y.detach()", "^net.py: the loss does not depend on any trainable parameter"),
        ("y + torch.autograd.grad(y.tanh().sum(), x)[0]", "net.py"),
    ],
)
def test_what_cannot_be_traced_is_one_clear_message(program_of, body, message, capfd):
    with pytest.raises(ModelError, match=message):
        program_of(NET.replace("BODY", body))
    assert capfd.readouterr() == ("", "")


def test_an_assertion_on_values_is_said_to_be_one(program_of):
    net = NET.replace("return BODY", "assert y.isfinite().all()\n        return y")
    with pytest.raises(ModelError, match=AT + "an assertion on the values.*leave it out"):
        program_of(net)


def test_the_whole_of_a_short_message_is_shown(program_of):
    net = NET.replace("return BODY", 'raise ImportError("no scipy, get it:\\n pip install scipy")')
    with pytest.raises(ModelError, match="ImportError: no scipy, get it: pip install scipy"):
        program_of(net)


def test_who_calls_the_compiler_is_no_source_of_the_model(program_of):
    _, program = program_of("""
def model():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
""")
    sources = {node.name: program.facts[node.name].source for node in program.compute_nodes}
    assert sources["linear"] == sources["linear_1"] == ""  # torch's own code calls torch's own
    assert sources[program.loss.name].startswith("net.py:")


def test_autocast_for_another_device_is_refused(program_of):
    body = 'torch.autocast("cuda", dtype=torch.bfloat16)(self.fc)(x)'
    with pytest.raises(ModelError, match=AT + "autocast for a device"):
        program_of(NET.replace("BODY", body))


@pytest.mark.parametrize("returned", ["F.mse_loss(outputs, wanted, reduction='none')", "wanted"])
def test_a_loss_must_be_a_scalar(program_of, returned):
    head = HEAD.replace("F.mse_loss(outputs, wanted)", returned)
    with pytest.raises(ModelError, match=r"must be a scalar, but loss\(\) .* \[2, 8\]"):
        program_of(NET.replace("BODY", "y"), head=head)


def test_random_state_is_left_alone(program_of):
    before = torch.get_rng_state()
    program_of("\ndef model():\n    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))\n")
    assert torch.equal(torch.get_rng_state(), before)


def test_tracing_twice_gives_the_same_program(program_of):
    texts = []
    for _ in range(2):
        _, program = program_of(STATE)
        texts.append([str(program.graph), repr(dict(program.facts)), repr(program.parameters)])
        gc.collect()
    assert texts[0] == texts[1]


def test_a_model_of_175_billion_parameters_takes_little_memory():
    """In its own process, since peak memory is of a process."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from p2bw.compiler.trace import trace
        from p2bw.modelfile.load import load_model_file
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        settings = {"layers": 2, "width": 49152, "heads": 96}
        program = trace(load_model_file(Path(sys.argv[1]), "gpt3_175b", settings), 1)
        assert sum(p.type.bytes for p in program.parameters.values()) > 200 << 30
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after - before < 1 << 19, "more than 0.5 GiB"
    """
    path = ROOT / "examples" / "gpt.py"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=200)


CONVERTED = """
class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, 8)
        self.tied = nn.Linear(width, 8, bias=False)
        self.tied.weight = self.fc.weight
        self.wide = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(8)
        self.fc.half()  # of a tie, one module is converted first
        self.norm.double()

    def forward(self, x):
        wide = self.wide(x.to(self.wide.weight.dtype))
        return self.norm(self.fc(wide) + self.tied(wide)).float()


def model(width=16, dtype="float64"):
    return Net(width).to(getattr(torch, dtype))
"""


def test_a_model_is_converted_to_another_type(program_of):
    file, program = program_of(CONVERTED)
    assert_equals_eager(file, program)
    assert {p.type.dtype for p in program.parameters.values()} == {torch.float64}
    tied = program.parameters["fc.weight"]
    assert "tied.weight" in tied.names


def test_a_model_too_large_to_be_built_is_converted(program_of):
    _, program = program_of(CONVERTED, width=1 << 29, dtype="bfloat16")
    assert program.parameters["wide.weight"].type.dtype == torch.bfloat16
    assert program.parameters["wide.weight"].type.bytes == 2 * 8 << 29
