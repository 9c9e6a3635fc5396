"""A stage's forwards and backwards, by themselves."""

import torch
from torch import Tensor, nn

from p2bw.contract.plan import Stage, Transfer
from p2bw.runtime.compute import Compute
from p2bw.runtime.weights import Weights


class Shift(nn.Module):
    """Autograd gives `x` and `shift` gradients that are views of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(-1) + self.shift.view(-1)).view(4, 8)


def test_a_gradient_that_is_sent_shares_no_memory_with_one_that_is_added_to() -> None:
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
    module = Shift()
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
        assert summed.unique().tolist() == [6]
