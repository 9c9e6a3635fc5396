"""Checkpoints as files: what is saved is found again, whole, or it is said that it is not."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crashes import Crash, Disk
from handmade import write_artifact
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from safetensors.torch import load_file
from torch import Tensor, nn

from p2bw.contract.checkpoint import StageState, commits
from p2bw.contract.errors import MismatchError, P2BWError, ResourceError, UsageError
from p2bw.contract.job import Job, Options
from p2bw.contract.stages import load_stage
from p2bw.contract.tensors import _DTYPES, write_tensors
from p2bw.runtime import checkpoint
from p2bw.runtime.checkpoint import Checkpointer, candidates, find_start
from p2bw.runtime.prepare import Prepared, prepare
from p2bw.runtime.worker import Start


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy disk a sync takes seconds. That they are made is what Lives is about."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Ranks:
    """All ranks of a run, without training: their states are made up, as functions of the step."""

    def __init__(self, artifact: Path, folder: Path, *, keep: int = 2, seed: int = 0) -> None:
        self.prepared: Prepared = prepare(Job(artifact=artifact, steps=1, seed=seed))
        self.plan = self.prepared.plan
        self.folder, self.keep = folder, keep
        self.modules = [self.module(rank) for rank in range(self.plan.ranks)]
        self.store = dist.HashStore()
        self.savers: list[Checkpointer] = []
        self.said: list[str] = []

    def module(self, rank: int) -> nn.Module:
        return load_stage(self.prepared.job.artifact, self.plan.position(rank)[0])

    def state(self, rank: int, step: int) -> StageState:
        """Every tensor depends on its name, step and, if it is a buffer, replica."""
        state, replica = StageState(), self.plan.position(rank)[1]
        names = {a: t.names[0] for t in self.plan.tied for a in t.names}
        for name, tensor in self.modules[rank].named_parameters():
            if tensor.requires_grad:
                of = names.get(name, name)
                for key in ("weights", "previous", "optimizer/momentum"):
                    state.tensors[f"{key}/{name}"] = made(tensor, f"{key}/{of}", step)
                state.tensors[f"optimizer/step/{name}"] = torch.tensor(float(step))
                state.values[name] = {"state": {"of": of}, "group": {"lr": 0.1 * step}}
        for name, tensor in self.modules[rank].named_buffers():
            state.tensors[f"buffers/{name}"] = made(tensor, f"{name} of {replica}", step)
        return state

    def begin(self, start: Start | None = None, path: Path | None = None) -> None:
        self.store = dist.HashStore()
        options = Options(checkpoint=self.folder, checkpoint_every=1, keep=self.keep)
        self.savers = [
            Checkpointer(
                *(self.prepared, options, rank, self.modules[rank], self.store, start, path)
            )
            for rank in range(self.plan.ranks)
        ]
        for saver in self.savers:
            saver.open(self.said.append)

    def save(self, step: int) -> None:
        """One rank after the other, the one that commits last."""
        for rank in reversed(range(self.plan.ranks)):
            self.savers[rank].save(step, self.state(rank, step))
            if rank:
                self.savers[rank].wait()
        self.savers[0].wait()

    def find(self, resume: str = "last") -> tuple[list[Start | None], Path | None]:
        """What each rank finds to go on from; they must agree about the checkpoint."""
        found: dict[int, tuple[Start | None, Path | None]] = {}
        errors: dict[int, P2BWError] = {}
        store = dist.HashStore()

        def look(rank: int) -> None:
            try:
                if paths := candidates(self.folder, resume, rank, store):
                    say = self.said.append if rank == 0 else lambda text: None
                    module = self.modules[rank]
                    found[rank] = find_start(paths, self.prepared, rank, module, store, say)
                else:
                    found[rank] = None, None
            except P2BWError as error:
                errors[rank] = error

        threads = [threading.Thread(target=look, args=(r,)) for r in range(self.plan.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        if errors:
            assert len(errors) == self.plan.ranks
            raise errors[0]
        assert len({path for _, path in found.values()}) == 1
        return [found[rank][0] for rank in range(self.plan.ranks)], found[0][1]

    def check(self, starts: list[Start | None], step: int) -> None:
        """The ranks have found exactly what was saved at a step."""
        for rank, start in enumerate(starts):
            want = self.state(rank, step)
            assert start is not None
            assert start.step == step
            assert start.state.values == want.values
            assert start.state.tensors.keys() == want.tensors.keys()
            for key, tensor in want.tensors.items():
                assert torch.equal(start.state.tensors[key], tensor), (rank, key)


def made(like: Tensor, name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash_of(f"{name} {step}"))
    return torch.randint(-100, 100, like.shape, generator=generator).to(like.dtype)


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode()[-7:], "big") + len(text)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(write_artifact(tmp_path / "a", depth=2, width=2), tmp_path / "checkpoints")


def test_what_is_saved_is_found_again(ranks: Ranks) -> None:
    ranks.begin()
    for step in (1, 2, 5):
        ranks.save(step)
    starts, path = ranks.find()
    assert path == ranks.folder / "step-00000005"
    ranks.check(starts, 5)
    assert sorted(p.name for p in ranks.folder.iterdir()) == ["step-00000002", "step-00000005"]
    assert sorted(p.name for p in path.iterdir()) == [
        "COMMITTED",
        "manifest.json",
        "stage-0-replica-1.safetensors",
        "stage-0.safetensors",
        "stage-1-replica-1.safetensors",
        "stage-1.safetensors",
    ]
    # Four microbatches of an update are two of each replica.
    assert starts[0] is not None
    assert starts[0].items == 5 * 2 * 2
    ranks.check(ranks.find(str(ranks.folder / "step-00000002"))[0], 2)
    ranks.check(ranks.find(str(ranks.folder))[0], 5)  # the newest of a folder
    assert ranks.said == [
        f"going on from {path}, after step 5",
        f"going on from {ranks.folder / 'step-00000002'}, after step 2",
        f"going on from {path}, after step 5",
    ]


def test_frozen_parameters_are_saved_and_put_back(ranks: Ranks) -> None:
    gain = ranks.modules[0].get_parameter("h.0.gain")
    with torch.no_grad():
        gain.fill_(7)
    ranks.begin()
    ranks.save(1)
    with torch.no_grad():
        gain.fill_(8)
    ranks.check(ranks.find()[0], 1)
    assert gain.tolist() == [7] * 8
    held = load_file(ranks.folder / "step-00000001" / "stage-0.safetensors")
    assert held["frozen/h.0.gain"].tolist() == [7] * 8


def test_the_copy_is_of_the_moment_of_saving(ranks: Ranks) -> None:
    """Training overwrites the tensors while they are written."""
    ranks.begin()
    for rank, saver in enumerate(ranks.savers):
        state = ranks.state(rank, 1)
        saver.save(1, state)
        for tensor in state.tensors.values():
            tensor.zero_()
    ranks.savers[0].wait()
    ranks.check(ranks.find()[0], 1)


def test_what_an_optimizer_may_not_keep_is_named(ranks: Ranks) -> None:
    ranks.begin()
    state = ranks.state(0, 1)
    state.values["wte.weight"]["state"]["history"] = [torch.ones(2)]
    with pytest.raises(UsageError, match="the optimizer keeps a Tensor inside of its state"):
        ranks.savers[0].save(1, state)


def test_without_a_checkpoint_the_run_starts_from_the_beginning(ranks: Ranks) -> None:
    assert ranks.find() == ([None] * 4, None)
    with pytest.raises(MismatchError, match=r"nowhere/manifest.json cannot be read: No such file"):
        ranks.find("nowhere")


def damage(path: Path, kind: str) -> None:
    """One of the ways in which a file goes bad."""
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    elif kind == "missing":
        path.unlink()
    else:
        other = next(p for p in sorted(path.parent.glob("stage-*")) if p != path)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("stage-1.safetensors", "flipped", "stage-1.safetensors is not as it was written"),
        ("stage-1.safetensors", "truncated", r"stage-1.safetensors has \d+ bytes of \d+"),
        ("stage-0-replica-1.safetensors", "missing", "cannot be read: No such file"),
        ("stage-0.safetensors", "swapped", r"stage-0.safetensors has \d+ bytes of \d+"),
        ("manifest.json", "flipped", "manifest.json is not as it was written"),
        ("manifest.json", "missing", "manifest.json cannot be read"),
        ("COMMITTED", "flipped", "manifest.json is not as it was written"),
        ("COMMITTED", "missing", "COMMITTED cannot be read"),
    ],
)
def test_damage_is_seen_before_any_weight_changes(
    ranks: Ranks, name: str, kind: str, message: str
) -> None:
    ranks.begin()
    ranks.save(1)
    ranks.save(2)
    last = ranks.folder / "step-00000002"
    damage(last / name, kind)
    starts, path = ranks.find()
    assert path == ranks.folder / "step-00000001"
    ranks.check(starts, 1)
    (first, second) = ranks.said
    assert first.endswith("; an earlier checkpoint is used")
    assert name in first or name == "COMMITTED"
    assert second == f"going on from {path}, after step 1"

    frozen = [p.clone() for m in ranks.modules for p in m.parameters() if not p.requires_grad]
    with pytest.raises(MismatchError, match=message) as refused:
        ranks.find(str(last))
    assert refused.value.exit_code == 7
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            frozen,
            (p for m in ranks.modules for p in m.parameters() if not p.requires_grad),
            strict=True,
        )
    )
    damage(ranks.folder / "step-00000001" / name, kind)
    with pytest.raises(MismatchError, match=r"there is no whole checkpoint: .*; .*"):
        ranks.find()


def test_a_damaged_checkpoint_is_set_aside_and_never_counted(ranks: Ranks) -> None:
    ranks.begin()
    ranks.save(1)
    ranks.save(2)
    damage(ranks.folder / "step-00000002" / "stage-0.safetensors", "flipped")
    starts, path = ranks.find()
    ranks.keep = 1
    ranks.begin(starts[0], path)
    assert ranks.said[-1].endswith(
        "step-00000002 is step-00000002.aside now, as the run goes on from an earlier step"
    )
    ranks.save(2)
    assert sorted(p.name for p in ranks.folder.iterdir()) == [
        "step-00000002",
        "step-00000002.aside",
    ]
    ranks.check(ranks.find()[0], 2)


@pytest.mark.parametrize(("depth", "width", "microbatch"), [(1, 1, 3), (4, 1, 3), (3, 3, 6)])
def test_another_plan_goes_on_from_it(
    ranks: Ranks, tmp_path: Path, depth: int, width: int, microbatch: int
) -> None:
    """Other cuts, ties within and between stages, more replicas than there were."""
    ranks.begin()
    ranks.save(6)
    artifact = write_artifact(tmp_path / "other", depth=depth, width=width, microbatch=microbatch)
    other = Ranks(artifact, ranks.folder)
    starts, _ = other.find()
    owners = {rank: other.plan.position(rank) for rank in range(other.plan.ranks)}
    for rank, start in enumerate(starts):
        want = other.state(rank, 6)
        assert start is not None
        assert start.items == 6 * 2 * 2 * 3 // microbatch
        replica = min(owners[rank][1], 1)
        for name, buffer in other.modules[rank].named_buffers():
            want.tensors[f"buffers/{name}"] = made(buffer, f"{name} of {replica}", 6)
        assert start.state.tensors.keys() == want.tensors.keys()
        assert start.state.values == want.values
        for key, tensor in want.tensors.items():
            assert torch.equal(start.state.tensors[key], tensor), (rank, key)


def test_constants_of_the_stage_s_code_follow_the_microbatch(ranks: Ranks, tmp_path: Path) -> None:
    for module in ranks.modules:
        module.register_buffer("ramp", torch.arange(3), persistent=False)
    ranks.begin()
    ranks.save(1)
    ranks.check(ranks.find()[0], 1)
    artifact = write_artifact(tmp_path / "other", depth=2, width=2, microbatch=6)
    other = Ranks(artifact, ranks.folder)
    for module in other.modules:
        module.register_buffer("ramp", torch.arange(6), persistent=False)
        module.register_buffer("new", torch.arange(6), persistent=False)
    starts, _ = other.find()
    assert starts[0] is not None
    assert "buffers/ramp" not in starts[0].state.tensors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"edit": lambda text: text + "# edited\n"}, "is of another model file"),
        ({"optimizer": "adamw"}, "is of optimizer='sgd'; the plan is of optimizer='adamw'"),
        ({"microbatch": 7}, "no whole number of 7; compile with --microbatch 3"),
    ],
)
def test_a_checkpoint_of_another_model_or_data_is_refused(
    ranks: Ranks, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    ranks.begin()
    ranks.save(1)
    other = write_artifact(tmp_path / "other", depth=2, width=2, **given)
    with pytest.raises(MismatchError, match=message):
        Ranks(other, ranks.folder).find()


def test_a_checkpoint_of_another_seed_is_refused(ranks: Ranks) -> None:
    ranks.begin()
    ranks.save(1)
    with pytest.raises(MismatchError, match="of a run with --seed 0, from which its data follow"):
        Ranks(ranks.prepared.job.artifact, ranks.folder, seed=1).find()


def test_names_and_shapes_that_differ_are_listed(ranks: Ranks) -> None:
    """The same model file may still build another model: its imports can change."""
    ranks.begin()
    ranks.save(1)
    for module in ranks.modules:
        module.extra, module.more = nn.Linear(2, 2), nn.BatchNorm1d(1)
    with pytest.raises(MismatchError, match=r"lacks extra.bias, extra.weight, more.bias, more.num"):
        ranks.find()
    for module in ranks.modules:
        del module.extra, module.more
        next(iter(module.h.values())).up = nn.Linear(8, 17)
    with pytest.raises(MismatchError, match=r"h\.\d\.up\.\w+ as float32\[16.*float32\[17"):
        ranks.find()


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """With the right mark, as somebody would who writes checkpoints by other means."""
    value = json.loads((folder / "manifest.json").read_text())
    edit(value)
    text = json.dumps(value).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMMITTED").write_text(checkpoint.hashlib.sha256(text).hexdigest())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("step"), "step should be int, is None"),
        (lambda m: m.update(items=-1), "items should be int, is -1"),
        (lambda m: m.update(width=0), "a size is zero"),
        (lambda m: m.update(files=5), "files should be tuple, is 5"),
        (lambda m: m["files"][0].update(name="../stage-0.safetensors"), "its files have other"),
        (lambda m: m["files"][0].update(name="/etc/passwd"), "its files have other names"),
        (lambda m: m["files"].append(m["files"][0]), "its files have other names"),
        (lambda m: m["files"][0]["tensors"].append("x"), "its tensors have other names"),
        (lambda m: m["files"][0]["tensors"].append(3), r"files.0.tensors.\d+ should be str, is 3"),
        (lambda m: m["files"][0]["tensors"].append("nothing/wte.weight"), "is no such file"),
        (lambda m: m["model"]["settings"].update(optimizer=["sgd"]), "is of optimizer=.'sgd'.;"),
        (lambda m: m["model"].update(settings=[]), "model.settings should be Mapping"),
        (lambda m: m.update(tied=[["a", 1]]), r"tied.0.1 should be str, is 1"),
    ],
)
def test_a_manifest_is_data_that_is_checked(
    ranks: Ranks, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    ranks.begin()
    ranks.save(1)
    edit_manifest(ranks.folder / "step-00000001", edit)
    with pytest.raises(MismatchError, match=message):
        ranks.find()


def test_a_manifest_of_a_later_version_is_refused_not_passed_over(ranks: Ranks) -> None:
    ranks.begin()
    ranks.save(1)
    ranks.save(2)
    for edit in ({"schema": 2}, {"schema": 3, "files": {"in": "another form"}}):
        edit_manifest(ranks.folder / "step-00000002", lambda m: m.update(edit))  # noqa: B023
        with pytest.raises(MismatchError, match=r"has schema \d, this version reads up to 1"):
            ranks.find()


def test_a_folder_with_another_run_s_checkpoints_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks.begin()
    ranks.save(3)
    with pytest.raises(UsageError, match="has checkpoints, the newest step-00000003: go on from"):
        ranks.begin()
    other = Ranks(ranks.prepared.job.artifact, tmp_path / "elsewhere")
    starts, path = other.find(str(ranks.folder / "step-00000003"))
    other.begin(starts[0], path)
    other.save(3)  # as it is: in a folder of its own
    other.save(4)
    assert [p.name for p in commits(other.folder)] == ["step-00000004", "step-00000003"]
    with pytest.raises(UsageError, match="has checkpoints, the newest step-00000004"):
        other.begin(starts[0], path)


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    ranks: Ranks, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ranks.folder = tmp_path / "file" / "checkpoints"
    with pytest.raises(UsageError, match=r"cannot write .*file/checkpoints"):
        ranks.begin()
    for arguments in ({"keep": 0}, {"checkpoint_every": 0}):
        options = Options(checkpoint=tmp_path / "x", **arguments)
        with pytest.raises(UsageError, match="are at least 1"):
            Checkpointer(ranks.prepared, options, 0, ranks.modules[0], ranks.store)


@pytest.mark.parametrize("full_after", [0, 1, 2, 3, 4, 5, 6])
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, full_after: int
) -> None:
    ranks.begin()
    ranks.save(1)
    left = full_after

    def sync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(ResourceError, match=r"no space left to write .*step-00000002.new") as full:
        ranks.save(2)
    assert full.value.exit_code == 8
    monkeypatch.undo()
    failed = next(saver for saver in ranks.savers if saver.error)
    with pytest.raises(ResourceError):
        failed.wants(3)  # so training ends
    ranks.check(ranks.find()[0], 1)
    starts, path = ranks.find()
    ranks.begin(starts[0], path)
    assert [p.name for p in ranks.folder.iterdir()] == ["step-00000001"]
    ranks.save(2)
    ranks.check(ranks.find()[0], 2)


def test_a_folder_that_is_not_shared_is_named(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_PATIENCE_S", 0.2)
    ranks.begin()
    ranks.savers[3].folder = tmp_path / "of another machine"
    ranks.savers[3].folder.mkdir()
    with pytest.raises(
        UsageError, match=r"rank 3 wrote .* must be a folder that all machines share"
    ):
        ranks.save(1)
    assert commits(ranks.folder) == []


def test_a_second_save_waits_for_the_first(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while a save is written, and no further than the next one."""
    go, real, order = threading.Event(), checkpoint.write_tensors, []

    def slow(path: Path, *arguments: Any) -> tuple[int, str]:
        assert go.wait(30)
        order.append(path.parent.name)
        return real(path, *arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    ranks.begin()
    saver = ranks.savers[1]
    saver.save(1, ranks.state(1, 1))  # comes back while nothing is written
    assert order == []
    second = threading.Thread(target=saver.save, args=(2, ranks.state(1, 2)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    go.set()
    second.join(30)
    saver.wait()
    saver.save(2, ranks.state(1, 2))  # as after a last update that was saved
    assert order == ["step-00000001.new", "step-00000002.new"]


def test_saves_come_every_so_many_updates(ranks: Ranks) -> None:
    ranks.begin()
    ranks.savers[0].every = 3
    assert [step for step in range(1, 10) if ranks.savers[0].wants(step)] == [3, 6, 9]
    ranks.savers[0].every = None
    assert not any(ranks.savers[0].wants(step) for step in range(1, 10))


@pytest.mark.parametrize("dtype", sorted(_DTYPES, key=str), ids=str)
def test_files_of_tensors_are_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(6).view(2, 3).to(dtype).t(),
        "scalar": torch.tensor(1).to(dtype),
        "nothing": torch.empty(0, 3, dtype=dtype),
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }
    path = tmp_path / "x.safetensors"
    size, digest = write_tensors(path, tensors, tensors.__getitem__, {"format": "pt"})
    assert size == path.stat().st_size
    assert digest == checkpoint.hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(UsageError, match=r"x is torch.complex128, which safetensors files cannot"):
        write_tensors(tmp_path / "x", tensors, tensors.__getitem__, {})


LOSSES = {"none": None, "contents": slice(0), "names": slice(None), "a name": slice(1)}


@pytest.mark.parametrize("names", LOSSES.values(), ids=LOSSES.keys())
def test_at_every_moment_of_a_save_a_crash_leaves_whole_checkpoints(
    tmp_path: Path, names: slice | None
) -> None:
    """Also while an old one is removed; and what the crash left is tidied up."""
    ranks = Ranks(write_artifact(tmp_path / "a", depth=2), tmp_path / "0", keep=1)
    for dies_at in count():
        ranks.folder = tmp_path / str(dies_at)
        disk = Disk(ranks.folder, dies_at)
        ranks.begin()
        ranks.save(1)
        with disk.mounted(), suppress(Crash):
            ranks.save(2)
        if names is not None:
            disk.lose_power(names)
        paths = commits(ranks.folder)
        assert paths
        for path in paths:
            ranks.check(ranks.find(str(path))[0], int(path.name[5:]))
        if not disk.dead:
            break
        starts, path = ranks.find()
        ranks.begin(starts[0], path)
        assert sorted(ranks.folder.iterdir()) == sorted(paths)
    assert dies_at > 20
    assert [path.name for path in paths] == ["step-00000002"]


DIES_AT = st.sampled_from(range(30))  # of the operations of a save, which are fewer
LOSS = st.sampled_from(list(LOSSES.values()))


class Lives(RuleBasedStateMachine):
    """Runs that save, crash at any operation on the disk, lose power, and find damaged files."""

    kinds = ("flipped", "truncated", "missing", "swapped")

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        root = Path(self.stack.enter_context(TemporaryDirectory(prefix="p2bw-lives-")))
        artifact = write_artifact(root / "a", depth=2)
        self.ranks = Ranks(artifact, root / "checkpoints")
        self.durable = 0  # the newest step whose commit was reported
        self.damaged: set[str] = set()
        self.step = 0
        self.running = False

    def teardown(self) -> None:
        self.stack.close()

    def present(self) -> dict[int, Path]:
        found = self.ranks.folder.glob("step-????????")
        return {int(path.name[5:]): path for path in found}

    def whole(self) -> list[Path]:
        """Those that nothing has damaged: twice flipped, a bit is as it was."""
        return [p for _, p in sorted(self.present().items()) if p.name not in self.damaged]

    @precondition(lambda self: not self.running)
    @rule()
    def begin(self) -> None:
        """The newest checkpoint that is not damaged is found, and is as it was saved."""
        present = self.present()
        whole = [int(path.name[5:]) for path in self.whole()]
        if self.durable in whole:
            assert max(whole) >= self.durable
        else:
            assert self.durable == 0 or f"step-{self.durable:08}" in self.damaged
        if present and not whole:
            with pytest.raises(MismatchError, match="there is no whole checkpoint"):
                self.ranks.find()
            shutil.rmtree(self.ranks.folder)
            self.damaged.clear()
        self.step = max(whole, default=0)
        starts, path = self.ranks.find()
        if whole:
            self.ranks.check(starts, self.step)
        else:
            assert path is None
        self.durable = self.step
        self.ranks.begin(starts[0], path)
        self.damaged &= {path.name for path in self.present().values()}
        self.running = True

    @precondition(lambda self: self.running)
    @rule(updates=st.integers(1, 2))
    def save(self, updates: int) -> None:
        self.step += updates
        self.ranks.save(self.step)
        self.durable = self.step
        assert len(self.present()) <= self.ranks.keep

    @precondition(lambda self: self.running)
    @rule(updates=st.integers(1, 2), dies_at=DIES_AT, loss=LOSS)
    def crash(self, updates: int, dies_at: int, loss: slice | None) -> None:
        """Of the process alone, or of the machine with what was not synced."""
        disk = Disk(self.ranks.folder, dies_at)
        with disk.mounted():
            try:
                self.ranks.save(self.step + updates)
                self.durable = self.step + updates
            except Crash:
                pass
        assert disk.operations > 15 or disk.dead
        self.stop(disk, loss)

    @precondition(lambda self: not self.running)
    @rule(dies_at=DIES_AT, loss=LOSS)
    def crash_at_start(self, dies_at: int, loss: slice | None) -> None:
        try:
            starts, path = self.ranks.find()
        except MismatchError:
            return
        disk = Disk(self.ranks.folder, dies_at)
        with disk.mounted(), suppress(Crash):
            self.ranks.begin(starts[0], path)
        self.stop(disk, loss)

    def stop(self, disk: Disk, loss: slice | None) -> None:
        if loss is not None:
            disk.lose_power(loss)
        self.running = False

    @precondition(lambda self: not self.running and self.whole())
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.whole()))
        files = sorted(p for p in path.iterdir())
        if files:
            damage(data.draw(st.sampled_from(files)), data.draw(st.sampled_from(self.kinds)))
            self.damaged.add(path.name)


Lives.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
TestLives = Lives.TestCase
