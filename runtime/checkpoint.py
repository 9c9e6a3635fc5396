"""Saving what a rank needs to go on while training goes on, and going on from it.

A checkpoint is written beside, synced, and renamed when every rank's part is there. Tensors are
found by the model's own names, so another plan of the same model can go on from it.
"""

import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from torch import Tensor, nn

from p2bw.contract.checkpoint import (
    MANIFEST,
    MARK,
    SCHEMA,
    DamageError,
    File,
    Manifest,
    StageState,
    commits,
    open_checkpoint,
)
from p2bw.contract.errors import MismatchError, UsageError
from p2bw.contract.job import Options
from p2bw.contract.store import Store, wait_for
from p2bw.contract.tensors import sync_folder, write_synced, write_tensors, writing
from p2bw.runtime.prepare import Prepared
from p2bw.runtime.worker import Start

_PATIENCE_S = 30  # until a file that another machine has written must be visible here


class Checkpointer:
    """Saves one rank's part of a run, in a thread of its own; that of rank 0 commits the whole."""

    def __init__(
        self,
        prepared: Prepared,
        options: Options,
        rank: int,
        module: nn.Module,
        store: Store,
        start: Start | None = None,
        path: Path | None = None,  # the checkpoint of that start
    ) -> None:
        self.every, self.keep = options.checkpoint_every, options.keep
        if self.keep < 1 or (self.every is not None and self.every < 1):
            raise UsageError("--keep and --checkpoint-every are at least 1")
        plan, pipeline = prepared.plan, prepared.pipeline
        self.manifest = Manifest(  # of the start
            schema=SCHEMA,
            step=start.step if start else 0,
            items=start.items if start else 0,
            seed=prepared.job.seed,
            schedule=pipeline.schedule,
            depth=plan.depth,
            width=plan.width,
            microbatch=plan.microbatch,
            microbatches=pipeline.microbatches,
            model=plan.model,
            tied=tuple(tied.names for tied in plan.tied),
            files=(),
        )
        self.folder = _folder(prepared, options)
        self.rank, self.ranks, self.store = rank, plan.ranks, store
        self.stage, self.replica = plan.position(rank)
        self.frozen = {
            f"frozen/{name}": p for name, p in module.named_parameters() if not p.requires_grad
        }
        own = path is not None and path.resolve().parent == self.folder.resolve()
        self.saved = self.manifest.step if own else None
        self.copies: dict[str, Tensor] = {}  # in host memory, filled anew for each save
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.own = own
        self.opened = False

    def open(self, say: Callable[[str], None]) -> None:
        """Make the folder ready; rank 0 before any rank saves."""
        self.opened = True
        if self.rank == 0:
            with writing(self.folder):
                self._tidy(say)

    def open_somewhere(self, say: Callable[[str], None]) -> None:
        """For a run that did not mean to save, but was stopped: nothing else is overwritten."""
        if self.rank == 0:
            count, wish = 1, self.folder
            while commits(self.folder) and not self.own:
                count += 1
                self.folder = wish.with_name(f"{wish.name}-{count}")
            self.open(say)
            self.store.set("folder", str(self.folder))
        self.folder, self.opened = Path(wait_for(self.store, "folder").decode()), True

    def wants(self, step: int) -> bool:
        """Whether to save after this update; raises what went wrong while the last was written."""
        self._raise()
        return self.every is not None and step % self.every == 0

    def save(self, step: int, state: StageState) -> None:
        """Copy the state, and write the copy while training goes on, one at a time."""
        self.wait()
        if step == self.saved:
            return
        self.saved = step
        live = state.tensors | self.frozen
        if self.replica > 0:  # all else is as in replica 0
            live = {key: tensor for key, tensor in live.items() if key.startswith("buffers/")}
        for key, tensor in live.items():
            if key not in self.copies:
                self.copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
            elif key in self.frozen:
                continue
            self.copies[key].copy_(tensor.detach())
        tensors = {key: self.copies[key] for key in live}
        values = json.dumps({} if self.replica else state.values, default=_refuse)
        self.thread = threading.Thread(
            target=self._write, args=(step, tensors, values), name="checkpoint", daemon=True
        )
        self.thread.start()

    def wait(self) -> None:
        """Until this rank writes nothing any more; raises what went wrong."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self._raise()

    @property
    def last(self) -> Path:
        """The checkpoint of the last save."""
        return self.folder / f"step-{self.saved or 0:08}"

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _write(self, step: int, tensors: Mapping[str, Tensor], values: str) -> None:
        """The thread: this rank's part; on rank 0 then the whole."""
        beside = self.folder / f"step-{step:08}.new"
        try:
            with writing(beside):
                part = self._write_part(beside, tensors, values) if tensors else None
                told = json.dumps(part and asdict(part))
                self.store.set(f"checkpoint/{step}/{self.rank}", told)
                if self.rank == 0:
                    self._commit(step, beside)
        except Exception as error:
            self.error = error  # the training thread raises it, which ends all ranks

    def _write_part(self, beside: Path, tensors: Mapping[str, Tensor], values: str) -> File:
        other = f"-replica-{self.replica}" if self.replica else ""
        path = beside / f"stage-{self.stage}{other}.safetensors"
        beside.mkdir(parents=True, exist_ok=True)
        try:
            size, digest = write_tensors(path, tensors, tensors.__getitem__, {"p2bw": values})
            sync_folder(beside)
        except OSError:
            path.unlink(missing_ok=True)  # there may be no space for it
            raise
        return File(
            name=path.name, bytes=size, sha256=digest, stage=self.stage, replica=self.replica
        )

    def _commit(self, step: int, beside: Path) -> None:
        """Wait for all parts, and make them a checkpoint."""
        files = []
        for rank in range(self.ranks):
            if told := json.loads(wait_for(self.store, f"checkpoint/{step}/{rank}")):
                names = _names_in(beside / told["name"], told["bytes"], rank)
                files.append(File(**told | {"tensors": names}))
        at = self.manifest
        items = at.items + (step - at.step) * at.microbatches * at.width
        manifest = replace(at, step=step, items=items, files=tuple(files))
        text = json.dumps(asdict(manifest), indent=1).encode()
        write_synced(beside / MANIFEST, [text])
        write_synced(beside / MARK, [hashlib.sha256(text).hexdigest().encode()])
        sync_folder(beside)
        beside.rename(beside.with_suffix(""))
        sync_folder(self.folder)
        # Half of an old one must not pass for a whole: it is renamed before it is removed.
        old = [p.rename(p.with_suffix(".old")) for p in commits(self.folder)[self.keep :]]
        sync_folder(self.folder)
        for path in old:
            shutil.rmtree(path)

    def _tidy(self, say: Callable[[str], None]) -> None:
        """Remove what an interrupted run left, and set aside what this one is to write anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):  # rather now than after hours of training
            pass
        for path in self.folder.iterdir():
            if re.fullmatch(r"step-\d{8}\.(new|old)", path.name):
                shutil.rmtree(path)
        existing = commits(self.folder)
        if existing and not self.own:
            raise UsageError(
                f"{self.folder} has checkpoints, the newest {existing[0].name}: go on from there "
                f"with --resume last, or give another folder with --checkpoint"
            )
        for path in existing:
            if path.name > f"step-{self.manifest.step:08}":
                aside = path.with_suffix(".aside")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                say(f"{path} is {aside.name} now, as the run goes on from an earlier step")
        sync_folder(self.folder)


def _refuse(value: object) -> NoReturn:
    raise UsageError(
        f"the optimizer keeps a {type(value).__name__} inside of its state, and checkpoints hold "
        f"tensors and plain values alone; use another one, or no --checkpoint"
    )


def _folder(prepared: Prepared, options: Options) -> Path:
    return options.checkpoint or prepared.job.artifact / "checkpoints"


def _names_in(path: Path, size: int, rank: int) -> tuple[str, ...]:
    """The names in a file that a rank has written."""
    give_up_s = time.monotonic() + _PATIENCE_S
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > give_up_s:
            raise UsageError(
                f"rank {rank} wrote {path}, which rank 0 does not see: --checkpoint must be a "
                f"folder that all machines share"
            )
        time.sleep(0.1)
    with safe_open(path, framework="pt") as file:
        return tuple(sorted(file.keys()))


def begin(
    prepared: Prepared,
    options: Options,
    rank: int,
    module: nn.Module,
    store: Store,
    *,
    restarted: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Prepared, Start | None, Checkpointer]:
    """What a run goes on from, its schedule from there, and what saves it.

    One that torchrun has `restarted` goes on from its own last checkpoint.
    """
    folder = _folder(prepared, options)
    saves = options.checkpoint is not None or options.checkpoint_every is not None
    start = path = None
    if options.resume or (restarted and saves):
        resume = "last" if restarted and commits(folder) else options.resume or "last"
        if paths := candidates(folder, resume, rank, store):
            start, path = find_start(paths, prepared, rank, module, store, say)
        else:
            say(f"{folder} has no checkpoint: the run starts from the beginning")
    if start is not None:
        if start.step > prepared.job.steps:
            raise UsageError(
                f"{path} is after step {start.step}; --steps {prepared.job.steps} counts from the "
                f"very beginning too"
            )
        prepared = replace(prepared, pipeline=replace(prepared.pipeline, first=start.step))
    saver = Checkpointer(prepared, options, rank, module, store, start, path)
    if saves:
        saver.open(say)
    return prepared, start, saver


def candidates(folder: Path, resume: str, rank: int, store: Store) -> list[Path]:
    """The checkpoints that a run may go on from, the same on all ranks: those that rank 0 sees.

    `resume` is "last", a checkpoint, or another folder of them.
    """
    if rank == 0:
        paths = commits(folder) if resume == "last" else commits(Path(resume)) or [Path(resume)]
        store.set("resume", json.dumps(list(map(str, paths))))
    return [Path(path) for path in json.loads(wait_for(store, "resume"))]


def find_start(
    paths: Sequence[Path],
    prepared: Prepared,
    rank: int,
    module: nn.Module,
    store: Store,
    say: Callable[[str], None] = print,
) -> tuple[Start, Path]:
    """What a run goes on from: the first of some checkpoints that all ranks find whole.

    The module gets its frozen parameters from it; before all ranks agree, nothing is changed.
    """
    plan, damages = prepared.plan, []
    stage, replica = plan.position(rank)
    for number, path in enumerate(paths):
        own = ""
        try:
            saved = open_checkpoint(path)
            state = saved.read_stage(module, plan, replica, prepared.job.seed)
        except DamageError as error:
            own = str(error)
        store.set(f"resume/{number}/{rank}", own)
        if rank == 0:
            told = [wait_for(store, f"resume/{number}/{r}").decode() for r in range(plan.ranks)]
            store.set(f"resume/{number}", next(filter(None, told), ""))
        if damage := wait_for(store, f"resume/{number}").decode():
            damages.append(damage)
            continue
        if damages:
            say(f"{'; '.join(damages)}; an earlier checkpoint is used")
        one = prepared.pipeline.copies(stage) > 1 and saved.manifest.schedule in ("flush", "gpipe")
        more = ", whose one version of the weights stands for all" if one else ""
        start = Start(state, saved.manifest.step, saved.manifest.items_of(plan.microbatch))
        say(f"going on from {path}, after step {start.step}{more}")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if (value := state.tensors.pop(f"frozen/{name}", None)) is not None:
                    parameter.copy_(value)
        return start, path
    raise MismatchError(f"there is no whole checkpoint: {'; '.join(damages)}")
