"""The tables of the PipeDream-2BW paper (arXiv:2006.09503v3), predicted.

One figure of the paper calibrates the model: the 45 TFLOP/s that a GPT of 355M parameters sustains
on one V100 (section 5). All else are sizes of the models, data sheets (compiler/devices.py and
compiler/topology.py), published formulas and a published measurement of what it takes to launch a
layer. tests/paper_page.py makes docs/paper.md of it.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Literal

from simulated import made_plan

from p2bw.compiler.devices import find_device
from p2bw.compiler.placement.candidates import make_models
from p2bw.compiler.placement.levels import search_models
from p2bw.compiler.placement.result import Limits, Placement
from p2bw.compiler.plan import Plan, Schedule
from p2bw.compiler.problem import BlockCost, ParameterCost, PlacementProblem, TensorCost
from p2bw.compiler.simulation.simulate import simulate
from p2bw.compiler.topology import make_topology

DEVICE = find_device("v100-16")
CALIBRATED_FLOPS = 45e12  # of GPT 355M on one device, the one figure that is taken from the paper
TOKENS = 512
GB = 10**9
MICROBATCH = 8  # of the paper's own sweep script (driver_sweep.py)

# Milliseconds of an encoder's forward, by (sequences, tokens each): 12 layers, fp16, PyTorch on a
# V100 of a DGX-1. It takes as long for 32 tokens as for 2,048: this is what it takes to launch.
# (NVIDIA/FasterTransformer, README of version 2.1, June 2020, "Encoder performance on V100 and
# PyTorch". The Xeon is of the generation of a p3.16xlarge's, PyTorch of the paper's time.)
ENCODER_LAYERS = 12
ENCODER_MS = {
    (1, 32): 12.30,
    (1, 64): 12.33,
    (1, 128): 14.29,
    (8, 32): 11.86,
    (8, 64): 12.76,
    (8, 128): 11.61,
    (32, 32): 12.00,
    (32, 64): 12.27,
    (64, 32): 12.01,
}
LAUNCH_S = median(ENCODER_MS.values()) / ENCODER_LAYERS / 1000

Scheme = Literal["inter", "gpipe", "flush", "2bw"]

# Bytes per parameter of the paper's code: an fp16 weight and gradient (4), an fp32 weight and
# gradient (8), Adam's moments (8). Of these 2BW doubles the fp32 weight.
WEIGHT, GRADIENT, STATE = 4, 6, 10
FP16_GRADIENT = 2  # the part of GRADIENT that an update begins without, and its backwards make


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer of the paper (the code's driver_sweep.py has the sizes)."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int = 50304

    @property
    def layer_parameters(self) -> int:
        return 12 * self.hidden**2 + 13 * self.hidden

    @property
    def words(self) -> int:
        """Parameters of the embedding; the head has a copy of its own."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.words + TOKENS * self.hidden

    @property
    def layer_flops(self) -> int:
        """Forward, of one sample."""
        return 24 * TOKENS * self.hidden**2 + 4 * TOKENS**2 * self.hidden

    @property
    def head_flops(self) -> int:
        return 2 * TOKENS * self.hidden * self.vocab

    @property
    def layer_bytes(self) -> int:
        """What a layer keeps of one sample for its backward (Korthikanti et al., 2205.05198)."""
        return 34 * TOKENS * self.hidden + 5 * self.heads * TOKENS**2

    @property
    def between_bytes(self) -> int:
        """The input of a layer, of one sample in fp16."""
        return 2 * TOKENS * self.hidden

    @property
    def logits_bytes(self) -> int:
        """Of one sample: the logits in fp16, and in fp32 for the loss."""
        return 6 * TOKENS * self.vocab


GPT_355M = Model("GPT 355M", 24, 1024, 16)
GPT_1_3B = Model("GPT 1.3B", 24, 2048, 16)
GPT_2_2B = Model("GPT 2.2B", 32, 2304, 32)
GPT_3_8B = Model("GPT 3.8B", 32, 3072, 32)
BERT_2_2B = Model("BERT 2.2B", 32, 2304, 32, 30592)
BERT_3_8B = Model("BERT 3.8B", 32, 3072, 32, 30592)


@cache
def rate() -> float:
    """FLOP/s of matrix products, such that GPT 355M sustains what the paper says.

    The paper does not say at which batch; it is taken to be so large that launches do not show.
    """
    model = GPT_355M
    flops = 3 * (model.layers * model.layer_flops + model.head_flops)
    streaming = 3 * (model.layers * _streaming_s(model) + _loss_s(model))
    return flops / (flops / CALIBRATED_FLOPS - streaming)


def _streaming_s(model: Model) -> float:
    """What is not matrix products in a layer's forward: all that is kept is written and read."""
    return 2 * model.layer_bytes / DEVICE.sustained_bandwidth


def _loss_s(model: Model) -> float:
    return 2 * model.logits_bytes / DEVICE.sustained_bandwidth


def layer_s(model: Model, samples: int, launch: float = LAUNCH_S) -> float:
    """Forward of a layer; the backward takes twice that. `launch` does not grow with the size."""
    return samples * (model.layer_flops / rate() + _streaming_s(model)) + launch


def head_s(model: Model, samples: int) -> float:
    return samples * (model.head_flops / rate() + _loss_s(model))


def stage_parameters(model: Model, depth: int, stage: int) -> int:
    """As many layers in each stage; the embedding on the first, a copy of it on the last."""
    ends = (stage == 0) * (model.words + TOKENS * model.hidden) + (stage == depth - 1) * model.words
    return model.layers // depth * model.layer_parameters + ends


def stage_bytes(
    model: Model,
    depth: int,
    stage: int,
    scheme: Scheme,
    microbatches: int,
    again: bool = True,
    size: int = MICROBATCH,
) -> int:
    """Memory of a stage. With recomputation each layer keeps its input, and one is made again."""
    per_parameter = WEIGHT * (2 if scheme == "2bw" else 1) + GRADIENT + STATE
    kept_at = {"inter": 1, "gpipe": microbatches}.get(scheme, min(depth - stage, microbatches))
    layers = model.layers // depth * (model.between_bytes if again else model.layer_bytes)
    sample = layers + (stage == depth - 1) * model.logits_bytes
    working = again * model.layer_bytes  # of the layer that is computed again
    # The gradient of the logits, in fp32.
    working += (stage == depth - 1) * 4 * TOKENS * model.vocab
    parameters = stage_parameters(model, depth, stage)
    fullest = parameters * per_parameter + size * (kept_at * sample + working)
    if scheme in ("flush", "2bw"):
        return fullest
    # Here no backward comes before the last forward. Most is kept at the first backward, which
    # finds no fp16 gradients; at the last one they are all there, and one microbatch.
    at_last = parameters * per_parameter + size * (layers + again * model.layer_bytes)
    return max(fullest - FP16_GRADIENT * parameters, at_last)


def worst_bytes(model: Model, depth: int, scheme: Scheme, microbatches: int) -> int:
    return max(stage_bytes(model, depth, k, scheme, microbatches) for k in range(depth))


def fitting(model: Model, depth: int, microbatches: int) -> int:
    """How many microbatches GPipe can take between two flushes. Each flush ends in an update."""
    counts = range(1, microbatches + 1)
    return max(m for m in counts if worst_bytes(model, depth, "gpipe", m) <= DEVICE.usable_bytes)


def paper_plan(
    model: Model,
    scheme: Scheme,
    depth: int,
    width: int,
    batch: int,
    size: int = MICROBATCH,
    again: bool = True,
    launch: float = LAUNCH_S,
) -> Plan:
    """As in the paper: equal layers, mostly recomputed, replicas of a stage in one server."""
    m = batch // (width * size)
    if scheme == "gpipe":
        m = fitting(model, depth, m)
    elif scheme == "inter":
        m = 1
    schedule: Schedule = "flush" if scheme == "inter" else scheme
    layers = model.layers // depth * layer_s(model, size, launch)
    heads = [head_s(model, size) * (k == depth - 1) for k in range(depth)]
    worst = max(stage_parameters(model, depth, k) for k in range(depth))
    return made_plan(
        depth,
        width,
        m,
        schedule=schedule,
        forward_s=[layers + head for head in heads],
        # Twice the forward, and the layers' forwards again.
        backward_s=[(2 + again) * layers + 2 * head for head in heads],
        # Reads and writes weights, gradients and moments.
        update_s=2 * (WEIGHT + GRADIENT + STATE) * worst / DEVICE.sustained_bandwidth,
        size=size * model.between_bytes,
        gradients=2 * worst,
        microbatch=size,
        levels=make_topology(gpus=depth * width, cluster="p3.16xlarge").levels,
    )


def throughput(model: Model, scheme: Scheme, depth: int, width: int, batch: int) -> float:
    """Sequences per second, simulated."""
    plan = paper_plan(model, scheme, depth, width, batch)
    return simulate(plan).samples_per_s


def with_microbatch(model: Model, size: int, again: bool, launch: float = LAUNCH_S) -> float:
    """Sequences per second of 2BW on 8 GPUs with microbatches of some size, as in figure 12."""
    return simulate(paper_plan(model, "2bw", 8, 1, 256, size, again, launch)).samples_per_s


def problem(model: Model, gpus: int, size: int, batch: int, width: int) -> PlacementProblem:
    """The model for the planner: blocks, the paper's bytes per parameter, its servers."""
    again_s = layer_s(model, size)
    blocks = [BlockCost(name="embedding", forward_s=0.0, backward_s=0.0)]
    blocks += [
        BlockCost(
            name=f"layer{i}",
            forward_s=again_s,
            backward_s=2 * again_s,
            stash_bytes=size * model.layer_bytes,
            transient_bytes=size * 8 * TOKENS * model.hidden * 2,
        )
        for i in range(model.layers)
    ]
    head = head_s(model, size)
    blocks.append(
        BlockCost(
            name="head",
            forward_s=head,
            backward_s=2 * head,
            stash_bytes=size * model.logits_bytes,
            transient_bytes=size * 4 * TOKENS * model.vocab,
        )
    )
    names = [block.name for block in blocks]
    counts = [TOKENS * model.hidden, *[model.layer_parameters] * model.layers, 2 * model.hidden]
    held = [((name,), count) for name, count in zip(names, counts, strict=True)]
    held.append((("embedding", "head"), model.words))
    between = size * model.between_bytes
    return PlacementProblem(
        microbatch=size,
        microbatches=batch // (size * width),
        blocks=tuple(blocks),
        parameters=tuple(
            ParameterCost(
                name=f"of {' and '.join(users)}",
                bytes=WEIGHT * count,
                gradient_bytes=GRADIENT * count,
                optimizer_bytes=STATE * count,
                update_s=2 * (WEIGHT + GRADIENT + STATE) * count / DEVICE.sustained_bandwidth,
                blocks=users,
            )
            for users, count in held
        ),
        tensors=tuple(
            TensorCost(
                name=f"x{i}",
                producer=a,
                consumers=(b,),
                bytes=between,
                gradient_bytes=between,
                saved=True,
            )
            for i, (a, b) in enumerate(pairwise(names))
        ),
        topology=make_topology(gpus=gpus, cluster="p3.16xlarge"),
    )


def decide(model: Model, gpus: int, batch: int) -> Placement:
    """The planner's choice among shapes without an idle device, cut wherever is best."""
    found = []
    for depth in (1, 2, 4, 8, 16, 32):
        width = gpus // depth
        own = problem(model, gpus, MICROBATCH, batch, width)
        search = search_models(make_models([own], "auto"), (depth,), (width,), Limits())
        if search.best is not None:
            found.append(search.placement())
    return max(found, key=lambda placement: placement.samples_per_s)


def largest_microbatch(model: Model, depth: int, *, again: bool) -> int:
    """Of the powers of two, what fits on (1, depth) under 2BW; 0: none."""
    sizes = [0, *(2**i for i in range(8))]
    return max(
        size
        for size in sizes
        if all(
            stage_bytes(model, depth, k, "2bw", depth, again, size) <= DEVICE.usable_bytes
            for k in range(depth)
            if size
        )
    )


# What the paper prints in words (section 5.2).
RATIOS = (
    ("2BW over inter-layer, GPT 2.2B, 8 GPUs", 6.1, (GPT_2_2B, 8, 1, 256), "inter"),
    ("2BW over GPipe, GPT 3.8B, 64 GPUs", 3.2, (GPT_3_8B, 16, 4, 512), "gpipe"),
    ("2BW over Flush, GPT 2.2B, 8 GPUs, batch 64", 1.6, (GPT_2_2B, 8, 1, 64), "flush"),
    ("2BW over Flush, GPT 2.2B, 64 GPUs, batch 2048", 1.15, (GPT_2_2B, 8, 8, 2048), "flush"),
)

# Read from the bars of figures 6 and 10: sequences per second, inter-layer, GPipe, Flush, 2BW.
FIGURES: tuple[tuple[str, Model, int, int, int, tuple[float, ...]], ...] = (
    ("6a", GPT_2_2B, 8, 1, 64, (7, 18, 26, 43)),
    ("6a", GPT_2_2B, 8, 1, 256, (7, 18, 38, 44)),
    ("6b", GPT_2_2B, 8, 8, 512, (11, 80, 110, 160)),
    ("6b", GPT_2_2B, 8, 8, 2048, (12, 80, 145, 168)),
    ("6c", GPT_3_8B, 16, 4, 512, (10, 38, 75, 127)),
    ("6c", GPT_3_8B, 16, 4, 2048, (12, 38, 115, 135)),
    ("10a", BERT_2_2B, 8, 1, 64, (7, 23, 24, 46)),
    ("10a", BERT_2_2B, 8, 1, 256, (7, 22, 38, 47)),
    ("10b", BERT_2_2B, 8, 8, 512, (30, 122, 110, 160)),
    ("10b", BERT_2_2B, 8, 8, 2048, (30, 122, 145, 168)),
    ("10c", BERT_3_8B, 16, 4, 512, (10, 58, 75, 140)),
    ("10c", BERT_3_8B, 16, 4, 2048, (12, 58, 115, 145)),
)
SCHEMES: tuple[Scheme, ...] = ("inter", "gpipe", "flush", "2bw")

# Figures 7 and 11: GB of the fullest of 8 GPUs, 2.2B; None: out of memory.
MEMORY: tuple[tuple[str, Model, int, tuple[float | None, ...]], ...] = (
    ("7", GPT_2_2B, 64, (8.6, None, 10.1, 11.3)),
    ("7", GPT_2_2B, 256, (8.5, None, 10.1, 11.3)),
    ("11", BERT_2_2B, 64, (8.2, 13.3, 9.0, 10.5)),
    ("11", BERT_2_2B, 256, (8.2, None, 9.2, 10.6)),
)


# Figure 12, 8 GPUs: sequences per second by microbatch, with recomputation or not.
FIGURE_12: tuple[tuple[Model, bool, dict[int, int]], ...] = (
    (GPT_1_3B, True, {1: 31, 2: 47, 4: 58, 8: 63, 16: 66}),
    (GPT_1_3B, False, {1: 40, 2: 57, 4: 67}),
    (GPT_2_2B, True, {1: 22, 16: 43}),
    (GPT_2_2B, False, {1: 29}),
)


def ratio(shape: tuple[Model, int, int, int], scheme: Scheme) -> float:
    model, depth, width, batch = shape
    ours = throughput(model, "2bw", depth, width, batch)
    return ours / throughput(model, scheme, depth, width, batch)
