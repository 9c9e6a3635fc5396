"""Start-up: the names, the order and the first values of a model's parameters."""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from corpus import CORPUS, ROOT, Architecture
from handmade import write_artifact
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.driver import Compiled, compile_model
from p2bw.contract.errors import InputFileError, MismatchError, ModelError, P2BWError, UsageError
from p2bw.contract.job import Job
from p2bw.contract.stages import find_model_file
from p2bw.launch import run
from p2bw.modelfile.build import build, build_recorded
from p2bw.modelfile.initial import fill_stage, parameter_order
from p2bw.modelfile.load import ModelFile, load_model_file
from p2bw.modelfile.microbatch import seeded
from p2bw.modelfile.truncated import truncated_normal_as_one_operator
from p2bw.modelfile.turns import Room, choose_start, read_memory, taking_turns
from p2bw.runtime.prepare import initial_stage, prepare

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


def stages(artifact: Path, **options: Any) -> list[dict[str, Tensor]]:
    """The first state of every stage."""
    prepared = prepare(Job(artifact=artifact, steps=1, **options))
    return [
        state(initial_stage(prepared, k, torch.device("cpu"))) for k in range(prepared.plan.depth)
    ]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All of them; what two stages have is the same on both."""
    whole: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), name
    return whole


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if torch.equal(a[name], b[name])]


@pytest.mark.parametrize("init", ["whole", "modules"])
def test_the_partition_changes_no_weight(init: str, tmp_path: Path) -> None:
    found = [
        joined(stages(write_artifact(tmp_path / str(d), depth=d), seed=3, init=init))
        for d in (1, 2, 4)
    ]
    assert same(found[0], found[1]) == same(found[0], found[2]) == list(found[0])
    assert torch.equal(found[2]["head.weight"], found[2]["wte.weight"])
    other = joined(stages(tmp_path / "4", seed=4, init=init))
    constant = [n for n in other if ".ln." in n or ".norm." in n or n[4:] in ("gain", "unused")]
    assert sorted(same(found[2], other)) == sorted(constant)


def test_auto_is_whole_where_there_is_room(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    whole, auto = stages(artifact, init="whole"), stages(artifact)
    assert same(joined(whole), joined(auto)) == list(joined(whole))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "if self.weight.sum() > 0: self.big = nn.Parameter(torch.ones(1))",
            r"net.py:8: model\(\) raised .*\n.*\n--init modules builds .* use --init whole",
        ),
        (
            "self.weight.data.copy_(torch.from_numpy(numpy.ones((5000, 2000), 'f')))",
            r"first values of 0.weight come from outside torch.*use --init whole, or --weights",
        ),
    ],
)
def test_what_cannot_be_computed_alone_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        f"""import numpy, torch
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(2000, 5000)
        with torch.no_grad():
            {line}

def model():
    return nn.Sequential(Net())

def inputs(batch_size):
    return torch.ones(batch_size, 2000)
"""
    )
    file = load_model_file(path)
    stage = nn.Sequential(nn.Linear(2000, 5000))
    with pytest.raises(ModelError, match=message):
        fill_stage(file, stage, seed=0, init="modules")


def whole_model(artifact: Path) -> nn.Module:
    torch.manual_seed(8)
    model = find_model_file(artifact).model()
    for tensor in state(model).values():
        if tensor.is_floating_point():
            tensor.data.normal_()
    return model


def test_a_stage_takes_its_part_of_safetensors_files(tmp_path: Path) -> None:
    """One file, as Hugging Face writes it: of tied parameters just one name, maybe no buffers."""
    artifact = write_artifact(tmp_path / "a", depth=4)
    model = state(whole_model(artifact))
    given = {n: t.detach().clone() for n, t in model.items() if n != "head.weight"}
    save_file(given, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = joined(stages(artifact, weights=path))
        assert sorted(same(found, model)) == sorted(model)
    fewer = {n: t for n, t in given.items() if "running" not in n}
    save_file(fewer, tmp_path / "model.safetensors")
    found = joined(stages(artifact, weights=tmp_path))
    assert torch.equal(found["h.2.norm.running_mean"], torch.zeros(16))
    assert len(same(found, model)) == len(model) - 8


@pytest.mark.parametrize("name", ["hf_gpt2", "hf_t5", "hf_llama"])
def test_what_hugging_face_saves_is_read(
    name: str, compiled: Callable[[str, int], Compiled], tmp_path: Path
) -> None:
    """In shards, and of tied parameters under one name, which is not always the first."""
    artifact = compiled(name, 2).artifact
    model: Any = find_model_file(artifact).model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    found = joined(stages(artifact, weights=tmp_path))
    # The stages have constants of their own.
    expected = {name: state(model).get(name, found[name]) for name in found}
    assert same(found, expected) == list(found)


def test_other_dtypes_are_converted_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    model = state(whole_model(artifact))
    save_file({n: t.bfloat16() for n, t in model.items()}, tmp_path / "half.safetensors")
    prepared = prepare(Job(artifact=artifact, steps=1, weights=tmp_path / "half.safetensors"))
    stage = initial_stage(prepared, 0, torch.device("cpu"), say=True)
    assert torch.equal(state(stage)["wte.weight"], model["wte.weight"].bfloat16().float())
    said = capfd.readouterr().err
    assert said.startswith("first weights: each rank reads its own stage's part of ")
    assert "bfloat16 becomes float32" in said


def test_saved_weights_are_weights_to_start_with(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    model = state(whole_model(artifact))
    names = sorted(model)
    index = {}
    for number, part in enumerate((names[:9], names[9:20], names[20:])):
        save_file({n: model[n].clone() for n in part}, tmp_path / f"{number}.safetensors")
        index |= dict.fromkeys(part, f"{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert sorted(same(joined(stages(artifact, weights=tmp_path)), model)) == names


def test_what_is_wrong_with_weights_is_named(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    given = {n: t.detach().clone() for n, t in state(whole_model(artifact)).items()}
    folder = tmp_path / "w"
    folder.mkdir()
    path = folder / "model.safetensors"

    def refused(kind: type[P2BWError], message: str, weights: Path = folder) -> None:
        with pytest.raises(kind, match=message):
            stages(artifact, weights=weights)

    refused(UsageError, "no such file or folder", tmp_path / "nowhere")
    refused(InputFileError, "0 indexes and 0 safetensors files")
    save_file({n: t for n, t in given.items() if n != "h.0.up.weight"} | {"x": torch.ones(1)}, path)
    refused(MismatchError, r"lacks h.0.up.weight, which the model needs; it has x")
    save_file(given | {"h.0.up.weight": torch.ones(8, 16)}, path)
    refused(MismatchError, r"h.0.up.weight is \[8, 16\], in the model \[16, 8\]")
    path.write_bytes(b"PK and then a pickle")
    refused(InputFileError, "is not a safetensors file")
    save_file(given, path)
    path.write_bytes(path.read_bytes()[:-400])
    refused(InputFileError, "is not a safetensors file")
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ("{", "is not JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../a/plan.json"}}', "names '../a/plan.json', which is no file"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names 'gone.safetensors', which is no file"),
    ):
        index.write_text(text)
        refused(InputFileError, message)
    save_file({"a": torch.ones(1)}, path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(given, path.name)}))
    refused(InputFileError, "cannot read .*File does not contain tensor")


GB = 10**9


@pytest.mark.parametrize(
    ("asked", "rooms", "init", "at_once"),
    [
        ("auto", [Room(64 * GB, 60 * GB, 2, 4 * GB)] * 2, "whole", 0),
        ("auto", [Room(64 * GB, 30 * GB, 4, 4 * GB)] * 4, "whole", 1),  # turns: not much is free
        ("auto", [Room(99 * GB, 58 * GB, 4, 4 * GB)] * 4, "whole", 2),
        ("auto", [Room(32 * GB, 31 * GB, 4, 4 * GB)] * 4, "modules", 1),
        (
            "auto",
            [Room(64 * GB, 60 * GB, 1, 9 * GB), Room(20 * GB, 9 * GB, 1, 9 * GB)],
            "modules",
            0,
        ),
        ("whole", [Room(32 * GB, 31 * GB, 4, 9 * GB)] * 4, "whole", 1),
        ("modules", [Room(64 * GB, 60 * GB, 2, 1 * GB)] * 2, "modules", 0),
    ],
)
def test_the_smallest_host_decides(asked: str, rooms: list[Room], init: str, at_once: int) -> None:
    start = choose_start(asked, 0, 1, rooms)
    assert (start.init, start.at_once) == (init, at_once)
    assert start.model_bytes == sum(room.stage for room in rooms)
    assert f"--init {init}" in str(start)
    if asked == "auto":  # the weights must not depend on what happens to be free
        full = [Room(room.total, 0, room.ranks, room.stage) for room in rooms]
        assert choose_start(asked, 0, 1, full).init == init


def test_this_hosts_memory() -> None:
    total, available = read_memory()
    assert 1 << 28 < available <= total < 1 << 50


class Shared:
    """A store within one process."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.changed:
            self.keys[key] = value
            self.changed.notify_all()

    def get(self, key: str) -> bytes:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.keys, 20)
            return self.keys[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.keys for key in keys)


@pytest.mark.parametrize("at_once", [1, 2])
def test_ranks_of_a_host_take_turns(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts of three ranks."""
    stage = nn.Linear(10, 10)  # 440 bytes; six of them 2640
    monkeypatch.setattr(
        "p2bw.modelfile.turns.read_memory", lambda: (10**6, 3 * 440 + 2640 * at_once)
    )
    store, counting, most = Shared(), threading.Lock(), [0, 0]
    now = [0, 0]
    everyone = threading.Barrier(2 * at_once, timeout=20)  # as many do build at the same time

    def rank(rank: int) -> None:
        place = SimpleNamespace(rank=rank, world=6, local_rank=rank % 3, local_world=3)
        with taking_turns(store, place, "auto", 0, 1, False, stage) as init:
            assert init == "whole"
            with counting:
                now[rank // 3] += 1
                most[rank // 3] = max(most[rank // 3], now[rank // 3])
            if rank % 3 < at_once:
                everyone.wait()
            with counting:
                now[rank // 3] -= 1

    threads = [threading.Thread(target=rank, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [at_once, at_once]
    assert {f"built/{k}" for k in range(6)} <= store.keys.keys()


PEAK = """
import json, sys, threading
from pathlib import Path
import torch
from p2bw.modelfile.initial import parameter_order
from p2bw.contract.job import Job
from p2bw.runtime.prepare import initial_stage, prepare

def allocated():
    # Without the pages of files, libraries for one, which come and go as the system likes.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
    while not done.wait(0.0005):
        samples.append(allocated())

artifact, stage, init, weights = sys.argv[1:]
weights = Path(weights) if weights else None
prepared = prepare(Job(artifact=Path(artifact), steps=1, init=init, weights=weights))
parameter_order(prepared.file)  # imports what building without memory needs
samples, done, before = [], threading.Event(), allocated()
watcher = threading.Thread(target=watch)
watcher.start()
module = initial_stage(prepared, int(stage), torch.device("cpu"))
done.set()
watcher.join()
peak = max(*samples, allocated()) - before
size = sum(tensor.nbytes for tensor in module.parameters())
print(json.dumps({"peak": peak, "stage": size}))
"""


def peaks(
    artifact: Path, stages: Iterable[int], init: str, weights: str = ""
) -> list[dict[str, int]]:
    """Of some ranks, in bytes: a stage's weights, and how much its memory has grown at most."""
    found = []
    for stage in stages:
        line = [sys.executable, "-c", PEAK, str(artifact), str(stage), init, weights]
        done = subprocess.run(line, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    return found


def check_peaks(folder: Path, layers: int, width: int) -> None:
    artifact = Path(
        compile_model(
            ROOT / "examples" / "gpt.py",
            factory="tiny",
            settings={"layers": layers, "width": width, "heads": 8},
            **{"gpus": 4, "depth": 4, "microbatch": 1, "memory": "64GiB", "gap": "20%"},
            out=folder / "artifact",
        ).artifact
    )
    modules = peaks(artifact, range(4), "modules")
    model = sum(rank["stage"] for rank in modules)
    # The largest matrix: made, copied, and one that was freed but not given back; and Python.
    most = 3 * 4 * 4 * width**2 + (16 << 20)
    for rank in modules:
        assert rank["peak"] < rank["stage"] + most < 0.45 * model, modules
    (whole,) = peaks(artifact, [0], "whole")  # the same question has another answer
    assert whole["peak"] > model
    file = find_model_file(artifact)
    save_file(
        {name: tensor.detach() for name, tensor in file.model().named_parameters()},
        folder / "model.safetensors",
    )
    read = peaks(artifact, [0, 2], "auto", str(folder / "model.safetensors"))
    for rank in read:
        assert rank["peak"] < rank["stage"] + most, read


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_ever_holds_more_than_its_stage(tmp_path: Path) -> None:
    """0.2 GB in four stages."""
    check_peaks(tmp_path, layers=16, width=512)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_of_a_larger_model_ever_holds_more_than_its_stage(tmp_path: Path) -> None:
    """1.6 GB in four stages."""
    check_peaks(tmp_path, layers=32, width=1024)


def test_a_run_says_how_its_weights_are_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    artifact = write_artifact(tmp_path / "a", depth=2)
    assert len(run(artifact, steps=1, device="cpu", init="modules")["losses"]) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "first weights" in line]
    assert len(said) == 1, said
    assert "each rank computes only its own stage's part" in said[0]
    with pytest.raises(UsageError, match="--init some: it is auto, whole or modules"):
        run(artifact, steps=1, init="some")
    with pytest.raises(UsageError, match="no such file or folder"):
        run(artifact, steps=1, weights=tmp_path / "nowhere")
