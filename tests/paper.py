"""The tables of the PipeDream-2BW paper (arXiv:2006.09503v3), predicted.

One figure of the paper calibrates the model: the 45 TFLOP/s that a GPT of 355M parameters sustains
on one V100 (section 5). All else are sizes of the models, data sheets (compiler/devices.py and
compiler/topology.py) and published formulas. tests/test_paper.py writes docs/paper.md.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
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
    """FLOP/s of matrix products, such that GPT 355M sustains what the paper says."""
    model = GPT_355M
    flops = 3 * (model.layers * model.layer_flops + model.head_flops)
    streaming = 3 * (model.layers * _streaming_s(model) + _loss_s(model))
    return flops / (flops / CALIBRATED_FLOPS - streaming)


def _streaming_s(model: Model) -> float:
    """What is not matrix products in a layer's forward: all that is kept is written and read."""
    return 2 * model.layer_bytes / DEVICE.sustained_bandwidth


def _loss_s(model: Model) -> float:
    return 2 * model.logits_bytes / DEVICE.sustained_bandwidth


def layer_s(model: Model, samples: int) -> float:
    """Forward of a layer; the backward takes twice that."""
    return samples * (model.layer_flops / rate() + _streaming_s(model))


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


def paper_plan(model: Model, scheme: Scheme, depth: int, width: int, batch: int) -> Plan:
    """As in the paper: equal layers, recomputation, replicas of a stage in one server."""
    m = batch // (width * MICROBATCH)
    if scheme == "gpipe":
        m = fitting(model, depth, m)
    elif scheme == "inter":
        m = 1
    schedule: Schedule = "flush" if scheme == "inter" else scheme
    layers = model.layers // depth * layer_s(model, MICROBATCH)
    heads = [head_s(model, MICROBATCH) * (k == depth - 1) for k in range(depth)]
    worst = max(stage_parameters(model, depth, k) for k in range(depth))
    return made_plan(
        depth,
        width,
        m,
        schedule=schedule,
        forward_s=[layers + head for head in heads],
        # Twice the forward, and the layers' forwards again.
        backward_s=[3 * layers + 2 * head for head in heads],
        # Reads and writes weights, gradients and moments.
        update_s=2 * (WEIGHT + GRADIENT + STATE) * worst / DEVICE.sustained_bandwidth,
        size=MICROBATCH * model.between_bytes,
        gradients=2 * worst,
        microbatch=MICROBATCH,
        levels=make_topology(gpus=depth * width, cluster="p3.16xlarge").levels,
    )


def throughput(model: Model, scheme: Scheme, depth: int, width: int, batch: int) -> float:
    """Sequences per second, simulated."""
    plan = paper_plan(model, scheme, depth, width, batch)
    return simulate(plan).samples_per_s


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


def ratio(shape: tuple[Model, int, int, int], scheme: Scheme) -> float:
    model, depth, width, batch = shape
    ours = throughput(model, "2bw", depth, width, batch)
    return ours / throughput(model, scheme, depth, width, batch)


def ratios() -> list[list[str]]:
    rows = []
    for what, printed, shape, scheme in RATIOS:
        found = ratio(shape, scheme)
        rows.append([what, f"{printed:g}", f"{found:.2f}", f"{100 * (found / printed - 1):+.0f} %"])
    return rows


def speeds() -> list[list[str]]:
    """Read from the figure, then predicted."""
    rows = []
    for figure, model, depth, width, batch, read in FIGURES:
        found = [throughput(model, scheme, depth, width, batch) for scheme in SCHEMES]
        cells = [f"{a:g} / {b:.0f}" for a, b in zip(read, found, strict=True)]
        rows.append([figure, model.name, f"{depth} x {width}", str(batch), *cells])
    return rows


def memories() -> list[list[str]]:
    rows = []
    for figure, model, batch, read in MEMORY:
        cells = []
        for scheme, seen in zip(SCHEMES, read, strict=True):
            found = worst_bytes(model, 8, scheme, batch // MICROBATCH)
            fits = found <= DEVICE.usable_bytes
            known = "OOM" if seen is None else f"{seen:g}"
            cells.append(f"{known} / {f'{found / GB:.1f}' if fits else 'OOM'}")
        rows.append([figure, model.name, str(batch), *cells])
    return rows


def decisions() -> list[list[str]]:
    rows = []
    for model, depth in ((GPT_2_2B, 8), (GPT_3_8B, 16)):
        found = decide(model, 64, 2048)
        again = sum(found.recompute)
        rows.append(
            [
                f"{model.name} on 64 GPUs, batch 2048",
                f"d = {depth}",
                f"d = {found.depth}, w = {found.width}, {again} stages recompute",
            ]
        )
    for model, sizes in ((GPT_1_3B, "16, 4"), (GPT_2_2B, "16, 1")):
        ours = [largest_microbatch(model, 8, again=again) for again in (True, False)]
        rows.append(
            [
                f"{model.name} on 8 GPUs: largest microbatch with and without recomputation",
                sizes,
                ", ".join(map(str, ours)),
            ]
        )
    return rows


def _table(head: str, rows: list[list[str]]) -> str:
    names = head.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page() -> str:
    """docs/paper.md."""
    return f"""\
# The paper's tables, predicted

Made by `tests/paper.py`; tests/test_paper.py keeps it so. The models, servers and schedules of
PipeDream-2BW (arXiv:2006.09503v3) as our simulation sees them. One figure of the paper calibrates
it, that GPT with 355M parameters sustains 45 TFLOP/s on one V100: matrix products then run at
{rate() / 1e12:.1f} TFLOP/s, and everything else at the memory's bandwidth. Nothing is fitted to
what is predicted. As in the paper's runs every stage has equally many layers (the last also the
head, a copy of the embedding), all recompute, and microbatches have {MICROBATCH} samples, which is
what the paper's own script runs; inter-layer parallelism updates after each, as that script has it.
GPipe flushes, and updates, after as many as fit: the paper does not say so, but its bars are flat
in the batch. The figures have no numbers: theirs were read from the bars, to about one unit.

## Ratios that the paper prints

{_table("ratio | paper | ours | difference", ratios())}

All are some percent high: under 2BW the paper's devices never rest, and what its runtime spends
beside computing shows most there. It waits for every message, and casts weights to fp16 anew, up to
twice per microbatch.

## Throughput, sequences per second (paper / ours)

{_table("figure | model | stages x replicas | batch | inter-layer | GPipe | Flush | 2BW", speeds())}

On one server all are within 15 %, but for GPipe of BERT, of which more microbatches fit here; most
are low: larger products are faster than those of the 355M model. On 64 GPUs ours are up to 1.6
times the paper's: messages overlap with computing here, and the network between servers is taken
to give what its data sheet says. Inter-layer parallelism of GPT 2.2B on 64 GPUs is read as 11, of
BERT of the same size as 30; ours is 31 and 32.

## Memory of the fullest of 8 GPUs, GB (paper / ours)

{_table("figure | model | batch | inter-layer | GPipe | Flush | 2BW", memories())}

Bytes per parameter are those of the paper's code in mixed precision: 20, and 24 under 2BW, which
keeps two fp32 weights. It drops the fp16 gradients when an update begins; so under GPipe and
inter-layer parallelism, where all forwards come first, 18 are there when most activations are. All
are within 1 GB.

## Decisions

{_table("question | paper | ours", decisions())}

The planner is p2bw's own search over depths, with the bytes above and a second set of gradients,
which its runtime keeps where replicas are summed late. That the paper's 2.2B model is faster with
recomputation at microbatch 16 (43 sequences per second) than without at 1 (29), and its 1.3B model
as fast at 16 with as at 4 without, is nothing that this model can know: it has small products as
fast as large ones. Figure 12 tells why they are not. At microbatch 1 its four bars (31 and 40
sequences per second of the 1.3B model with and without, 22 and 29 of the 2.2B) are all 2.7 to 2.9
ms for each layer and pass, whatever the layer's width: the time to launch it, not to compute it.
`p2bw profile` measures that on the device at hand.
"""
