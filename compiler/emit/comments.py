"""Foreign words in comments and docstrings: paths, sources, names."""

import re
from collections.abc import Sequence


def plain(text: str) -> str:
    """Foreign text for a comment or docstring: one line, nothing that could end it."""
    return re.sub(r"[^\x20-\x7e]|[\\\"]", "?", text)


def spans(paths: Sequence[str], limit: int = 3) -> str:
    """ "h.3 .. h.5, ln_f": paths in words, runs of numbered siblings as spans."""
    groups: list[list[str]] = []
    for path in paths:
        if groups and _follows(groups[-1][-1], path):
            groups[-1].append(path)
        else:
            groups.append([path])
    words = [group[0] if len(group) == 1 else f"{group[0]} .. {group[-1]}" for group in groups]
    if len(words) > limit:
        words = [*words[: limit - 1], f"... {words[-1]}"]
    return plain(", ".join(words))


def _follows(before: str, after: str) -> bool:
    old, new = before.split("."), after.split(".")
    changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    if len(old) != len(new) or len(changed) != 1:
        return False
    a, b = changed[0]
    return a.isdecimal() and b.isdecimal() and int(b) == int(a) + 1
