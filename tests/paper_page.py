"""docs/paper.md: the paper's tables and our predictions side by side (tests/paper.py)."""

from paper import (
    DEVICE,
    FIGURE_12,
    FIGURES,
    GB,
    GPT_1_3B,
    GPT_2_2B,
    GPT_3_8B,
    MEMORY,
    MICROBATCH,
    RATIOS,
    SCHEMES,
    decide,
    largest_microbatch,
    launch_s,
    rate,
    ratio,
    throughput,
    with_microbatch,
    worst_bytes,
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
    """Read from figure 12, then predicted without and with the time to launch a layer."""
    rows = []
    for model, again, read in FIGURE_12:
        for size, seen in read.items():
            cells = [f"{with_microbatch(model, size, again, s):.0f}" for s in (0.0, launch_s())]
            rows.append([model.name, "yes" if again else "no", str(size), str(seen), *cells])
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

Made by `tests/paper_page.py`; tests/test_paper.py keeps it so. The models, servers and schedules of
PipeDream-2BW (arXiv:2006.09503v3) as our simulation sees them. One figure of the paper calibrates
it, that GPT with 355M parameters sustains 45 TFLOP/s on one V100: matrix products then run at
{rate() / 1e12:.1f} TFLOP/s, and everything else at the memory's bandwidth. Nothing is fitted to
what is predicted, but for a column of the last table, which says so. As in the paper's runs every
stage has equally many layers (the last also the head, a copy of the embedding), all recompute, and
microbatches have {MICROBATCH} samples, which is what the paper's own script runs; inter-layer
parallelism updates after each, as that script has it.
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
which its runtime keeps where replicas are summed late.

## Recomputation or larger microbatches

{_table("model | recomputes | microbatch | figure 12 | ours | ours with launches", microbatches())}

That the paper's 2.2B model is faster with recomputation (43 sequences per second, at microbatch 16)
than without (29, at 1), and its 1.3B model as fast with (66, at 16) as without (67, at 4), is
nothing that the one calibration can tell: it has small products as fast as large ones. At
microbatch 1 the paper's are half as fast as ours, since a layer takes time to launch, however small
it is. No data sheet tells how much; `p2bw profile` measures it on the device at hand. The last
column has it from one bar of the figure, that of 40 (GPT 1.3B at microbatch 1, not recomputed):
{1000 * launch_s():.2f} ms for each layer and pass. The other ten bars are then within 20 %, and
both decisions are the paper's: the 1.3B model about even, the 2.2B model with recomputation, even
over microbatches of 2 without, which fit here and give
{with_microbatch(GPT_2_2B, 2, False, launch_s()):.0f} sequences per second.
"""
