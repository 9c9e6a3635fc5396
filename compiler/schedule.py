"""A plan's schedule, proven as the runtime will perform it."""

from p2bw.compiler.placement.instance import Instance
from p2bw.compiler.plan import Plan
from p2bw.contract.check import check
from p2bw.contract.schedule import make_pipeline


def check_schedule(plan: Plan, instance: Instance) -> None:
    """Prove the schedule, and that no stage holds more than its memory was planned for.

    Three batches fill the pipeline, keep it full and drain it.
    """
    run = plan.for_runtime()
    proof = check(make_pipeline(run, batches=3, clipped=plan.clip_norm is not None))
    copies = instance.gradient_copies(plan.width)
    for k in range(plan.depth):
        in_flight = instance.in_flight(k, plan.depth)
        versions = instance.versions(in_flight, plan.depth)
        planned = in_flight + (plan.extra_in_flight if k < plan.depth - 1 else 0)
        stash = proof.stash[k]
        assert stash == planned, f"stage {k}: {stash} microbatches in flight, planned {planned}"
        assert proof.versions[k] <= versions, f"stage {k}: {proof.versions[k]} versions"
        assert proof.gradients[k] <= copies, f"stage {k}: {proof.gradients[k]} sets of gradients"
