"""Sum: a linear expression of an integer program, built in place."""

from typing import Any


class Sum:
    """A linear expression in whole numbers, built in place."""

    def __init__(self, constant: int = 0) -> None:
        self.constant = constant
        self._factors: dict[int, int] = {}
        self._literals: dict[int, Any] = {}

    def add(self, literal: Any, factor: int = 1) -> None:
        """Add a variable times a factor; a plain number stands for itself."""
        if isinstance(literal, int):
            self.constant += literal * factor
        elif factor:
            self._literals[literal.index] = literal
            self._factors[literal.index] = self._factors.get(literal.index, 0) + factor

    def plus(self, other: "Sum", factor: int = 1) -> None:
        self.constant += other.constant * factor
        for index, literal in other._literals.items():
            self.add(literal, other._factors[index] * factor)

    @property
    def most(self) -> int:
        """An upper bound, all of its variables being Boolean."""
        return self.constant + sum(factor for factor in self._factors.values() if factor > 0)

    def expression(self) -> Any:
        from ortools.sat.python import cp_model

        used = [index for index, factor in self._factors.items() if factor]
        return self.constant + cp_model.LinearExpr.weighted_sum(
            [self._literals[index] for index in used], [self._factors[index] for index in used]
        )
