"""The user's hierarchy survives: containers, shared modules, contexts, names, frozen parts."""

import ast
import re
from pathlib import Path

import pytest
from staged import compare, cut, load, program_of, texts_of

from p2bw.compiler.split import split

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn


def inputs(batch_size):
    return (torch.randn(4, 8),)


def targets(batch_size):
    return (torch.randn(4, 8),)


def loss(outputs, target):
    return F.mse_loss(outputs, target)


def model():
    return Model()

"""


def emitted(body: str, tmp_path: Path, *, head: str = HEAD) -> str:
    """The whole model as one stage, after comparing cuts of it with the original."""
    path = tmp_path / "model.py"
    path.write_text(head + body)
    file, program = program_of(path, "model")
    for depth, seed in ((2, None), (3, 0), (4, 1)):
        compare(file, program, cut(program, depth, seed))
    (text,) = compare(file, program, cut(program, 1))
    return text


def test_classes_take_what_their_instances_differ_in(tmp_path: Path) -> None:
    text = emitted(
        """
class MLP(nn.Module):
    def __init__(self, hidden, scale):
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.gain = nn.Parameter(torch.ones(hidden))
        self.scale = scale
    def forward(self, x):
        return self.down(F.relu(self.up(x)) * self.gain) * self.scale

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlps = nn.ModuleList([MLP(16, 0.5), MLP(32, 2.0)])
    def forward(self, x):
        for mlp in self.mlps:
            x = x + mlp(x)
        return x
""",
        tmp_path,
    )
    assert text.count("class ") == 2
    assert "self.gain = nn.Parameter(torch.empty(size))" in text
    assert "nn.Linear(8, size)" in text
    assert "MLP(other=0.5, size=16)" in text
    assert "MLP(other=2.0, size=32)" in text


def test_modules_called_several_times_are_one_module(tmp_path: Path) -> None:
    text = emitted(
        """
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.ReLU()
    def forward(self, x, twice=False):
        x = self.act(self.fc(x))
        return self.act(self.fc(x)) if twice else x

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Layer()
    def forward(self, x):
        for _ in range(3):
            x = self.layer(x)
        return self.layer(x, twice=True)
""",
        tmp_path,
    )
    assert text.count("nn.Linear") == 1
    assert "def forward_2(self, x: Tensor) -> Tensor:" in text
    assert (
        "self.layer.forward_2(self.layer(self.layer(self.layer(x))))" in text.replace("inputs", "x")
        or "forward_2" in text
    )


def test_containers_keep_their_keys(tmp_path: Path) -> None:
    text = emitted(
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"in": nn.Linear(8, 8), "out-1": nn.Linear(8, 8)})
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))
        self.scales = nn.ParameterList([torch.ones(8), torch.ones(8)])
        self.add_module("lambda", nn.Linear(8, 8))
    def forward(self, x):
        x = self.parts["out-1"](self.parts["in"](x))
        x = getattr(self, "lambda")(x) * self.scales[0] + self.scales[1]
        return self.tail(x)
""",
        tmp_path,
    )
    assert set(load(text).state_dict()) >= {"parts.in.weight", "parts.out-1.bias", "scales.1"}
    assert set(load(text).state_dict()) >= {"lambda.weight", "tail.0.bias", "tail.1.1.weight"}


def test_contexts_stay_around_what_they_were_around(tmp_path: Path) -> None:
    text = emitted(
        """
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
    def forward(self, x):
        with torch.no_grad():
            scale = x.square().mean().sqrt()
        return x / scale * self.weight

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = Norm(), nn.Linear(8, 8)
    def forward(self, x):
        with torch.no_grad():
            frozen = self.fc(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc(x) @ x.t() @ x
        return self.norm(y.float() + frozen)
""",
        tmp_path,
    )
    assert text.count("with torch.no_grad():") == 2
    assert "with torch.autocast(" in text
    assert ".device.type, dtype=torch.bfloat16):" in text


def test_frozen_and_tied_parameters_stay_so(tmp_path: Path) -> None:
    text = emitted(
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.a.requires_grad_(False)
        self.b.bias.requires_grad_(False)
        self.c.weight = self.b.weight
        self.register_buffer("shift", torch.arange(8.0))
        self.register_buffer("hidden", torch.arange(8.0), persistent=False)
        self.table = torch.linspace(0, 1, 8)
    def forward(self, x):
        x = self.b(self.a(x)) + self.shift * self.hidden + self.table
        return F.linear(self.c(x), self.b.weight.t())
""",
        tmp_path,
    )
    stage = load(text)
    trainable = {name for name, p in stage.named_parameters() if p.requires_grad}
    assert trainable == {"b.weight"}
    assert set(stage.state_dict()) == {
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
        "c.weight",
        "shift",
    }
    assert "self.c.weight = self.b.weight" in text


def test_modules_may_return_and_take_many(tmp_path: Path) -> None:
    text = emitted(
        """
class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 16)
    def forward(self, x, scale):
        a, b = self.fc(x).chunk(2, -1)
        return {"a": a * scale, "b": (b, a + b)}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.split = Split()
        self.scale = nn.Parameter(torch.ones(8))
    def forward(self, x):
        out = self.split(x, self.scale)
        return out["a"] + out["b"][0] * out["b"][1]
""",
        tmp_path,
    )
    assert "def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:" in text


def test_buffers_are_updated_and_states_in_place(tmp_path: Path) -> None:
    emitted(
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
    def forward(self, x):
        x = self.bn(self.fc(x))
        self.seen += 1
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        y = x * 2
        y[:, 0] = 0.0
        y[:, 1:3] += x[:, 1:3]
        y.relu_()
        return y + self.mean / self.seen
""",
        tmp_path,
    )


def test_foreign_names_cannot_do_harm(tmp_path: Path) -> None:
    text = emitted(
        '''
def _evil(name):
    return type(name, (nn.Module,), {"__init__": _init, "forward": _forward})

def _init(self):
    nn.Module.__init__(self)
    self.fc = nn.Linear(8, 8)
    self.gain = nn.Parameter(torch.ones(8))

def _forward(self, torch):
    return self.fc(torch) * self.gain

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        names = ["torch", "F", "nn", "self", "Tensor", "Stage", "print", "class",
                 "x = __import__('os')", '"""', "a\\\\nb"]
        for i, name in enumerate(names):
            self.add_module(name.replace(".", "") + "'\\\\\\"", _evil(name)())
            self.add_module(name.replace(".", ""), _evil(name)())
    def forward(self, self_):
        for module in self.children():
            self_ = self_ + module(self_)
        return self_
''',
        tmp_path,
    )
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert "__import__" not in names


def test_a_loss_that_the_model_returns_and_unused_inputs(tmp_path: Path) -> None:
    head = HEAD.replace("def targets", "def _targets").replace("def loss", "def _loss")
    text = emitted(
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        outs = []
        for layer in self.layers:
            x = layer(x)
            outs.append(x)
        return sum(out.square().mean() for out in outs)
""",
        tmp_path,
        head=head,
    )
    assert "for layer in" not in text  # every layer's output is used


@pytest.mark.parametrize("name", ["MultiheadAttention(8, 2)", "TransformerEncoderLayer(8, 2, 16)"])
def test_modules_of_torch_with_a_forward_of_their_own(name: str, tmp_path: Path) -> None:
    arguments = "x, x, x" if name.startswith("Multi") else "x"
    result = "[0]" if name.startswith("Multi") else ""
    emitted(
        f"""
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.{name}
    def forward(self, x):
        x = x.unsqueeze(1)
        return self.m({arguments}){result}.squeeze(1)
""",
        tmp_path,
    )


def test_many_layers_with_many_arguments_are_made_in_several_lines(tmp_path: Path) -> None:
    text = emitted(
        """
class LayerWithAnExceptionallyLongName(nn.Module):
    def __init__(self, inner, scale, shift, power):
        super().__init__()
        self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)
        self.scale, self.shift, self.power = scale, shift, power
    def forward(self, x):
        return self.down((self.up(x) * self.scale + self.shift).abs() ** self.power)

class Run(nn.Module):
    def __init__(self, *numbers):
        super().__init__()
        self.layers = nn.ModuleList(LayerWithAnExceptionallyLongName(*numbers) for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x + self.layers[0].scale

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Run(12, 0.51234567, 0.1, 1.5), Run(20, 0.25, 0.1234567, 1.25)
    def forward(self, x):
        return self.second(self.first(x) * 2)
""",
        tmp_path,
    )
    assert "            for _ in range(3)\n        )\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_changes_nothing_is_left_out(tmp_path: Path) -> None:
    text = emitted(
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def forward(self, x):
        rows = (torch.arange(4, device=x.device) + 0)[None, None, :, None]
        mask = rows.new_ones((), dtype=torch.bool) & (rows >= 1)
        x = self.fc(x)[:, :8].view(4, 8).to(torch.float32) * 1.0
        return x.masked_fill(mask[0, 0], 0.5) / 1
""",
        tmp_path,
    )
    for noise in ("+ 0", "* 1.0", "/ 1", "new_ones", "view", "float32)", "[:, :8]"):
        assert noise not in text
    assert "torch.arange(4, device=" in text
    assert ")[None, None, :, None] >= 1" in text


def test_a_copy_that_is_written_to_stays_a_copy(tmp_path: Path) -> None:
    text = emitted(
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
    def forward(self, x):
        x = self.fc(x)
        y, z = x * 1.0, x * 1.0
        y += 1
        count = torch.arange(4, device=x.device)
        more = count + 0
        count += 1
        zero = x - x
        return x + y * z[:] + (count * more)[:, None] + (zero * -1.0 + 0.0).atan2(zero - 1)
""",
        tmp_path,
    )
    assert text.count("* 1.0") == 2  # the order in which the gradients of x are summed is kept
    assert text.count("+ 0") == 2  # of integers that change later, and of floats


def test_rotated_halves_are_one_line(tmp_path: Path) -> None:
    text = emitted(
        """
def rotated(x):
    first, second = x[..., :4], x[..., 4:]
    return torch.cat((-second, first), dim=-1)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.angle = nn.Linear(8, 8), nn.Parameter(torch.rand(4, 8))
    def forward(self, x):
        x = self.fc(x)
        x = x * self.angle.cos() + rotated(x) * self.angle.sin()
        low, high = x[:, :4], x[:, 3:]  # which both give the fourth column a gradient
        return x + torch.cat((-high, low), dim=-1)[:, :8] * x.sum()
""",
        tmp_path,
    )
    assert "torch.cat((-fc[:, 4:], fc[:, :4]), dim=-1) * self.angle.sin()" in text
    assert "y = x[:, :4]" in text


PARTS = """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.0)
    def forward(self, x):
        q, k, v = self.qkv(x).split(8, -1)
        return self.drop(self.out(torch.softmax(q @ k.t(), -1) @ v))

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Attention()
    def forward(self, x):
        return x + self.attn(self.norm(x))

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(4))
    def forward(self, x):
        for layer in self.layer:
            x = layer(x)
        return x

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.encoder = nn.Linear(8, 8), Encoder()
    def forward(self, x):
        return self.encoder(self.stem(x))
"""


@pytest.mark.parametrize("last", ["qkv", "out"])
def test_the_parts_of_a_cut_layer_are_one_class(last: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(HEAD + PARTS)
    file, program = program_of(path, "model")
    assert program.blocks is not None
    names = [block.name for block in program.blocks]
    place = names.index(f"encoder.layer.2.attn.{last}")
    stages = split(program, {name: int(i > place) for i, name in enumerate(names)})
    first, second = compare(file, program, stages)
    parts = ["Attention", "Layer", "LayerHead", "Stage"]
    assert re.findall(r"^class (\w+)", first, re.M) == parts
    assert re.findall(r"^class (\w+)", second, re.M) == ["LayerTail", *parts[:2], "Stage"]
    assert "self.encoder.layer[1](x)" in first
    assert f"self.attn.{last} = nn.Linear(" in first


def test_the_text_is_the_same_every_time(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        HEAD
        + """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    def forward(self, x):
        return self.m(x)
"""
    )
    texts = [
        texts_of(p, cut(p, 2)) for _, p in (program_of(path, "model"), program_of(path, "model"))
    ]
    assert texts[0] == texts[1]
