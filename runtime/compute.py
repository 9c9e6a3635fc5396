"""One stage's forwards and backwards: autograd across several microbatches in flight."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, _engine_run_backward, get_gradient_edge

from p2bw.contract.arrival import arrive
from p2bw.contract.errors import MismatchError
from p2bw.contract.plan import Stage, describe
from p2bw.contract.seeds import seed_forward
from p2bw.runtime.weights import Weights


class InFlight(NamedTuple):
    """What a stage keeps of a microbatch from its forward to its backward.

    Of the results only their places in autograd's graph: their data may go once they are sent.
    """

    arguments: Mapping[str, Tensor]  # that get a gradient; all of them if to be computed again
    gradients: dict[str, Tensor]  # of these, when they are known
    edges: Mapping[str, GradientEdge]  # of the results that have a gradient; {} if ... again
    buffers: Mapping[str, Tensor]  # as before the forward, those that computing again would change


class Compute:
    """Runs a stage's module, with the weights and the random numbers that each microbatch is due.

    `loss_share` is what one microbatch's loss counts in its batch's: gradients are then averages.
    """

    def __init__(
        self,
        stage: Stage,
        module: nn.Module,
        weights: Weights,
        seed: int,
        device: torch.device,
        loss_share: float,
    ) -> None:
        self.stage = stage
        self.module = module
        self.weights = weights
        self.seed = seed
        self.device = device
        self.loss_seed: dict[str, Tensor] = {}
        if stage.loss is not None:
            self.loss_seed[stage.loss] = torch.tensor(loss_share, device=device)
        self.in_flight: dict[int, InFlight] = {}
        self.specs = {transfer.spec.name: transfer.spec for transfer in stage.sends}
        self.differentiable = [t.spec.name for t in stage.receives if t.gradient]
        self.changing: tuple[str, ...] | None = None  # buffers that a forward writes to

    def forward(self, number: int, version: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run microbatch `number` (counted over all replicas): its results by name.

        What is to be computed again records gradients too, and drops them: without, some kernels
        (oneDNN's LSTM) give other bits, and the peak is that of computing again anyway.
        """
        named = {name: given[name] for name in self.stage.arguments}
        caught: dict[str, Tensor] = {}
        for name in self.differentiable:
            named[name] = arrive(named[name], caught, name)
        again = self.stage.recompute
        buffers = self._buffers_before() if again else {}
        results = self._run(number, version, named)
        if again:
            kept = InFlight(named, caught, {}, self._keep_changing(buffers))
        else:
            own = {name: named[name] for name in self.differentiable}
            kept = InFlight(own, caught, _edges(results), {})
        self.in_flight[number] = kept
        return {name: result.detach() for name, result in results.items()}

    def backward(
        self, number: int, version: int, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add to the weights' gradients, given those of the results; the arguments' gradients.

        An argument that the results do not depend on has a gradient of zeros. Adding zeros
        changes no bit of a sum but the sign of a zero.
        """
        kept = self.in_flight.pop(number)
        edges = kept.edges
        if self.stage.recompute:
            edges = _edges(self._run_again(number, version, kept))
        seeds = {**gradients, **self.loss_seed}
        roots = [name for name in edges if name in seeds]
        if roots:  # torch.autograd.backward, less what it first does to its arguments: 80 us
            outputs, given = tuple(edges[n] for n in roots), tuple(seeds[n] for n in roots)
            _engine_run_backward(
                outputs, given, False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        found = kept.gradients
        for name in self.differentiable:
            if name not in found:
                found[name] = torch.zeros_like(kept.arguments[name])
        adopted = self.weights.adopted(version)
        return _unshared(found, adopted) if adopted and found else found

    def _run(self, number: int, version: int, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.weights.use(version)
        seed_forward(self.seed, self.stage.index, number, self.device)
        if self.device.type == "cpu":
            results = self.module(*arguments.values())
        else:
            with self.device:  # where the stage's code makes new tensors; takes time
                results = self.module(*arguments.values())
        return self._checked(results if isinstance(results, tuple) else (results,))

    def _checked(self, results: tuple[object, ...]) -> dict[str, Tensor]:
        """A message of another size than the receiver's buffer would abort its process."""
        names = self.stage.results
        named = {n: r for n, r in zip(names, results, strict=False) if isinstance(r, Tensor)}
        if len(results) != len(names) or len(named) != len(names):
            raise MismatchError(
                f"stage {self.stage.index} should return {len(names)} tensors: {', '.join(names)}"
            )
        for name, spec in self.specs.items():
            if not spec.fits(named[name]):
                found = describe(tuple(named[name].shape), named[name].dtype)
                raise MismatchError(
                    f"stage {self.stage.index} returned {name} as {found}, the plan has {spec}"
                )
        return named

    def _buffers_before(self) -> dict[str, Tensor]:
        names, buffers = self.changing, self.module.named_buffers()
        return {n: buffer.clone() for n, buffer in buffers if names is None or n in names}

    def _keep_changing(self, before: dict[str, Tensor]) -> dict[str, Tensor]:
        """After the first forward it is known which buffers change; only those are kept."""
        if self.changing is None:
            now = dict(self.module.named_buffers())
            self.changing = tuple(
                name for name in before if not torch.equal(before[name], now[name])
            )
        return {name: before[name] for name in self.changing}

    def _run_again(self, number: int, version: int, kept: InFlight) -> dict[str, Tensor]:
        """The forward again, on copies of the buffers that it found then."""
        now = {name: self.module.get_buffer(name) for name in kept.buffers}
        self._plug_buffers(kept.buffers)
        results = self._run(number, version, kept.arguments)
        self._plug_buffers(now)
        return results

    def _plug_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.module.get_submodule(owner), attribute, buffer)


def _unshared(gradients: dict[str, Tensor], adopted: Sequence[Tensor]) -> dict[str, Tensor]:
    """Autograd may give an argument and a parameter gradients that share memory, and the
    parameter's is added to while the argument's is still being sent. It does so in the backward in
    which a parameter adopts its gradient; later ones are added to that."""
    places = {_place(gradient) for gradient in adopted}
    return {
        name: gradient.clone() if _place(gradient) in places else gradient
        for name, gradient in gradients.items()
    }


def _place(gradient: Tensor) -> int | None:
    """Which memory the gradient lies in; a sparse one's is shared with nobody."""
    if gradient.layout is not torch.strided:
        return None
    identity: int = gradient.untyped_storage()._cdata
    return identity


def _edges(results: Mapping[str, Tensor]) -> dict[str, GradientEdge]:
    return {name: get_gradient_edge(r) for name, r in results.items() if r.requires_grad}
