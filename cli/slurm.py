"""The batch script that runs an artifact on the nodes of a Slurm cluster."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2bw.contract.job import Job, Options, arguments

_LEAD_S = 120  # from the signal to stop until the time is up: so long a checkpoint may take
_PORT = 29400

_SCRIPT = """\
#!/bin/bash
# Trains {artifact}: {ranks} ranks on {nodes}. Submit with sbatch; give --time, --partition
# and whatever else your cluster wants there or here.
#SBATCH --job-name={name}
#SBATCH --nodes={count}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --exclusive
#SBATCH --signal=B:USR1@{lead}
#SBATCH --requeue
#SBATCH --open-mode=append

cd {folder} || exit 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"

# Every rank makes a checkpoint and leaves when the job's time is nearly up, and the job goes on
# from there when it is requeued. The ranks get the signal; torchrun would kill them of it.
trap 'stopped=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
start='trap "" USR1; exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" {per_node} "$@"'

srun --kill-on-bad-exit=1 bash -c "$start" \\
    {python} \\
    --nnodes={count} --master-addr="$head" --master-port={port} --max-restarts={restarts} \\
    {arguments} &
run=$!
wait "$run"
status=$?
while kill -0 "$run" 2>/dev/null; do # a signal ends a wait early
    wait "$run"
    status=$?
done

if [ -n "${{stopped:-}}" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def batch_script(job: Job, options: Options, ranks: int, folder: Path, max_restarts: int) -> str:
    """The script: it resumes from the last checkpoint, and is requeued when its time is up.

    The ranks fill the nodes in order, as the plan's topology counts them.
    """
    options = replace(
        options,
        checkpoint=options.checkpoint or job.artifact / "checkpoints",
        resume=options.resume or "last",
    )
    size = min(node_size(json.loads((job.artifact / "plan.json").read_bytes())) or ranks, ranks)
    nodes = math.ceil(ranks / size)
    last = ranks - size * (nodes - 1)
    local = str(size) if last == size else f"$((SLURM_NODEID < {nodes - 1} ? {size} : {last}))"
    return _SCRIPT.format(
        artifact=job.artifact,
        ranks=ranks,
        nodes=f"{nodes} node{'s' * (nodes > 1)}",
        count=nodes,
        name=shlex.quote(f"p2bw-{job.artifact.resolve().name}"),
        gpus="" if options.device == "cpu" else f"#SBATCH --gpus-per-node={size}\n",
        lead=_LEAD_S,
        folder=shlex.quote(str(folder)),
        python=shlex.quote(sys.executable),
        per_node=f"--nproc-per-node {local}",
        port=_PORT,
        restarts=max_restarts,
        arguments=_lines(arguments(job, options)),
    )


def node_size(plan: Mapping[str, Any]) -> int | None:
    """How many devices one machine of a plan's topology has; None: all of them."""
    levels = plan.get("topology", {}).get("levels") or []
    names = [level["name"] for level in levels]
    if "node" not in names and len(levels) < 2:
        return None
    end = names.index("node") + 1 if "node" in names else len(levels) - 1
    return int(math.prod(level["size"] for level in levels[:end]))


def _lines(words: Sequence[str]) -> str:
    """A command's words, quoted, each option on a line of its own."""
    breaks = (" \\\n    " if word.startswith("--") else " " for word in words)
    return "".join(b + shlex.quote(word) for b, word in zip(breaks, words, strict=True)).strip()
