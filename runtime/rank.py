"""One rank of a run under torchrun: it meets the others, trains, saves and reports."""

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from p2bw.runtime.artifact import digests
from p2bw.runtime.errors import MismatchError, UsageError
from p2bw.runtime.job import Job, Options, command
from p2bw.runtime.prepare import Prepared, channel_specs, initial_stage, prepare
from p2bw.runtime.report import Report, write_result
from p2bw.runtime.save import prepare_folder, save_stage, write_index
from p2bw.runtime.transport import DistributedTransport, PeerError
from p2bw.runtime.worker import Events, Update, Worker


class Store(Protocol):
    """The keys and values that all ranks share: torch.distributed's store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where torchrun has put this process."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    attempt: int


def find_place(job: Job) -> Place:
    try:
        return Place(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )
    except KeyError as missing:
        line = " ".join(command(job, Options(), ranks="N"))
        raise UsageError(
            f"{missing} is not set: the ranks are started by torchrun, as in {line}"
        ) from None


def connect(place: Place, timeout_s: float) -> Store:
    """The store that torchrun's agent keeps for its workers."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise PeerError(f"no contact with {host}:{port}: {error}") from None
    shared: Store = dist.PrefixStore(f"p2bw/{place.attempt}", store)  # type: ignore[attr-defined]
    return shared


class Listener(Events):
    """What a rank's worker asks and tells, passed on to the parts that know."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def update(self, update: Update) -> None:
        self.report.update(update.batch, update.loss, update.learning_rate, update.norm)


def run_rank(job: Job, options: Options, place: Place, store: Store) -> None:
    """Do one rank's part of a job, from reading the artifact to the last message."""
    if options.threads:
        torch.set_num_threads(options.threads)
    prepared = prepare(job)
    if prepared.plan.ranks != place.world:
        raise MismatchError(
            f"{job.artifact} is a plan for {prepared.plan.ranks} ranks, torchrun started "
            f"{place.world}; use --nproc-per-node {prepared.plan.ranks} on one machine"
        )
    compare_ranks(prepared, place, store)
    if options.save is not None:
        prepare_folder(options.save)
    device = choose_device(options.device, place)
    join(device, options.timeout_s, place, store)
    report = Report(prepared, say=place.rank == 0 and not options.quiet)
    worker = build(prepared, place.rank, device, Listener(report))
    if place.rank == 0:
        report.open(options, done=0)
    meet(place, store, "ready")
    report.start(worker.clock)
    worker.run()
    busy_s = worker.clock.busy_s()  # on a GPU: when it has done all this
    elapsed_s = report.stop()
    if options.save is not None:
        save(options.save, prepared, worker, place.rank, store)
    utilisation = gather_utilisation(busy_s, elapsed_s, place, store)
    if options.result is not None and place.rank == 0:
        write_result(options.result, report.summary(utilisation))
    # Leave together: a rank that closes its connections early looks like one that died.
    meet(place, store, "done")
    dist.destroy_process_group()


def build(prepared: Prepared, rank: int, device: torch.device, events: Events) -> Worker:
    plan = prepared.plan
    stage, replica = plan.position(rank)
    module = initial_stage(prepared, stage, device)
    transport = DistributedTransport(
        channels=prepared.pipeline.channels,
        specs=channel_specs(prepared, stage, module),
        peers={s.index: s.devices[replica] for s in plan.stages},
        stage=stage,
        device=device,
        replicas=[s.devices for s in plan.stages],
    )
    return Worker(prepared, rank, module, device, transport, events)


def choose_device(asked: str | None, place: Place) -> torch.device:
    """A GPU of its own if there are enough; with --device cuda ranks may share one."""
    gpus = torch.cuda.device_count()
    name = asked or ("cuda" if gpus >= place.local_world else "cpu")
    if name == "cuda":
        if gpus == 0:
            raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
        device = torch.device("cuda", place.local_rank % gpus)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def join(device: torch.device, timeout_s: float, place: Place, store: Store) -> None:
    """Make the process group; on one machine its messages never leave the machine."""
    own_gpu = device.type == "cuda" and torch.cuda.device_count() >= place.local_world
    if place.local_world == place.world and "GLOO_SOCKET_IFNAME" not in os.environ:
        for name in {"lo", "lo0"}.intersection(name for _, name in socket.if_nameindex()):
            os.environ["GLOO_SOCKET_IFNAME"] = name
    dist.init_process_group(
        "nccl" if own_gpu else "gloo",
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined, arg-type]
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=timeout_s),
    )


def compare_ranks(prepared: Prepared, place: Place, store: Store) -> None:
    """Refuse to start unless all ranks have the same artifact, model file, torch and options."""
    job = asdict(prepared.job)
    own = digests(prepared.job.artifact, prepared.plan) | {
        "torch": torch.__version__,
        **{f"--{key}": str(job[key]) for key in ("steps", "seed", "schedule", "microbatches")},
    }
    store.set(f"digests/{place.rank}", json.dumps(own))
    if place.rank == 0:
        verdict = ""
        for rank in range(1, place.world):
            theirs = json.loads(store.get(f"digests/{rank}"))
            if different := sorted(key for key in own if theirs.get(key) != own[key]):
                verdict = (
                    f"rank {rank} differs from rank 0 in {', '.join(different)}; "
                    f"give every machine the same artifact and command"
                )
                break
        store.set("verdict", verdict)
    if verdict := store.get("verdict").decode():
        raise MismatchError(verdict)


def save(folder: Path, prepared: Prepared, worker: Worker, rank: int, store: Store) -> None:
    """Write the trained weights by the model's own names, each by the first stage that has it."""
    plan = prepared.plan
    stage, replica = plan.position(rank)
    if replica == 0:
        state = worker.final_state()
        store.set(f"names/{stage}", json.dumps(sorted(state)))
        taken = {name for k in range(stage) for name in json.loads(store.get(f"names/{k}"))}
        written = save_stage(folder, plan, stage, state, taken)
        store.set(f"written/{stage}", json.dumps(written))
    if rank == 0:
        write_index(folder, [json.loads(store.get(f"written/{k}")) for k in range(plan.depth)])


def gather_utilisation(busy_s: float, elapsed_s: float, place: Place, store: Store) -> float:
    """The share of the run in which the ranks computed, averaged over them; 0 but on rank 0."""
    store.set(f"busy/{place.rank}", repr(busy_s))
    if place.rank != 0:
        return 0.0
    all_s = sum(float(store.get(f"busy/{rank}")) for rank in range(place.world))
    return all_s / (elapsed_s * place.world)


def meet(place: Place, store: Store, what: str) -> None:
    """Wait until all ranks have come this far."""
    store.set(f"{what}/{place.rank}", "")
    try:
        store.wait([f"{what}/{rank}" for rank in range(place.world)])
    except RuntimeError:
        missing = [r for r in range(place.world) if not store.check([f"{what}/{r}"])]
        raise PeerError(f"ranks {missing} are not {what} in time; see --timeout") from None
