"""What a profile predicts of two ranks on this machine, against what they do.

    python tests/benchmarks/predictions.py                       # four models, five rounds
    python tests/benchmarks/predictions.py --only gpt --rounds 1
    nice -n -20 python tests/benchmarks/predictions.py           # on a busy machine

Every round profiles each model anew, compiles it with that for two stages, simulates the plan and
then trains it on two ranks of one thread, each pinned to its core. A stage's compute is a
microbatch's forward and backward, and its share of an update.

Ends with 1 if a bar is missed, by the medians of the rounds: the simulated period within 7 % of the
measured one, each stage's compute within 10 %.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from pipelining_ranks import pin

from p2bw.compiler.driver import compile_model
from p2bw.compiler.simulation.job import StageTimes, planned_times
from p2bw.compiler.simulation.simulate import simulate
from p2bw.contract.job import Job
from p2bw.measure.alone import Spans, stage_times
from p2bw.measure.driver import profile_model
from p2bw.modelfile.load import Setting
from p2bw.runtime.prepare import initial_stage, prepare
from p2bw.runtime.rank import build
from p2bw.runtime.worker import Update

EXAMPLES = Path(__file__).parents[2] / "examples"
Model = tuple[str, str, int, dict[str, Setting]]  # file, factory, microbatch, settings
MODELS: dict[str, Model] = {  # stages of 20 to 100 ms on a server core
    "gpt": ("gpt.py", "small", 4, {}),
    "bert": (
        *("hf_bert.py", "model", 4),
        {"layers": 4, "width": 256, "heads": 4, "context": 128, "vocab": 2048},
    ),
    "resnet": ("resnet.py", "model", 4, {"width": 32, "size": 96}),
    "unet": ("unet.py", "model", 2, {"width": 16, "size": 128}),
}
PERIOD, COMPUTE = 0.07, 0.10
WARM_UP, DRAIN = 3, 2  # updates that do not count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of one run, about")
    parser.add_argument("--json", action="store_true", help="print only JSON on stdout")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    for turn in range(options.rounds):
        for name in options.only:
            rounds[name].append(one_round(MODELS[name], options.seconds))
            print(f"round {turn + 1}, {name}: {text(rounds[name][-1])}", file=sys.stderr)
    table = [judge(name, found) for name, found in rounds.items()]
    print(json.dumps(table) if options.json else "\n".join(map(line, table)))
    return 1 if any(row["missed"] for row in table) else 0


def one_round(model: Model, seconds: float) -> dict[str, Any]:
    """Errors of the prediction: of the period, and of each stage's compute."""
    file, factory, microbatch, settings = model
    with tempfile.TemporaryDirectory() as scratch:
        path, artifact = Path(scratch, "profile.json"), Path(scratch, "artifact")
        profile = profile_model(
            EXAMPLES / file,
            factory=factory,
            settings=settings,
            microbatches=(microbatch,),
            device="cpu",
            processes=2,
            fresh=True,
        )
        path.write_text(profile.to_json(), encoding="utf-8")
        plan = compile_model(
            EXAMPLES / file,
            factory=factory,
            settings=settings,
            profile=path,
            gpus=2,
            depth=2,
            out=artifact,
        ).plan
        m = plan.microbatches_per_update
        updates = max(4, round(seconds / (plan.period_s * m)))
        period_s, measured = train(artifact, updates)
    predicted_s = simulate(plan).period_s
    stages = [
        (compute_s(planned_times(plan, stage), m), compute_s(times, m))
        for stage, times in zip(plan.stages, measured, strict=True)
    ]
    check = profile.steps[0].check
    return {
        "period_s": (predicted_s, period_s),
        "planned_s": plan.period_s,
        "compute_s": stages,
        "check": check.ratio if check else None,
    }


def compute_s(times: StageTimes, m: int) -> float:
    return times.forward_s + times.backward_s + times.update_s / m


def train(artifact: Path, updates: int) -> tuple[float, list[StageTimes]]:
    """Seconds between microbatches in steady state, and what each stage computed."""
    context = get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=rank_main, args=(rank, artifact, updates, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank failed with {process.exitcode}")
    told = dict(results.get() for _ in ranks)
    return told[0][0], [StageTimes(*told[rank][1]) for rank in range(2)]


class _Times(Spans):
    """Also notes when rank 0 has made each update."""

    def __init__(self) -> None:
        super().__init__()
        self.done_s: list[float] = []

    def update(self, update: Update) -> None:
        self.done_s.append(time.perf_counter())


def rank_main(rank: int, artifact: Path, updates: int, results: Any) -> None:
    pin(rank)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{artifact}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    prepared = prepare(Job(artifact=artifact, steps=WARM_UP + updates + DRAIN))
    stage, _ = prepared.plan.position(rank)
    cpu, times = torch.device("cpu"), _Times()
    worker = build(prepared, rank, initial_stage(prepared, stage, cpu), cpu, times)
    dist.barrier()
    worker.run()
    m = prepared.pipeline.microbatches
    done_s = times.done_s[WARM_UP - 1 : -DRAIN]
    period_s = (done_s[-1] - done_s[0]) / (len(done_s) - 1) / m if rank == 0 else 0.0
    found = stage_times(times, m, WARM_UP)
    results.put((stage, (period_s, (found.forward_s, found.backward_s, found.update_s))))
    dist.destroy_process_group()


def judge(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds, and the bars that they miss."""

    def off(pairs: Iterator[tuple[float, float]]) -> float:
        return median(predicted / measured - 1 for predicted, measured in pairs)

    period = off(found["period_s"] for found in rounds)
    compute = [off(found["compute_s"][stage] for found in rounds) for stage in range(2)]
    missed = [f"the period is {period:+.1%} off"] if abs(period) > PERIOD else []
    missed += [f"stage {k} is {c:+.1%} off" for k, c in enumerate(compute) if abs(c) > COMPUTE]
    return {
        "model": name,
        "measured_s": median(found["period_s"][1] for found in rounds),
        "period": period,
        "planned": off((found["planned_s"], found["period_s"][1]) for found in rounds),
        "compute": compute,
        "check": median(found["check"] or 1.0 for found in rounds),
        "rounds": rounds,
        "missed": missed,
    }


def line(row: dict[str, Any]) -> str:
    stages = ", ".join(f"{error:+.1%}" for error in row["compute"])
    missed = "".join(f"\n   missed: {text}" for text in row["missed"])
    return (
        f"{row['model']:>7}: {1000 * row['measured_s']:6.1f} ms per microbatch measured; simulated "
        f"{row['period']:+.1%}, planned {row['planned']:+.1%}; compute of the stages {stages}; "
        f"blocks are {row['check']:.3f} of the whole{missed}"
    )


def text(found: dict[str, Any]) -> str:
    def pair(values: tuple[float, float]) -> str:
        predicted, measured = values
        return (
            f"{1e3 * predicted:.1f} for {1e3 * measured:.1f} ms ({predicted / measured - 1:+.1%})"
        )

    stages = ", ".join(map(pair, found["compute_s"]))
    return f"period {pair(found['period_s'])}; stages {stages}; check {found['check']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
