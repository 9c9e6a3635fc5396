"""docs/paper.md: the paper's tables and our predictions side by side (tests/paper.py)."""

from paper import (
    DEVICE,
    FIGURE_12,
    FIGURES,
    GB,
    GPT_1_3B,
    GPT_2_2B,
    GPT_3_8B,
    LAUNCH_S,
    MEMORY,
    MICROBATCH,
    RATIOS,
    SCHEMES,
    Model,
    decide,
    largest_microbatch,
    rate,
    ratio,
    throughput,
    with_microbatch,
    worst_bytes,
)

FIGURE_12_HEAD = (
    "model | recomputes | microbatch | figure 12 | ours | difference | ours without launches"
)


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


def microbatches() -> list[list[str]]:
    """Read from figure 12, then predicted: as the page does, and if launching took no time."""
    rows = []
    for model, again, read in FIGURE_12:
        for size, seen in read.items():
            ours = [with_microbatch(model, size, again, launch) for launch in (LAUNCH_S, 0.0)]
            cells = [
                str(seen),
                f"{ours[0]:.0f}",
                f"{100 * (ours[0] / seen - 1):+.0f} %",
                f"{ours[1]:.0f}",
            ]
            rows.append([model.name, "yes" if again else "no", str(size), *cells])
    return rows


def gain_without(model: Model, size: int, share: float) -> float:
    """How many times as fast without recomputation, at a share of the time to launch."""
    launch = share * LAUNCH_S
    return with_microbatch(model, size, False, launch) / with_microbatch(model, 16, True, launch)


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

Made by `tests/paper_page.py`; tests/test_paper.py keeps it so. The models, servers and schedules of
PipeDream-2BW (arXiv:2006.09503v3) as our simulation sees them. One figure of the paper calibrates
it, that GPT with 355M parameters sustains 45 TFLOP/s on one V100: matrix products then run at
{rate() / 1e12:.1f} TFLOP/s, and everything else at the memory's bandwidth. Each pass of a layer
also takes {1000 * LAUNCH_S:.2f} ms to launch, however small it is. That is a measurement of NVIDIA
(FasterTransformer 2.1, from the month of the paper: PyTorch on a V100, with a Xeon of the same
generation, took 12.3 ms for an encoder of 12 layers, for 32 tokens as for 2,048). Nothing is fitted
to what is predicted. As in the paper's runs every stage has equally many layers (the last also the
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

On one server all are within 21 %. Most are low: larger products are faster than those of the 355M
model, and launching overlaps with computing where microbatches are large. GPipe of BERT is high, as
more of its microbatches fit here. On 64 GPUs ours are up to 1.5 times the paper's: messages overlap
with computing here, and the network between servers is taken to give what its data sheet says.
Inter-layer parallelism of GPT 2.2B on 64 GPUs is read as 11, of BERT of the same size as 30; ours
is 30 for both.

## Memory of the fullest of 8 GPUs, GB (paper / ours)

{_table("figure | model | batch | inter-layer | GPipe | Flush | 2BW", memories())}

Bytes per parameter are those of the paper's code in mixed precision: 20, and 24 under 2BW, which
keeps two fp32 weights. It drops the fp16 gradients when an update begins; so under GPipe and
inter-layer parallelism, where all forwards come first, 18 are there when most activations are. All
are within 1 GB.

## Decisions

{_table("question | paper | ours", decisions())}

The planner is p2bw's own search over depths, with the bytes above and a second set of gradients,
which its runtime keeps where replicas are summed late.

## Recomputation or larger microbatches

{_table(FIGURE_12_HEAD, microbatches())}

The paper's 2.2B model is faster with recomputation (43 sequences per second, at microbatch 16) than
without (29, at 1), and its 1.3B model about as fast with (66, at 16) as without (67, at 4). So are
they here, the 2.2B model even compared with microbatches of 2 without, which fit by our count
({with_microbatch(GPT_2_2B, 16, True):.1f} with, {with_microbatch(GPT_2_2B, 2, False):.1f} without).

The time to launch decides. If there were none, small microbatches would be as fast as large ones,
and recomputation would never pay; with half of it the 2.2B model would be faster without, by
{100 * (gain_without(GPT_2_2B, 2, 0.5) - 1):.0f} % at microbatches of 2. Launching and computing are
added up here, as if neither hid the other.
"""
