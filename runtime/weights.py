"""The weights of one stage: one or two versions as sets of leaf tensors, and their update."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]


class Weights:
    """Version v of the trainable parameters lives in the leaf tensors of set v % copies.

    Autograd keeps leaves by reference, so versions must be different tensors: swapping `.data`
    under a pending backward silently gives wrong gradients. The module itself exists once, and a
    version is chosen by plugging its leaves into it. So whatever else the module holds (running
    statistics, attributes of edited stage code) is single too, and follows the microbatches'
    order. Plugging happens once per batch, as forwards run in order.
    """

    def __init__(self, module: nn.Module, copies: int) -> None:
        self.module = module
        self.slots: dict[str, list[tuple[nn.Module, str]]] = {}  # where a parameter is plugged in
        first: dict[str, nn.Parameter] = {}
        names: dict[nn.Parameter, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                names.setdefault(parameter, name)
                first[names[parameter]] = parameter
                owner, _, attribute = name.rpartition(".")
                slot = (module.get_submodule(owner), attribute)
                self.slots.setdefault(names[parameter], []).append(slot)
        self.sets = [first]
        for _ in range(1, copies):
            self.sets.append({n: nn.Parameter(p.detach().clone()) for n, p in first.items()})
        self.plugged = 0
        for version in reversed(range(copies)):
            self.use(version)
            for part in module.modules():
                if isinstance(part, nn.RNNBase):
                    part.flatten_parameters()  # cuDNN wants them side by side, in each version

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sets[0])

    def leaves(self, version: int) -> dict[str, nn.Parameter]:
        return self.sets[version % len(self.sets)]

    def use(self, version: int) -> None:
        """Let the module compute with a version from now on."""
        index = version % len(self.sets)
        if index != self.plugged:
            for name, leaf in self.sets[index].items():
                for owner, attribute in self.slots[name]:
                    setattr(owner, attribute, leaf)
            self.plugged = index

    def take_gradients(self, version: int) -> dict[str, Tensor]:
        """The gradients summed on a version's leaves, which then have none: a batch is over."""
        taken = {}
        for name, leaf in self.leaves(version).items():
            if leaf.grad is not None:
                taken[name] = leaf.grad
                leaf.grad = None
        return taken


class Updater:
    """Makes W(t+1) of W(t) for some of a stage's parameters, with the user's optimizer.

    The optimizer sees Parameters of its own that never enter an autograd graph; before each step
    they are pointed at the memory of the version to be made. So there is one optimizer state, and
    no third copy of the weights.
    """

    def __init__(
        self,
        weights: Weights,
        names: Iterable[str],
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler,
    ) -> None:
        self.weights = weights
        leaves = weights.leaves(0)
        self.parameters = {name: nn.Parameter(leaves[name].data) for name in names}
        self.optimizer = None
        self.scheduler = None
        if self.parameters:
            self.optimizer = make_optimizer(self.parameters.items())
            self.scheduler = make_scheduler(self.optimizer)

    def update(self, batch: int, gradients: Mapping[str, Tensor]) -> None:
        """W(batch + 1) = optimizer(W(batch), gradients), into the memory of the oldest version."""
        if self.optimizer is None:
            return
        old, new = self.weights.leaves(batch), self.weights.leaves(batch + 1)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if new is not old:
                    new[name].copy_(old[name])
                parameter.data = new[name].data
                parameter.grad = gradients.get(name)
        self.optimizer.step()
        # Writing through another tensor, the optimizer left no trace on the leaves: with it, a
        # backward that still needs the overwritten version raises instead of being wrong.
        torch.autograd.graph.increment_version([new[name] for name in self.parameters])
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
