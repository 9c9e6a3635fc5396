"""Run under torchrun: trains many artifacts, one after the other, in one set of processes.

    torchrun --nproc-per-node 4 tests/many_runs.py JOBS.json

JOBS.json lists objects {artifact, steps, schedule, microbatches, out}. Starting torch takes longer
than all the training; ranks that a plan has no place for sit out.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from p2bw.contract.agreement import meet
from p2bw.contract.job import Job
from p2bw.launch import FAILURE_FILE
from p2bw.runtime.failure import Stop
from p2bw.runtime.place import connect, find_place
from p2bw.runtime.prepare import initial_stage, prepare
from p2bw.runtime.rank import Listener, build, join
from p2bw.telemetry.report import Report


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    place = find_place(Job(artifact=Path(jobs[0]["artifact"]), steps=1))
    store = connect(place, timeout_s=60)
    device = torch.device("cpu")
    join(device, 60, place, store)
    for number, given in enumerate(jobs):
        job = Job(
            artifact=Path(given["artifact"]),
            steps=given["steps"],
            schedule=given["schedule"],
            microbatches=given["microbatches"],
            clip_norm=given.get("clip_norm"),
        )
        prepared = prepare(job)
        if place.rank < prepared.plan.ranks:
            report = Report(prepared, say=False)
            stage, _ = prepared.plan.position(place.rank)
            module = initial_stage(prepared, stage, device)
            worker = build(prepared, place.rank, module, device, Listener(report, Stop()))
            worker.run()
            out = Path(given["out"])
            save_file(
                {name: tensor.clone() for name, tensor in worker.final_state().items()},
                out / f"{place.rank}.safetensors",
            )
            if place.rank == 0:
                (out / "losses.json").write_text(json.dumps(report.losses))
        meet(place, store, f"through job {number}")
    dist.destroy_process_group()


if __name__ == "__main__":
    assert FAILURE_FILE not in os.environ
    main()
