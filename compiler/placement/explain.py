"""Why nothing fits: which limit binds, by how much, and what would help."""

from collections.abc import Sequence

from p2bw.compiler.placement.candidates import Model
from p2bw.compiler.placement.evaluate import Shape


def explain_infeasible(models: Sequence[Model], shapes: Sequence[Shape]) -> str:
    return "nothing fits"
