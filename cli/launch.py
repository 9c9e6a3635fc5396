"""Start all ranks of a run on this machine, through torchrun."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from p2bw.contract.check import planned_stash
from p2bw.contract.errors import P2BWError, StoppedError, UsageError
from p2bw.contract.job import Job, Options, command
from p2bw.contract.schedule import make_pipeline
from p2bw.contract.tensors import writing
from p2bw.contract.weightfiles import WeightFiles
from p2bw.export import export
from p2bw.runtime.failure import EXIT_CODES, FAILURE_FILE
from p2bw.runtime.prepare import Prepared, prepare
from p2bw.slurm import batch_script
from p2bw.telemetry.trace import join_parts


def run(
    artifact: str | Path,
    *,
    steps: int,
    seed: int = 0,
    schedule: str | None = None,
    microbatches: int | None = None,
    clip_norm: float | None = None,
    weights: str | Path | None = None,
    init: str = "auto",
    save: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: str | Path | None = None,
    device: str | None = None,
    model: str | Path | None = None,
    timeout_s: float = 120,
    max_restarts: int = 0,
    slurm: str | Path | None = None,
    threads: int | None = None,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    trace: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train an artifact on this machine: {"losses", "samples_per_s", "utilisation"}.

    Progress and the torchrun line go to stderr. If a rank fails, its error is raised here; after
    the first `max_restarts` failures the run goes on from its last checkpoint by itself.
    `slurm`: write a batch script that trains it on a cluster, and do nothing else: {"script"}.
    """
    job = Job(
        artifact=Path(artifact),
        steps=steps,
        seed=seed,
        schedule=schedule,
        microbatches=microbatches,
        clip_norm=clip_norm,
        weights=Path(weights) if weights else None,
        init=init,
        model=Path(model) if model else None,
    )
    if init not in ("auto", "whole", "modules"):
        raise UsageError(f"--init {init}: it is auto, whole or modules")
    prepared = prepare(job)  # what is wrong with the files is said before anything starts
    if job.weights is not None:
        WeightFiles(job.weights)
    ranks = prepared.plan.ranks
    for line in _too_full(prepared):
        print(line, file=sys.stderr, flush=True)
    options = Options(
        device=device or ("cuda" if torch.cuda.device_count() >= ranks else "cpu"),
        timeout_s=timeout_s,
        threads=threads,
        checkpoint=Path(checkpoint) if checkpoint else None,
        checkpoint_every=checkpoint_every,
        keep=keep,
        resume=str(resume) if resume else None,
        metrics=Path(metrics) if metrics else None,
        tensorboard=Path(tensorboard) if tensorboard else None,
        trace=Path(trace) if trace else None,
        quiet=quiet,
    )
    if slurm is not None:
        if save is not None:
            raise UsageError("--save does not go with --slurm: p2bw export writes the weights")
        text = batch_script(job, replace(options, device=device), ranks, Path.cwd(), max_restarts)
        with writing(Path(slurm)):
            Path(slurm).write_text(text, encoding="utf-8")
        return {"script": str(slurm)}
    if save is None:
        return _start(job, options, ranks, max_restarts)
    with _saved(Path(save), options, job.artifact) as options:
        return _start(job, options, ranks, max_restarts)


@contextmanager
def _saved(out: Path, options: Options, artifact: Path) -> Iterator[Options]:
    """Export what is trained meanwhile. It needs a checkpoint, which is kept if it is asked for."""
    scratch = None
    folder = options.checkpoint or artifact / "checkpoints"
    if options.checkpoint is None and options.checkpoint_every is None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            if options.resume != "last":
                folder = scratch = Path(tempfile.mkdtemp(prefix=".trained-", dir=out))
        options = replace(options, checkpoint=folder)
    try:
        yield options
        export(folder, out=out, artifact=artifact)
    except StoppedError:
        scratch = None  # the run can go on from there
        raise
    finally:
        if scratch is not None:
            shutil.rmtree(scratch)


def _start(job: Job, options: Options, ranks: int, max_restarts: int) -> dict[str, Any]:
    """Run all ranks, and give the result of rank 0."""
    with tempfile.TemporaryDirectory(prefix="p2bw-run-") as scratch:
        result, failure = Path(scratch, "result.json"), Path(scratch, "failure.json")
        if not options.quiet:
            shown = shlex.join(command(job, options, ranks, max_restarts))
            print(shown, file=sys.stderr, flush=True)
        line = command(job, replace(options, result=result), ranks, max_restarts)
        # What torchrun is to pass on to the ranks; of itself it would die of SIGUSR1.
        signals = ",".join(number.name for number in EXIT_CODES)
        line.insert(line.index("--standalone"), f"--signals-to-handle={signals}")
        status = _execute(line, failure)
        if options.trace is not None:
            join_parts(options.trace, ranks)  # what the ranks of a run that failed have left
        if failure.exists() and status != 0:
            _raise(json.loads(failure.read_text(encoding="utf-8")))
        if status != 0 or not result.exists():
            raise P2BWError(f"torchrun ended with status {status}; what it said is above")
        summary: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return summary


def _too_full(prepared: Prepared) -> Iterator[str]:
    """A warning, if what differs from the plan may need more memory than there is."""
    plan, now = prepared.plan, prepared.pipeline
    then = make_pipeline(plan, batches=now.batches, clipped=plan.clip_norm is not None)
    read = json.loads((prepared.job.artifact / "plan.json").read_text(encoding="utf-8"))
    full = []
    for k, memory in enumerate(stage.get("memory") for stage in read["stages"]):
        growth = {
            "weights": now.copies(k) / then.copies(k),
            "gradients": (1 + now.late) / (1 + then.late),
            "stash": planned_stash(now, k) / planned_stash(then, k),
        }
        if memory and max(growth.values()) > 1:
            needs = memory["total"] + sum(memory[kind] * (by - 1) for kind, by in growth.items())
            full += [str(k)] if needs > memory["limit"] else []
    if full:
        yield (
            f"p2bw: stages {', '.join(full)} may run out of memory: they were planned for "
            f"{plan.schedule}, {plan.microbatches_per_update} microbatches per update and "
            f"{'' if plan.clip_norm else 'no '}clipping; compile with what the run is given"
        )


def _execute(line: list[str], failure: Path) -> int:
    """Run torchrun and pass on what the ranks say, but not its own long words on a failure."""
    environment = os.environ | {FAILURE_FILE: str(failure)}
    environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its warning
    with (
        subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C comes here alone
        ) as process,
        _passing_on(process) as received,
    ):
        assert process.stdout is not None
        for text in process.stdout:
            if not failure.exists() and not received:
                print(text, end="", file=sys.stderr, flush=True)
    if received and not failure.exists() and process.returncode:
        error = StoppedError(f"stopped by {received[0].name} before it began")
        error.exit_code = EXIT_CODES[received[0]]
        raise error
    return process.returncode


@contextmanager
def _passing_on(process: subprocess.Popen[str]) -> Iterator[list[signal.Signals]]:
    """Pass signals on, so that the ranks save and leave; Ctrl-C a second time ends them at once."""
    received: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if received.count(signal.SIGINT) and number == signal.SIGINT:
            process.kill()
            raise KeyboardInterrupt
        received.append(signal.Signals(number))
        process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():  # cannot have handlers
        yield received
        return
    before = {number: signal.signal(number, pass_on) for number in EXIT_CODES}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(record: dict[str, Any]) -> None:
    if record["traceback"]:
        print(record["traceback"], file=sys.stderr, flush=True)
    kinds = {kind.__name__: kind for kind in _family(P2BWError)}
    error = kinds.get(record["kind"], P2BWError)(record["message"])
    error.exit_code = record["exit_code"]  # its kind may not be known in this process
    raise error


def _family(kind: type[P2BWError]) -> list[type[P2BWError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _family(child))]
