"""The command line: `p2bw` and `python -m p2bw`."""

from p2bw import diff, planning, profiling, rehearsing, report, simulation, sweeping, training
from p2bw.app import app

__all__ = [
    "app",
    "diff",
    "main",
    "planning",
    "profiling",
    "rehearsing",
    "report",
    "simulation",
    "sweeping",
    "training",
]


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
