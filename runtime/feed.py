"""A rank's microbatches: a function of the seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from p2bw.contract.errors import UsageError
from p2bw.contract.plan import Plan, describe
from p2bw.modelfile.load import ModelFile, flatten_microbatch


class Feed:
    """The program inputs of one rank's stage, one microbatch after the other.

    Every rank runs through the same iterator, of which its replica uses one item of `width`. User
    code that draws random numbers while it makes data has a generator state to itself, as the
    stages draw different numbers from theirs.
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

    def microbatch(self, wanted: int) -> tuple[Tensor, ...]:
        """The stage's inputs in item `wanted` of the data; the numbers must not go back."""
        if not self.names:
            return ()
        assert wanted >= self.next_item
        item: tuple[Any, Any] = (None, None)
        with self._own_generator():
            while self.next_item <= wanted:
                if (found := next(self.items, None)) is None:
                    raise UsageError(
                        f"data() ended after {self.next_item} microbatches, the run needs more; "
                        f"ask for fewer --steps, or let data() start anew"
                    )
                self.next_item, item = self.next_item + 1, found
        tensors = self._checked(flatten_microbatch(*item))
        return tuple(tensors[name].to(self.device) for name in self.names)

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

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        theirs = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(theirs)
