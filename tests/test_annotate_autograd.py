import pytest
import torch
from annotated import RealRun, annotated, saved_bytes
from corpus import CORPUS

from p2bw.compiler.program import MissingFactError
from p2bw.compiler.split import split
from p2bw.compiler.storage import storage_of
from p2bw.compiler.trace import trace
from p2bw.modelfile.load import load_model_file
from p2bw.passes import annotate_autograd, annotate_cost

every_architecture = pytest.mark.parametrize("architecture", CORPUS, ids=lambda a: a.name)

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn


def inputs(batch_size):
    return (torch.randn(batch_size, 8),)


"""


@pytest.fixture(autouse=True)
def plain_recurrence(monkeypatch):
    """The size of oneDNN's workspace for recurrent layers is not to be known without it."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


@pytest.fixture
def program_of(tmp_path):
    """program_of(text): the file HEAD + text, and its Program behind annotate_autograd."""

    def load(text):
        path = tmp_path / "net.py"
        path.write_text(HEAD + text)
        file = load_model_file(path)
        return file, annotate_autograd(trace(file, 2))

    return load


def tensors_in(value):
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [item for item in items if isinstance(item, torch.Tensor)]


def assert_as_in_a_real_run(file, program):
    names = [node.name for node in program.compute_nodes]
    values, kept, random_calls = RealRun(file, program)(names)
    assert saved_bytes(program, names) == kept
    assert sum(program.fact(name, "random_calls") for name in names) == random_calls
    for name in names:
        found = tensors_in(values[name])
        assert program.fact(name, "strides") == tuple(t.stride() for t in found), name
        assert program.fact(name, "requires_grad") == tuple(t.requires_grad for t in found), name
        for output, tensor in enumerate(found):
            maker, of = storage_of(program, name, output)
            made = tensors_in(values[maker])[of]
            assert made.untyped_storage()._cdata == tensor.untyped_storage()._cdata, name
            if program.fact(name, "alias")[output] is None:
                assert all(
                    tensor.untyped_storage()._cdata != other.untyped_storage()._cdata
                    for argument in program.node(name).all_input_nodes
                    for other in tensors_in(values[argument.name])
                ), name


@every_architecture
def test_facts_are_those_of_a_real_run(architecture):
    assert_as_in_a_real_run(*annotated(architecture))


@every_architecture
def test_saved_bytes_of_each_of_three_stages(architecture):
    file, program = annotated(architecture)
    real = RealRun(file, program)
    values, _, _ = real([node.name for node in program.compute_nodes])
    blocks = program.blocks
    stages = split(program, {b.name: 3 * i // len(blocks) for i, b in enumerate(blocks)})
    for stage in stages:
        # Exact as long as what arrives lies in memory as in the whole model.
        received = {t.tensor: values[t.tensor].detach().clone() for t in stage.receives}
        for t in stage.receives:
            received[t.tensor].requires_grad_(t.gradient)
        _, kept, _ = real(stage.nodes, received)
        assert saved_bytes(program, stage.nodes) == kept, stage.index


STEPS = {
    "in place": "y = self.up(x); y.relu_(); y.add_(1.0); return y.mean()",
    "write into a slice": "y = torch.zeros(x.shape); y[:, :4] = self.up(x)[:, :4]; "
    "return (y * y).mean()",
    "write by index": "y = self.up(x); y = y * 1.0; y[torch.tensor([0])] = 0.5; "
    "return (y * x).sum()",
    "dropout that does nothing": "y = F.dropout(self.up(x), 0.0); return (y * y).mean()",
    "contiguous already": "y = self.up(x).contiguous().to(torch.float32); return (y * y).mean()",
    "detach": "y = self.up(x); return (y.detach() * y).mean()",
    "no grad": "y = self.up(x)\n        with torch.no_grad():\n            z = y * y\n"
    "        return (z * y).mean()",
    "expand": "y = self.up(x)[:, None].expand(-1, 5, -1); return (y * y).mean()",
    "split unequally": "a, b = self.up(x).split([3, 5], -1); return (a.sum() * b * b).mean()",
    "square": "y = self.up(x); return (y @ y.T).mean()",
    "complex": "y = torch.view_as_complex(self.up(x).view(-1, 4, 2)); return (y * y).abs().mean()",
    "used twice": "y = self.up(self.up(x)); return (y * self.up.weight.sum()).mean()",
    "gru": "y, _ = self.gru(x[None]); return y.square().mean()",
    "attention": "q = self.up(x).view(2, 2, 4, 1); "
    "return F.scaled_dot_product_attention(q, q, q, dropout_p=0.2).square().mean()",
    "autocast": "\n        with torch.autocast('cpu', dtype=torch.bfloat16):\n"
    "            y = self.up(x)\n        return y.float().square().mean()",
    "checked": "y = self.up(x); z = y.t(); y.relu_(); return (z * z).mean()",
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_what_is_hard_for_autograd(step, program_of):
    text = f"""\
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.gru = nn.GRU(8, 4, 2, dropout=0.1)

    def forward(self, x):
        {step}


def model():
    return Net()
"""
    assert_as_in_a_real_run(*program_of(text))


def test_writes_in_place_are_found(program_of):
    _, program = program_of("""\
def model():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), Mean())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()
""")
    written = {
        program.node(name).all_input_nodes[index].name
        for name in (node.name for node in program.compute_nodes)
        for index in program.fact(name, "mutates")
    }
    assert {program.node(name).op for name in written} == {"get_attr", "call_function"}
    assert {program.node(n).target for n in written if program.node(n).op == "get_attr"} == set(
        program.buffers
    )


def test_equal_layers_cost_one_run(program_of):
    _, program = program_of("""\
def model():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)), Mean())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()
""")
    second = program.compute_nodes[1:-1]
    assert len({program.fact(node, "saved") for node in second}) == 1
    assert all(program.fact(node, "saved")[0].kind == "input" for node in second)


def test_cost_needs_autograd_first(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        f"{HEAD}def loss(outputs):\n    return outputs.mean()\n\n\n"
        "def targets(batch_size):\n    return ()\n\n\n"
        "def model():\n    return nn.Linear(8, 8)\n"
    )
    with pytest.raises(MissingFactError, match="run annotate_autograd first"):
        annotate_cost(trace(load_model_file(path), 2))
