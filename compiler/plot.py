"""The plot of a sweep: an SVG file of small panels over the number of devices."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from p2bw.compiler.sweep import Row

# Distinct also to those who see few colours (Okabe and Ito's palette).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
_SHAPES = ("", "6 3", "2 3")  # of lines, when the colours are used up
_WIDE, _HIGH = 360, 230  # of a panel's axes
_LEFT, _TOP, _GAP, _LEGEND = 70, 40, 95, 22
_TICKS = 5


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    value: Callable[[Row], float | None]


def _throughput(row: Row) -> float | None:
    return row.plan.samples_per_s if row.plan else None


def _memory(row: Row) -> float | None:
    return max(s.memory.total for s in row.plan.stages) / 2**30 if row.plan else None


def _utilisation(row: Row) -> float | None:
    return 100 * row.plan.utilisation if row.plan else None


_PANELS = (
    _Panel("samples per second", _throughput),
    _Panel("memory of the fullest device, GiB", _memory),
    _Panel("utilisation, %", _utilisation),
    _Panel("cost of a million samples", lambda row: row.cost),
)


def draw_sweep(rows: Sequence[Row]) -> str:
    """Throughput, memory, utilisation and, with prices, cost; points without a plan are left out.

    The axes of the numbers of devices are logarithmic, all others begin at zero.
    """
    panels = [p for p in _PANELS if any(p.value(row) is not None for row in rows)]
    series = list(dict.fromkeys(row.point.series for row in rows))
    columns = 2
    lines = -(-len(panels) // columns)
    width = columns * (_WIDE + _GAP) + 25
    height = lines * (_HIGH + _GAP) + _LEGEND * len(series) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        x = _LEFT + place % columns * (_WIDE + _GAP)
        y = _TOP + place // columns * (_HIGH + _GAP)
        parts += _draw_panel(panel, rows, series, x, y)
    for number, name in enumerate(series):
        y = lines * (_HIGH + _GAP) + number * _LEGEND + 6
        parts.append(_line([(_LEFT, y), (_LEFT + 34, y)], number))
        parts.append(f'<text x="{_LEFT + 42}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join((*parts, "</svg>", ""))


def _draw_panel(
    panel: _Panel, rows: Sequence[Row], series: Sequence[str], left: int, top: int
) -> list[str]:
    gpus = sorted({row.point.gpus for row in rows})
    low, high = math.log2(gpus[0]), math.log2(gpus[-1])
    values = [value for row in rows if (value := panel.value(row)) is not None]
    step = _step(max(values) / _TICKS)
    most = step * max(1, math.ceil(max(values) / step * 0.999))

    def at(count: int, value: float) -> tuple[float, float]:
        share = (math.log2(count) - low) / (high - low) if high > low else 0.5
        return round(left + share * _WIDE, 1), round(top + _HIGH * (1 - value / most), 1)

    parts = [f'<text x="{left}" y="{top - 14}" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(round(most / step) + 1):
        _, y = at(gpus[0], tick * step)
        parts.append(
            f'<path d="M{left} {y}H{left + _WIDE}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tick * step:.12g}</text>'
        )
    for count in gpus:
        x, y = at(count, 0)
        parts.append(
            f'<path d="M{x} {y}v5" stroke="#555"/>'
            f'<text x="{x}" y="{y + 19}" text-anchor="middle">{count}</text>'
        )
    x = left + _WIDE // 2
    parts.append(f'<text x="{x}" y="{top + _HIGH + 38}" text-anchor="middle">devices</text>')
    for number, name in enumerate(series):
        found = sorted(
            (row.point.gpus, value)
            for row in rows
            if row.point.series == name and (value := panel.value(row)) is not None
        )
        points = [at(count, value) for count, value in found]
        if len(points) > 1:
            parts.append(_line(points, number))
        color = _COLORS[number % len(_COLORS)]
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in points]
    return parts


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    way = "L".join(f"{x} {y}" for x, y in points)
    dashes = _SHAPES[number // len(_COLORS) % len(_SHAPES)]
    return (
        f'<path d="M{way}" fill="none" stroke="{_COLORS[number % len(_COLORS)]}" '
        f'stroke-width="2" stroke-dasharray="{dashes}"/>'
    )


def _step(least: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
