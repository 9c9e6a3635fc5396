"""p2bw: a declarative pipeline partitioner and a minimal PipeDream-2BW runtime."""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "compiler").is_dir():  # a checkout: compiler/, passes/ and runtime/ lie beside cli/
    __path__.insert(0, str(_here.parent))
