"""profile: what it measures is the model, compile uses it, and what does not fit is refused."""

import json
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from corpus import CORPUS, ROOT
from test_cli import p2bw

from p2bw.compiler.devices import find_device
from p2bw.compiler.driver import compile_model
from p2bw.compiler.measured import (
    DeviceProfile,
    Kind,
    Matmul,
    ModelProfile,
    Profile,
    Step,
    Timing,
    block_kind,
    block_times,
    choose_topology,
    read_profile,
)
from p2bw.compiler.program import Program
from p2bw.compiler.trace import trace
from p2bw.contract.errors import InputFileError, UsageError
from p2bw.measure import blocks as measuring
from p2bw.measure import driver, rehearsal
from p2bw.measure.blocks import measure_blocks
from p2bw.measure.cache import Cache
from p2bw.measure.links import measure_link
from p2bw.measure.overhead import measure_overhead
from p2bw.measure.segment import Segment
from p2bw.measure.tensors import Tensors
from p2bw.measure.training import Training
from p2bw.measure.twin import working_beside
from p2bw.modelfile.load import load_model_file
from p2bw.passes import pipeline, run_passes
from p2bw.passes.annotate_time import use_profile

CPU = torch.device("cpu")
GPT = ROOT / "examples" / "gpt.py"
ARCHITECTURES = {architecture.name: architecture for architecture in CORPUS}
DEVICE = DeviceProfile(
    name="a core",
    type="cpu",
    memory_bytes=8 << 30,
    threads=1,
    processes=2,
    torch_version="2.13.0",
    matmuls=(
        Matmul(dtype="float32", size=256, flops_per_s=4e10),
        Matmul(dtype="float32", size=512, flops_per_s=5e10),
    ),
    bandwidth=1e10,
    op_overhead_s=2e-6,
    link=1e9,
    latency_s=5e-5,
    backend="gloo",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@cache
def gpt(batch: int = 2, **settings) -> tuple:
    file = load_model_file(GPT, "tiny", {"dropout": 0.0, "layers": 3, **settings})
    return file, run_passes(trace(file, batch), pipeline(DEVICE.device()))


def nothing_beside():
    return nullcontext()


def made_up(program: Program, *sizes: int, each_s: float = 1e-3) -> Profile:
    """A profile in which block i takes i + 1 times `each_s`, by size, and backward takes twice."""
    steps, kinds = [], {}
    for size in sizes:
        names = {b.name: f"{block_kind(program, b)}" for b in program.blocks}
        if size != program.batch_size:
            names = {name: f"{kind}@{size}" for name, kind in names.items()}
        for i, kind in enumerate(dict.fromkeys(names.values())):
            s = (i + 1) * each_s * size
            kinds[kind] = Kind(
                forward=Timing(median_s=s, spread_s=0.0),
                backward=Timing(median_s=2 * s, spread_s=0.0),
            )
        steps.append(Step(microbatch=size, blocks=names, feed_s=0.5e-3))
    types = {str(p.type): 1e-4 for p in program.parameters.values()}
    return Profile(
        p2bw_version="0",
        device=DEVICE,
        model=ModelProfile(file="gpt.py", factory="tiny", settings={"layers": 3}, name="GPT"),
        steps=tuple(steps),
        kinds=kinds,
        updates=types,
    )


@pytest.mark.parametrize("name", ["gpt", "resnet", pytest.param("moe", marks=pytest.mark.slow)])
def test_what_is_timed_computes_the_users_gradients(name):
    """The oracle is the user's own model, run by eager PyTorch."""
    architecture = ARCHITECTURES[name]
    settings = {"dropout": 0.0} if name == "gpt" else {}
    file = load_model_file(architecture.path, architecture.factory, settings)
    program = run_passes(trace(file, 2), pipeline(find_device("cpu")))
    tensors = Tensors(file, program, CPU, whole=True)
    segment = Segment(program, program.blocks, tensors.model, CPU)
    given = tensors.given(segment)
    buffers = {name: buffer.clone() for name, buffer in tensors.model.named_buffers()}
    spans = segment.run(given)
    found = {name: p.grad for name, p in tensors.model.named_parameters()}
    tensors.model.zero_grad()
    for name, buffer in tensors.model.named_buffers():
        buffer.copy_(buffers[name])
    file.call(tensors.model, *tensors.microbatch).backward()
    assert any(gradient is not None for gradient in found.values())
    for name, parameter in tensors.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert len(spans.forward) == len(spans.backward) == len(program.blocks)
    assert min(spans.forward) > 0
    assert min(spans.backward) >= 0


def test_every_block_with_a_backward_has_a_time_of_its_own():
    file, program = gpt()
    tensors = Tensors(file, program, CPU, whole=True)
    spans = Segment(program, program.blocks, None, CPU).run(
        tensors.given(Segment(program, program.blocks, None, CPU))
    )
    for block, backward_s in zip(program.blocks, spans.backward, strict=True):
        if any(program.fact(name, "traffic_backward") for name in block.nodes):
            assert backward_s > 0, block.name


def test_equal_blocks_are_of_one_kind_and_others_are_not():
    _, program = gpt()
    kinds = {block.name: block_kind(program, block) for block in program.blocks}
    for name in ("attn.qkv", "attn", "ln_1", "mlp.fc"):
        assert len({kinds[f"h.{i}.{name}"] for i in range(3)}) == 1
    assert kinds["h.0.mlp.fc"] != kinds["h.0.mlp.proj"]
    _, wider = gpt(batch=3)
    others = {block.name: block_kind(wider, block) for block in wider.blocks}
    assert all(kinds[name] != others[name] for name in kinds if name != "wpe")  # of no samples


def test_a_kind_tells_an_operators_arguments_apart():
    _, program = gpt(dropout=0.25)
    _, other = gpt(dropout=0.5)
    kinds, others = ({b.name: block_kind(p, b) for b in p.blocks} for p in (program, other))
    assert kinds["h.0.attn.drop"] != others["h.0.attn.drop"]
    assert kinds["h.0.mlp.fc"] == others["h.0.mlp.fc"]


def test_a_model_that_does_not_fit_is_measured_layer_by_layer_and_equal_layers_once(monkeypatch):
    file, program = gpt()
    runs = []
    measure = measuring._measure

    def counted(segment, tensors):
        runs.append([block.name for block in segment.blocks])
        assert tensors.model is None
        return measure(segment, tensors)

    monkeypatch.setattr(measuring, "_measure", counted)
    monkeypatch.setattr(measuring, "_LEAST_RUNS", 2)
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    found = measure_blocks(file, program, CPU, Cache(()), nothing_beside, whole=False)
    layers = [run for run in runs if run[0].startswith("h.")]
    assert len(layers) == 1  # of three
    assert found.blocks == {b.name: block_kind(program, b) for b in program.blocks}
    assert set(found.kinds) == set(found.blocks.values())
    assert found.check is None
    for kind in found.kinds.values():
        assert kind.forward.median_s > 0


def test_the_cache_saves_measuring_and_survives_what_is_no_longer_valid(monkeypatch, tmp_path):
    file, program = gpt()
    monkeypatch.setattr(measuring, "_LEAST_RUNS", 2)
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    cache = Cache(("here",))
    first = measure_blocks(file, program, CPU, cache, nothing_beside, whole=True)
    (kept,) = (tmp_path / "cache").rglob("*.json")

    def never(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(measuring, "_measure", never)
        assert measure_blocks(file, program, CPU, cache, nothing_beside, whole=True) == first
        for other in (Cache(("elsewhere",)), Cache(("here",), fresh=True)):
            with pytest.raises(AssertionError, match="again"):
                measure_blocks(file, program, CPU, other, nothing_beside, whole=True)
    kept.write_text('{"forward": "__import__"}', encoding="utf-8")
    again = measure_blocks(file, program, CPU, cache, nothing_beside, whole=True)
    assert again.blocks == first.blocks


def test_blocks_add_up_to_the_whole():
    """The pooled kinds keep the sum of the blocks; that is compared with the model's own step."""
    file, program = gpt()
    found = measure_blocks(file, program, CPU, Cache(()), nothing_beside, whole=True)
    assert found.check is not None
    times = [found.kinds[kind] for kind in found.blocks.values()]
    blocks_s = sum(t.forward.median_s + t.backward.median_s for t in times)
    assert blocks_s == pytest.approx(found.check.blocks_s)
    assert 0.2 < found.check.ratio < 5  # of the same order: a busy machine is no failure


def test_blocks_add_up_to_the_median_run():
    """Each run is disturbed once, each time in another block: no block's median shows that."""
    runs = [(5.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 5.0)]
    assert [timing.median_s for timing in measuring._timings(runs)] == pytest.approx([7 / 3] * 3)
    assert [timing.median_s for timing in measuring._timings([(0.0,), (0.0,)])] == [0.0]


def test_compile_uses_the_measured_times(tmp_path):
    _, program = gpt()
    profile = made_up(program, 2)
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    settings = {"dropout": 0.0, "layers": 3}
    compiled = compile_model(
        GPT, factory="tiny", settings=settings, profile=path, gpus=2, depth=2, out=tmp_path / "out"
    )
    plan = compiled.plan
    assert plan.microbatch == 2  # the one that was measured
    assert plan.topology["device"]["name"] == "measured: a core (cpu)"
    kinds = profile.steps[0].blocks
    for stage in plan.stages:
        times = [profile.kinds[kinds[name]] for name in stage.blocks]
        forward_s = sum(t.forward.median_s for t in times) + 0.5e-3  # each makes the data
        assert stage.compute_s.forward == pytest.approx(forward_s)
        assert stage.compute_s.backward == pytest.approx(sum(t.backward.median_s for t in times))
    held = [p for p in program.parameters.values() if p.trainable]
    updates_s = sum(stage.compute_s.update for stage in plan.stages)
    tied = sum(len(t.stages) - 1 for t in plan.tied)
    assert updates_s == pytest.approx(1e-4 * (len(held) + tied) / plan.microbatches_per_update)


def test_a_microbatch_between_two_that_were_measured_lies_between_them():
    _, program = gpt(batch=2)
    _, three = gpt(batch=3)
    profile = made_up(program, 2, 4)
    three = replace(three, blocks=program.blocks)
    for name, times in block_times(profile, three).items():
        low, high = (profile.kinds[step.blocks[name]] for step in profile.steps)
        assert times.forward_s == pytest.approx((low.forward.median_s + high.forward.median_s) / 2)
    timed = use_profile(three, profile=profile)
    total = sum(timed.fact(node, "backward_s") for node in timed.compute_nodes)
    assert total == pytest.approx(sum(t.backward_s for t in block_times(profile, three).values()))


def test_a_profile_of_something_else_is_refused_with_what_it_is_of():
    _, program = gpt()
    _, wider = gpt(width=128)
    with pytest.raises(UsageError, match=r"taken of gpt.py:tiny, layers=3 at microbatch 2"):
        block_times(made_up(program, 2), wider)
    _, larger = gpt(batch=4)
    with pytest.raises(UsageError, match=r"at microbatch 2, not at 4.*--microbatch 4"):
        block_times(made_up(program, 2), larger)


def test_a_profile_of_few_layers_serves_a_model_with_many():
    _, program = gpt()
    _, deep = gpt(layers=5)
    assert len(block_times(made_up(program, 2), deep)) > len(program.blocks)


def test_devices_are_the_measured_ones_and_links_those_of_the_cluster():
    _, program = gpt()
    profile = made_up(program, 2)
    here = choose_topology(profile, 4, None, None, None)
    assert here.gpus == 4
    assert here.levels[0].bandwidth == 1e9
    assert here.device.sustained_flops("float32") == 5e10  # the better of two sizes
    there = choose_topology(profile, None, None, None, "dgx-a100")
    cluster = choose_topology(None, None, None, None, "dgx-a100")
    assert there.device.name == here.device.name
    assert there.device.memory_bytes == cluster.device.memory_bytes
    assert there.levels[0].bandwidth == 300e9
    with pytest.raises(UsageError, match="--device h100: the profile says"):
        choose_topology(profile, 4, "h100", None, None)
    with pytest.raises(UsageError, match="several kinds"):
        choose_topology(profile, None, None, None, "8xv100-16+4xa100-40")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"schema": 2}, "schema"),
        ({"extra": 1}, "extra"),
        ({"kinds": {}}, "no kind"),
        ({"steps": []}, "steps"),
        ({"updates": {"f32[2]": "1"}}, "updates"),
        ({"updates": {"f32[2]": -1.0}}, "updates"),
        ({"updates": {"f32[2]": float("nan")}}, "updates"),
        ({"updates": {"f32[2]": 1e308}}, "updates"),
        ({"device": {**DEVICE.model_dump(mode="json"), "bandwidth": 0.0}}, "bandwidth"),
        ({"device": {**DEVICE.model_dump(mode="json"), "matmuls": []}}, "matmuls"),
        ({"device": {**DEVICE.model_dump(mode="json"), "memory_bytes": 10**30}}, "memory_bytes"),
    ],
)
def test_a_hostile_file_is_refused_with_one_message(tmp_path, change, where):
    _, program = gpt()
    data = json.loads(made_up(program, 2).to_json()) | change
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputFileError, match=where):
        read_profile(path)


def test_what_is_no_profile_at_all_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_bytes(b"\x80\x04\x95")
    with pytest.raises(InputFileError, match="p2bw profile"):
        read_profile(path)
    with pytest.raises(UsageError, match="No such file"):
        read_profile(tmp_path / "none.json")


def test_a_link_between_two_processes_is_measured():
    found = measure_link(CPU)
    assert found is not None
    bandwidth, latency_s, backend = found
    assert backend == "gloo"
    assert 1e6 < bandwidth < 1e12
    assert 0 < latency_s < 1


def test_the_runtime_s_own_time_is_measured():
    assert 0 < measure_overhead() < 0.1


@pytest.mark.parametrize("lr", [None, 1, torch.tensor(1.0)])
def test_updates_between_what_is_measured_change_versions_and_no_weight(monkeypatch, lr):
    file, _ = gpt()
    if lr is not None:
        monkeypatch.setattr(file.module, "optimizer", partial(torch.optim.SGD, lr=lr))
    model = file.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training, used = Training(file, model), []
    for _ in range(4):
        file.call(model, file.inputs(2), file.targets(2)).backward()
        used.append({name: p.data_ptr() for name, p in model.named_parameters()})
        training.update()
        assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        places = [update[name] for update in used]
        assert places[0] == places[2] != places[1] == places[3]


def test_a_twin_works_beside_and_ends_with_its_parent():
    file = load_model_file(GPT, "tiny")
    started = []
    popen = subprocess.Popen

    class Noted(popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess, "Popen", Noted)
        with working_beside(file, 2, 1, 1):
            (twin,) = started
            assert twin.poll() is None
    assert twin.poll() is not None


@pytest.mark.slow
def test_the_command_writes_what_compile_takes(tmp_path):
    done = p2bw(
        *("profile", f"{GPT}:tiny", "--set", "layers=2", "--microbatch", "2", "--processes", "1"),
        *("--json", "--out", "p.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["profile"] == "p.json"
    profile = read_profile(tmp_path / "p.json")
    assert profile.microbatches == (2,)
    assert profile.steps[0].check is not None
    done = p2bw(
        *("compile", f"{GPT}:tiny", "--set", "layers=2", "--profile", "p.json", "--gpus", "2"),
        *("--depth", "2", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["topology"]["device"]["name"].startswith("measured: ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"microbatches": (0,)}, "--microbatch 0"),
        ({"threads": 0}, "--threads 0"),
        ({"processes": 100}, "--processes 100"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        driver.profile_model(GPT, factory="tiny", **options)


def test_what_the_commands_do_can_be_called():
    import p2bw as package

    assert package.profile is driver.profile_model
    assert package.rehearse is rehearsal.rehearse
