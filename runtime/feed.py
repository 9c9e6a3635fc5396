"""A rank's microbatches: a function of the seed alone."""

from typing import Any

import torch
from torch import Tensor

from p2bw.contract.errors import UsageError
from p2bw.contract.plan import Plan, describe
from p2bw.modelfile.load import ModelFile, flatten_microbatch


class Feed:
    """The program inputs of one rank's stage, one microbatch after the other.

    Every rank runs through the same iterator, of which its replica uses one item of `width`. User
    code that draws random numbers while it makes data goes on where it was with them: what the
    stages draw between differs. (They need no state back; every forward is seeded.)
    """

    def __init__(
        self, plan: Plan, file: ModelFile, stage: int, seed: int, device: torch.device
    ) -> None:
        self.plan = plan
        self.names = plan.stages[stage].inputs
        self.device = device
        self.items = file.data(plan.microbatch, seed)
        self.next_item = 0
        self.state = torch.Generator().manual_seed(seed % 2**63).get_state()

    def microbatch(self, wanted: int) -> dict[str, Tensor]:
        """The stage's inputs in item `wanted` of the data; the numbers must not go back."""
        if not self.names:
            return {}
        assert wanted >= self.next_item
        item: tuple[Any, Any] = (None, None)
        torch.default_generator.set_state(self.state)
        while self.next_item <= wanted:
            if (found := next(self.items, None)) is None:
                raise UsageError(
                    f"data() ended after {self.next_item} microbatches, the run needs more; "
                    f"ask for fewer --steps, or let data() start anew"
                )
            self.next_item, item = self.next_item + 1, found
        self.state = torch.default_generator.get_state()
        tensors = self._checked(flatten_microbatch(*item))
        here = self.device
        return {n: t if (t := tensors[n]).device == here else t.to(here) for n in self.names}

    def _checked(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        specs = self.plan.inputs
        if len(tensors) != len(specs) or not all(map(lambda s, t: s.fits(t), specs, tensors)):
            given = ", ".join(describe(tuple(t.shape), t.dtype) for t in tensors)
            raise UsageError(
                f"microbatch {self.next_item - 1} of data() is {given}; the plan was compiled for "
                f"{', '.join(map(str, specs))}; every microbatch must have {self.plan.microbatch} "
                f"samples of that shape"
            )
        return {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}
