"""Plans made by hand for the simulation: every number is chosen, nothing is traced or solved."""

from collections.abc import Sequence

from p2bw.compiler.devices import find_device
from p2bw.compiler.plan import (
    Memory,
    ModelSource,
    Optimality,
    Plan,
    Schedule,
    Seconds,
    Stage,
    TensorSpec,
    TiedSpec,
    TransferSpec,
)
from p2bw.compiler.topology import Level, Topology

FREE = (Level(name="node", size=4096, bandwidth=1e15),)  # links that take no time worth a thought


def made_plan(
    depth: int,
    width: int = 1,
    microbatches: int | None = None,
    *,
    schedule: Schedule = "2bw",
    forward_s: float | Sequence[float] = 1e-3,
    backward_s: float | Sequence[float] = 2e-3,
    update_s: float = 0.0,  # of one whole update
    size: int = 0,  # bytes of each tensor between stages
    microbatch: int = 1,
    skips: Sequence[tuple[int, int]] = (),  # more of them, from a stage to a later one
    tied: int | None = None,  # bytes of a parameter of the first and the last stage
    gradients: int = 0,
    clip_norm: float | None = None,
    extra: int = 0,
    levels: tuple[Level, ...] = FREE,
    replicas_together: bool = True,
) -> Plan:
    m = depth if microbatches is None else microbatches
    forward = [forward_s] * depth if isinstance(forward_s, float) else list(forward_s)
    backward = [backward_s] * depth if isinstance(backward_s, float) else list(backward_s)
    edges = [("x", k, k + 1) for k in range(depth - 1)]
    edges += [(f"skip{a}", a, b) for a, b in skips]
    bubble = (m + depth - 1) / m if schedule in ("flush", "gpipe") else 1.0
    pairs = zip(forward, backward, strict=True)
    period = max(f + b + update_s / m for f, b in pairs) * bubble

    def transfer(name: str, peer: int) -> TransferSpec:
        return TransferSpec(
            tensor=name, peer=peer, shape=(size,), dtype="uint8", bytes=size, gradient=True
        )

    def stage(k: int) -> Stage:
        sends = tuple(transfer(f"{name}.{a}.{b}", b) for name, a, b in edges if a == k)
        receives = tuple(transfer(f"{name}.{a}.{b}", a) for name, a, b in edges if b == k)
        inputs = ("tokens",) if k == 0 else ()
        late = schedule == "2bw" and (width > 1 or clip_norm is not None)
        grads = gradients * (2 if late else 1)
        stash = 100 * (m if schedule == "gpipe" else depth - k)
        last = k == depth - 1
        ranks = range(k * width, k * width + width) if replicas_together else range(k, 999, depth)
        return Stage(
            index=k,
            blocks=(f"b{k}",),
            modules=(f"b{k}",),
            parameters=1,
            tied=("w",) if tied is not None and k in (0, depth - 1) else (),
            recompute=False,
            random=(),
            flops_forward=0,
            flops_backward=0,
            compute_s=Seconds(
                forward=forward[k], backward=backward[k], recompute=0.0, update=update_s / m
            ),
            memory=Memory(
                weights=1000,
                gradients=grads,
                optimizer=0,
                stash=stash,
                buffers=0,
                transient=0,
                reserve=0,
                total=1000 + grads + stash,
                limit=10**9,
            ),
            inputs=inputs,
            arguments=(*inputs, *(t.tensor for t in receives)),
            results=(*(t.tensor for t in sends), *(("loss",) if last else ())),
            receives=receives,
            sends=sends,
            devices=tuple(ranks[:width]),
        )

    samples = width * microbatch / period
    return Plan(
        p2bw_version="0",
        torch_version="0",
        model=ModelSource(file="m.py", factory="model", settings={}, sha256="", name="M"),
        topology=Topology(
            name="made", device=find_device("a100-80"), gpus=depth * width, levels=levels
        ).to_json(),
        schedule=schedule,
        depth=depth,
        width=width,
        microbatch=microbatch,
        microbatches_per_update=m,
        extra_in_flight=extra,
        clip_norm=clip_norm,
        period_s=period,
        samples_per_s=samples,
        utilisation=1 / bubble,
        bytes_per_sample=0.0,
        optimality=Optimality(
            status="optimal", objective=samples, bound=samples, gap=0.0, search_space=""
        ),
        inputs=(TensorSpec(name="tokens", shape=(1,), dtype="int64"),),
        tied=(TiedSpec(names=("w",), stages=(0, depth - 1), bytes=tied),)
        if tied is not None and depth > 1
        else (),
        stages=tuple(map(stage, range(depth))),
    )
