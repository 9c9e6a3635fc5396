"""One rank of a run under torchrun: it meets the others, trains, saves and reports."""

from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from p2bw.contract.agreement import compare_ranks, gather_utilisation, meet
from p2bw.contract.checkpoint import StageState
from p2bw.contract.errors import MismatchError, UsageError
from p2bw.contract.job import Job, Options
from p2bw.contract.network import choose_interface
from p2bw.contract.schedule import Action
from p2bw.contract.store import Place, Store
from p2bw.modelfile.turns import taking_turns
from p2bw.runtime.checkpoint import Checkpointer, begin
from p2bw.runtime.failure import Stop, Watchdog, restarted
from p2bw.runtime.memory import keep_memory
from p2bw.runtime.place import within
from p2bw.runtime.prepare import Prepared, channel_specs, initial_stage, prepare
from p2bw.runtime.transport import DistributedTransport
from p2bw.runtime.worker import Events, Start, Update, Worker
from p2bw.telemetry.report import Report, write_result
from p2bw.telemetry.trace import Trace, align, join_parts

_LATE_S = 60  # gloo and NCCL give up so much later than the watchdog, which can say more


class Listener(Events):
    """What a rank's worker asks and tells, passed on to the parts that know."""

    def __init__(
        self,
        report: Report,
        stop: Stop,
        saver: Checkpointer | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.report, self.stop, self.saver = report, stop, saver
        self.trace, self.tracing = trace, trace is not None

    def allows(self, batch: int) -> bool:
        return self.stop.allows(batch)

    def wants(self, step: int) -> bool:
        return self.saver is not None and self.saver.wants(step)

    def checkpoint(self, step: int, state: StageState) -> None:
        if self.saver is not None:
            self.saver.save(step, state)

    def update(self, update: Update) -> None:
        self.report.update(update.batch, update.loss, update.learning_rate, update.norm)

    def action(self, action: Action, start_s: float, end_s: float) -> None:
        if self.trace is not None:
            self.trace.action(action, start_s, end_s)


def run_rank(job: Job, options: Options, place: Place, run: Store, watchdog: Watchdog) -> None:
    """Do one rank's part of a job, from reading the artifact to the last message."""
    store = within(run, place.attempt)
    if options.threads:
        torch.set_num_threads(options.threads)
    prepared = prepare(job)
    if prepared.plan.ranks != place.world:
        raise MismatchError(
            f"{job.artifact} is a plan for {prepared.plan.ranks} ranks, torchrun started "
            f"{place.world}; use --nproc-per-node {prepared.plan.ranks} on one machine"
        )
    compare_ranks(job, prepared.plan, options, place, store)
    device = choose_device(options.device, place)
    join(device, options.timeout_s, place, store)
    report = Report(prepared, say=place.rank == 0 and not options.quiet)
    if place.attempt:
        report.note(restarted(place, run))
    module = first_stage(prepared, device, place, store, report)
    prepared, start, saver = begin(
        *(prepared, options, place.rank, module, store),
        restarted=place.attempt > 0,
        say=report.note,
    )
    trace = None
    if options.trace is not None:
        zero_s = align(store, place.rank, place.world)
        trace = Trace(options.trace, prepared.plan, prepared.pipeline, place.rank, zero_s)
    listener = Listener(report, watchdog.stop, saver, trace)
    worker = build(prepared, place.rank, module, device, listener, start)
    if place.rank == 0:
        report.open(options, done=worker.step)
    watchdog.begin(prepared.plan, worker, prepared.pipeline.first)
    meet(place, store, "ready")
    report.start(worker.clock)
    worker.run()
    busy_s = worker.clock.busy_s()  # on a GPU: when it has done all this
    elapsed_s = report.stop()
    stopped = worker.step < prepared.pipeline.batches
    if stopped and not saver.opened:
        saver.open_somewhere(report.note)
    if saver.opened:
        saver.save(worker.step, worker.state())
        saver.wait()
    if options.trace is not None:
        meet(place, store, "traced")
        if place.rank == 0:
            join_parts(options.trace, place.world)
    if stopped:
        meet(place, store, "stopped")
        where = f"after step {worker.step} of {prepared.pipeline.batches}"
        raise watchdog.stopped(f"{where}; --resume {saver.last}")
    utilisation = gather_utilisation(busy_s, elapsed_s, place, store)
    if options.result is not None and place.rank == 0:
        write_result(options.result, report.summary(utilisation))
    # Leave together: a rank that closes its connections early looks like one that died.
    meet(place, store, "done")
    watchdog.close()
    dist.destroy_process_group()


def first_stage(
    prepared: Prepared, device: torch.device, place: Place, store: Store, report: Report
) -> nn.Module:
    """This rank's stage with the weights that a run begins with."""
    job, plan = prepared.job, prepared.plan
    turn = None  # whoever reads its part of a file waits for nobody
    if job.weights is None:
        turn = partial(taking_turns, store, place, job.init, job.seed, plan.width, report.say)
    stage, _ = plan.position(place.rank)
    return initial_stage(prepared, stage, device, turn, report.say)


def build(
    prepared: Prepared,
    rank: int,
    module: nn.Module,
    device: torch.device,
    events: Events,
    start: Start | None = None,
) -> Worker:
    plan = prepared.plan
    stage, replica = plan.position(rank)
    keep_memory(device)
    transport = DistributedTransport(
        channels=prepared.pipeline.channels,
        specs=channel_specs(prepared, stage, module),
        peers={s.index: s.devices[replica] for s in plan.stages},
        stage=stage,
        device=device,
        replicas=[s.devices for s in plan.stages],
    )
    return Worker(prepared, rank, module, device, transport, events, start=start)


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
    """Make the process group."""
    own_gpu = device.type == "cuda" and torch.cuda.device_count() >= place.local_world
    choose_interface(place, store)
    dist.init_process_group(
        "nccl" if own_gpu else "gloo",
        store=within(store, "group"),  # type: ignore[arg-type]
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=timeout_s + _LATE_S),
    )
