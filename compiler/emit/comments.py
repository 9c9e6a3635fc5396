"""Foreign words in comments and docstrings: paths, sources, names."""

import re
from collections.abc import Sequence


def plain(text: str) -> str:
    """Foreign text for a comment or docstring: one line, nothing that could end it."""
    return re.sub(r"[^\x20-\x7e]|[\\\"]", "?", text)


def spans(paths: Sequence[str], width: int) -> str:
    """ "h.3-5, ln_f": paths in words, runs of numbered siblings as spans."""
    groups: list[list[str]] = []
    for path in paths:
        if groups and _follows(groups[-1][-1], path):
            groups[-1].append(path)
        else:
            groups.append([path])
    words = [_span(group[0], group[-1]) for group in groups]
    shown = words[:1]
    for word in words[1:]:
        if len(", ".join([*shown, word])) > width:
            break
        shown.append(word)
    if len(shown) < len(words):
        shown[-1] += f" and {len(words) - len(shown)} more"
    return plain(", ".join(shown))


def _follows(before: str, after: str) -> bool:
    old, new = before.split("."), after.split(".")
    changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    if len(old) != len(new) or len(changed) != 1:
        return False
    a, b = changed[0]
    return a.isdecimal() and b.isdecimal() and int(b) == int(a) + 1


def _span(first: str, last: str) -> str:
    """ "h.3-5.attn" for h.3.attn .. h.5.attn."""
    pairs = zip(first.split("."), last.split("."), strict=True)
    return ".".join(a if a == b else f"{a}-{b}" for a, b in pairs)


def wrapped(text: str, width: int) -> list[str]:
    """Words over as many lines as it takes."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return [line[:width] for line in lines]
