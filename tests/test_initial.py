"""Start-up: the names, the order and the first values of a model's parameters."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CORPUS, Architecture
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.modelfile.build import build, build_recorded
from p2bw.modelfile.initial import parameter_order
from p2bw.modelfile.load import ModelFile, load_model_file
from p2bw.modelfile.microbatch import seeded
from p2bw.modelfile.truncated import truncated_normal_as_one_operator

every_example = pytest.mark.parametrize("example", CORPUS, ids=lambda a: a.name)

# Every way to start a parameter that comes to mind, above and below the sizes that are built real.
CORNERS = """
import copy, math, random
import numpy
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.drawn = nn.Parameter(torch.randn(300, 300) / 300)
        self.token = nn.Parameter(torch.randn(1, 1, 64))
        self.filled = nn.Parameter(torch.full((70000,), 3.0))
        self.counted = nn.Parameter(torch.arange(90000.0).view(300, 300).t())
        self.late = nn.Linear(300, 300)
        self.late.weight.data = torch.rand(300, 300) * 2
        self.late.weight.data[7:9] = 5.0
        self.square = nn.Linear(300, 300, bias=False)
        nn.init.orthogonal_(self.square.weight)
        self.sparse = nn.Linear(70, 300)
        nn.init.sparse_(self.sparse.weight, 0.9)
        self.conv = nn.Conv2d(64, 64, 3)
        nn.init.dirac_(self.conv.weight)
        self.words = nn.Embedding(1000, 80, padding_idx=3)
        self.lstm = nn.LSTM(80, 100, bidirectional=True)
        for name, p in self.lstm.named_parameters():
            if "bias" in name:
                p.data[100:200].fill_(1)
        self.cut = nn.Parameter(torch.empty(80, 80))
        nn.init.trunc_normal_(self.cut, std=0.02, a=-0.02, b=0.02)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 3, enable_nested_tensor=False
        )
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(100, 90))
        generator = torch.Generator().manual_seed(5)
        self.mine = nn.Parameter(torch.empty(100, 100).normal_(generator=generator))
        self.mixed = nn.Parameter(self.drawn.detach()[:, :80] @ self.cut.detach())
        self.python = nn.Parameter(torch.tensor([random.random(), numpy.random.rand()]))
        self.numpy = nn.Parameter(torch.from_numpy(numpy.arange(80000.0)).float())
        rows = torch.arange(200).unsqueeze(1) / 10000 ** (torch.arange(0, 512, 2) / 512)
        self.register_buffer("waves", torch.cat([rows.sin(), rows.cos()], dim=1))
        self.register_buffer("noise", torch.randn(10, 10))
        self.register_buffer("big_noise", torch.randn(300, 300))
        self.register_buffer("count", torch.tensor(0))
        self.lower = nn.Linear(90, 90).to(torch.bfloat16)
        small = torch.randn(8)
        while small.max() > 0.9:  # a choice that the draw decides
            small = small * 0.5 + torch.randn(8) * 0.1
        self.chosen = nn.Parameter(small)
        self.tied = self.lower.weight
        frozen = nn.Parameter(torch.rand(100, 100), requires_grad=False)
        self.frozen = frozen
        with torch.no_grad():
            frozen.mul_(2).sub_(self.mine)

    def forward(self, x):
        return x

class Applied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80, bias=False))
        self.head = nn.Linear(80, 90, bias=False)
        self.head.weight = nn.Embedding(90, 80).weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)

def model():
    return nn.ModuleDict({"odd": Odd(), "applied": Applied()})

def inputs(batch_size):
    return torch.ones(batch_size)
"""


class Drawing(TorchDispatchMode):
    """A real construction whose every draw is seeded as a recording says."""

    def __init__(self, keys: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = iter(keys)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        with seeded(next(self.keys)):
            if kwargs.get("generator") is not None:
                kwargs["generator"] = torch.Generator().manual_seed(torch.initial_seed())
            return func(*args, **kwargs)


def state(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return dict([*parameters, *model.named_buffers(remove_duplicate=False)])


def seed_python() -> None:
    import random

    import numpy

    random.seed(3)
    numpy.random.seed(3)


@pytest.fixture
def corners(tmp_path: Path) -> ModelFile:
    path = tmp_path / "corners.py"
    path.write_text(CORNERS)
    return load_model_file(path)


@every_example
def test_the_order_of_the_parameters_is_that_of_the_real_model(example: Architecture) -> None:
    file = load_model_file(example.path, example.factory)
    names = [name for name, p in file.model().named_parameters() if p.requires_grad]
    assert list(parameter_order(file)) == names


def check_values(file: ModelFile) -> None:
    """Each tensor, computed alone and in any order, is that of a real construction."""
    seed_python()
    unbuilt, recording = build_recorded(file, seed=3)
    keys = recording.draws()
    seed_python()
    with truncated_normal_as_one_operator(), Drawing(keys) as drawing:
        whole = state(file.model())
    assert next(drawing.keys, None) is None
    found = state(unbuilt)
    assert list(found) == list(whole)
    for name in sorted(found, reverse=True):
        value = recording.values(name, found[name])
        assert value.dtype == whole[name].dtype, name
        assert value.stride() == whole[name].stride(), name
        assert torch.equal(value, whole[name]), name
        assert found[name].requires_grad == whole[name].requires_grad, name


@every_example
def test_values_computed_one_by_one_are_those_of_the_users_code(example: Architecture) -> None:
    check_values(load_model_file(example.path, example.factory))


def test_values_of_parameters_that_are_started_in_unusual_ways(corners: ModelFile) -> None:
    check_values(corners)


def test_a_layer_that_is_copied_stays_in_the_mode_of_the_others(corners: ModelFile) -> None:
    """A copy of the mode frees the weak references of the first a second time."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = build(corners, mode)
    assert {id(tensor.fake_mode) for tensor in state(model).values()} == {id(mode)}  # type: ignore[attr-defined]
