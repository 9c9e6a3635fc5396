"""A stage's forwards and backwards, by themselves."""

import pytest
import torch
from torch import Tensor, nn

from p2bw.contract.plan import Stage, Transfer
from p2bw.contract.seeds import forward_seed
from p2bw.runtime.compute import Compute
from p2bw.runtime.weights import Weights


class Shift(nn.Module):
    """Autograd gives `x` and `shift` gradients that are views of the same memory."""

    def __init__(self, skips: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4, 8))
        self.skips, self.forwards = skips, 0  # so many of a batch's three do not use it

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if (self.forwards - 1) % 3 < self.skips:
            return x.view(-1).view(4, 8)
        return (x.view(-1) + self.shift.view(-1)).view(4, 8)


@pytest.mark.parametrize("skips", [0, 1])
def test_a_gradient_that_is_sent_shares_no_memory_with_one_that_is_added_to(skips: int) -> None:
    x, y = (
        Transfer(tensor=name, peer=peer, shape=(4, 8), dtype=torch.float32, gradient=True)
        for name, peer in (("x", 0), ("y", 2))
    )
    stage = Stage(
        index=1,
        recompute=False,
        inputs=(),
        arguments=("x",),
        results=("y",),
        receives=(x,),
        sends=(y,),
        devices=(1,),
    )
    module = Shift(skips)
    weights = Weights(module, copies=2)
    compute = Compute(stage, module, weights, seed=0, device=torch.device("cpu"), loss_share=1)
    for batch in range(2):
        sent = []
        for number in range(3):
            compute.forward(number, batch, {"x": torch.randn(4, 8)})
            gradient = torch.full((4, 8), number + 1.0)
            sent.append(compute.backward(number, batch, {"y": gradient})["x"])
        assert [gradient.unique().tolist() for gradient in sent] == [[1], [2], [3]]
        (summed,) = weights.take_gradients([batch]).values()
        assert summed.unique().tolist() == [6 - skips]


def test_every_forward_has_random_numbers_of_its_own() -> None:
    found = {
        forward_seed(seed, stage, microbatch)
        for seed in (-1, 0, 1, 2**64)
        for stage in range(8)
        for microbatch in (*range(1000), 10**12)
    }
    assert len(found) == 4 * 8 * 1001
    assert all(0 <= seed < 2**63 for seed in found)  # what a generator takes
    torch.default_generator.manual_seed(max(found))
