"""What the ranks of a run tell each other through their store, and must agree on."""

import json
from dataclasses import asdict

import torch

from p2bw.contract.errors import MismatchError, PeerError
from p2bw.contract.job import Job, Options
from p2bw.contract.plan import Plan
from p2bw.contract.stages import digests
from p2bw.contract.store import Place, Store
from p2bw.contract.weightfiles import fingerprint


def compare_ranks(job: Job, plan: Plan, options: Options, place: Place, store: Store) -> None:
    """Refuse to start unless all ranks have the same artifact, model file, torch and options."""
    told = asdict(job) | {
        "checkpoint-every": options.checkpoint_every,
        "checkpoint": options.checkpoint is not None,  # where it is may differ
        "resume": options.resume,
        "weights": fingerprint(job.weights) if job.weights else None,  # so may these
    }
    own = digests(job.artifact, plan) | {
        "torch": torch.__version__,
        **{f"--{k.replace('_', '-')}": str(v) for k, v in told.items()},
    }
    del own["--artifact"], own["--model"]  # the same bytes, maybe at other places
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


def meet(place: Place, store: Store, what: str) -> None:
    """Wait until all ranks have come this far."""
    store.set(f"{what}/{place.rank}", "")
    try:
        store.wait([f"{what}/{rank}" for rank in range(place.world)])
    except RuntimeError:
        missing = [r for r in range(place.world) if not store.check([f"{what}/{r}"])]
        raise PeerError(f"ranks {missing} are not {what} in time (--timeout)") from None


def gather_utilisation(busy_s: float, elapsed_s: float, place: Place, store: Store) -> float:
    """The share of the run in which the ranks computed, averaged over them; 0 but on rank 0."""
    store.set(f"busy/{place.rank}", repr(busy_s))
    if place.rank != 0:
        return 0.0
    all_s = sum(float(store.get(f"busy/{rank}")) for rank in range(place.world))
    return all_s / (elapsed_s * place.world)
