"""p2bw: a declarative pipeline partitioner and a minimal PipeDream-2BW runtime.

The command line is thin: `compile`, `verify`, `run` and `load` do here what its commands do.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "compiler").is_dir():  # a checkout: compiler/, passes/ and runtime/ lie beside cli/
    __path__.insert(0, str(_here.parent))

# Resolved on first use: importing torch takes seconds, and `p2bw --help` must not wait for it.
_PUBLIC = {
    "compile": ("p2bw.compiler.driver", "compile_model"),
    "opaque": ("p2bw.contract.stages", "opaque"),
    "load": ("p2bw.compiler.plan", "read_plan"),
    "verify": ("p2bw.compiler.verify", "verify"),
    "run": ("p2bw.launch", "run"),
    "profile": ("p2bw.measure.driver", "profile_model"),
    "rehearse": ("p2bw.measure.rehearsal", "rehearse"),
    "sweep": ("p2bw.compiler.sweep", "sweep"),
    "simulate": ("p2bw.compiler.simulation.simulate", "simulate"),
}
__all__ = [
    "__version__",
    "compile",
    "load",
    "opaque",
    "profile",
    "rehearse",
    "run",
    "simulate",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
