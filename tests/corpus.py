"""The architectures that the tests trace, cut, verify and train: every example's tiny size."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Architecture:
    name: str
    path: Path
    factory: str = "tiny"
    batch: int = 2


CORPUS = tuple(Architecture(path.stem, path) for path in sorted((ROOT / "examples").glob("*.py")))
