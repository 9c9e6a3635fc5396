"""Numbers for people: `4.12 ms`, `1.02 GiB`, `86.4 M`. Read and printed at the edge only."""

import re
from collections.abc import Iterable

from p2bw.contract.errors import UsageError


def seconds(value: float) -> str:
    """0.00412 -> '4.12 ms'."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return "0 s" if value == 0 else f"{_three(value / 1e-9)} ns"


def data(value: float) -> str:
    """1095216660 -> '1.02 GiB'."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """86400000 -> '86.4 M'."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f}"


def flops(value: float) -> str:
    """86400000 -> '86.4 MFLOP', 86 -> '86 FLOP'."""
    text = count(value)
    return f"{text}FLOP" if " " in text else f"{text} FLOP"


def parameters(value: int) -> str:
    """2156000000 -> '2.16 B' (billions, as people count parameters)."""
    return count(value).replace("G", "B")


def several(number: int, what: str) -> str:
    """(1, 'replica') -> '1 replica', (2, 'replica') -> '2 replicas'."""
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_gap(text: str) -> float:
    """'1%' -> 0.01, as is '0.01'."""
    return parse_share("--gap", text, "1% or 0.01; 0 for the optimum")


def parse_share(option: str, text: str, like: str) -> float:
    """'5%' -> 0.05, as is '0.05'; UsageError, with what it could be `like`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text, re.ASCII)
    value = float(match[1]) / (100 if match[2] else 1) if match else 1.0
    if not value < 1:
        raise UsageError(f"{option} {text}: give a share below 1, like {like}")
    return value


def _three(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"
