"""From a PlacementProblem to a Placement, with its proof."""

from p2bw.compiler.placement.result import Limits, Placement, Progress
from p2bw.compiler.placement.solver import solve, solve_fixed

__all__ = ["Limits", "Placement", "Progress", "solve", "solve_fixed"]
