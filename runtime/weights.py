"""The weights of one stage: one or two versions as sets of leaf tensors, and their update."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from p2bw.contract.checkpoint import StageState

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]

TOGETHER = 1 << 28  # bytes of parameters that are updated at once


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
        # Of modules that could not be traced: the data may decide that a weight has no gradient.
        self.fickle = [
            name
            for name, slots in self.slots.items()
            if any(hasattr(owner, "p2bw_opaque") for owner, _ in slots)
        ]
        for _ in range(1, copies):
            self.sets.append({n: nn.Parameter(p.detach().clone()) for n, p in first.items()})
        self.bare = [list(leaves.values()) for leaves in self.sets]  # that have no gradient yet
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
                    if type(owner).__setattr__ is nn.Module.__setattr__:
                        owner._parameters[attribute] = leaf  # what it does, 30 times faster
                    else:
                        setattr(owner, attribute, leaf)
            self.plugged = index

    def save(self, state: StageState, step: int, buffers: Mapping[str, Tensor]) -> None:
        """Add to a state: version `step`, the versions that live before it, and buffers."""
        for age in range(len(self.sets)):
            for name, leaf in self.leaves(step - age).items():
                state.tensors[f"{_prefix(age)}/{name}"] = leaf.detach()
        state.tensors.update({f"buffers/{name}": buffer for name, buffer in buffers.items()})

    def load(self, state: StageState, step: int) -> None:
        """Go on from a state; a version that it lacks begins as the newest."""
        with torch.no_grad():
            for age in range(len(self.sets)):
                for name, leaf in self.leaves(step - age).items():
                    newest = state.tensors[f"weights/{name}"]
                    leaf.copy_(state.tensors.get(f"{_prefix(age)}/{name}", newest))
            for name, buffer in self.module.named_buffers():
                if f"buffers/{name}" in state.tensors:
                    buffer.copy_(state.tensors[f"buffers/{name}"])

    def adopted(self, version: int) -> list[Tensor]:
        """The gradients that a version's leaves have had since this was asked, the first ones."""
        index = version % len(self.sets)
        if not (bare := self.bare[index]):
            return []
        self.bare[index] = [leaf for leaf in bare if leaf.grad is None]
        return [leaf.grad for leaf in bare if leaf.grad is not None]

    def take_gradients(self, versions: Iterable[int]) -> dict[str, Tensor]:
        """The gradients summed on some versions' leaves, which then have none: a batch is over."""
        taken: dict[str, Tensor] = {}
        for version in versions:
            self.bare[version % len(self.sets)] = list(self.leaves(version).values())
            for name, leaf in self.leaves(version).items():
                if leaf.grad is not None:
                    taken[name] = taken[name] + leaf.grad if name in taken else leaf.grad
                    leaf.grad = None
        return taken

    def complete(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients with zeros for those that data may leave out, in one order on all replicas.

        And which of these there are, as ones and zeros: of what no replica has, none is used.
        """
        leaves = self.leaves(0)
        made = {
            name: gradients[name] if name in gradients else torch.zeros_like(leaves[name])
            for name in self.names
            if name in gradients or name in self.fickle
        }
        present = torch.tensor([float(name in gradients) for name in self.fickle])
        return made, present.to(leaves[self.fickle[0]].device) if self.fickle else present


def _prefix(age: int) -> str:
    return ("weights", "previous")[age] if age < 2 else f"previous{age}"


class Updater:
    """Makes W(t+1) of W(t) for some of a stage's parameters, with the user's optimizer.

    The optimizer sees Parameters of its own that never enter an autograd graph; before each step
    they are pointed at the memory of the version to be made. So there is one optimizer state, and
    no third copy of the weights. Of weights in 16 bits it sees fp32 masters instead, which are
    rounded to give each version (Micikevicius et al., "Mixed Precision Training", section 3.1).
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
        self.parameters = {name: nn.Parameter(_master(leaves[name])) for name in names}
        self.direct = [n for n, p in self.parameters.items() if p.dtype == leaves[n].dtype]
        self.rounded = [n for n, p in self.parameters.items() if p.dtype != leaves[n].dtype]
        self.optimizer = None
        self.scheduler = None
        if self.parameters:
            self.optimizer = make_optimizer(self.parameters.items())
            self.scheduler = make_scheduler(self.optimizer)
        self.parts = self._parts()

    def _parts(self) -> list[list[str]]:
        """What is updated at once: fp32 gradients of 16-bit weights, and what the optimizer makes
        for a moment, are as large. Torch's own skip parameters that have no gradient."""
        names, kind = list(self.parameters), type(self.optimizer)
        if not kind.__module__.startswith("torch.optim") or kind is torch.optim.LBFGS:
            return [names]
        parts: list[list[str]] = [[]]
        for name in names:
            together = sum(self.parameters[n].nbytes for n in (*parts[-1], name))
            if parts[-1] and together > TOGETHER:
                parts.append([])
            parts[-1].append(name)
        return parts

    @property
    def learning_rate(self) -> float | None:
        """Of the next update, in the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else None

    def update(
        self, batch: int, gradients: Mapping[str, Tensor], scale: Tensor | None = None
    ) -> None:
        """W(batch + 1) = optimizer(W(batch), scale * gradients), in the oldest version's memory."""
        if self.optimizer is None:
            return
        old, new = self.weights.leaves(batch), self.weights.leaves(batch + 1)
        with torch.no_grad():
            if new is not old and self.direct:
                torch._foreach_copy_([new[n] for n in self.direct], [old[n] for n in self.direct])
                for name in self.direct:
                    self.parameters[name].data = new[name].data
        for part in self.parts:
            given = {n: gradients[n].to(self.parameters[n].dtype) for n in part if n in gradients}
            if scale is not None and given:
                torch._foreach_mul_(list(given.values()), scale)
            for name in given:
                self.parameters[name].grad = given[name]
            del given  # the parameters' are the last references
            self.optimizer.step()
            for name in part:
                self.parameters[name].grad = None
        if self.rounded:
            with torch.no_grad():
                masters: list[Tensor] = [self.parameters[n] for n in self.rounded]
                torch._foreach_copy_([new[n] for n in self.rounded], masters)
        # Writing through another tensor, the optimizer left no trace on the leaves: with it, a
        # backward that still needs the overwritten version raises instead of being wrong.
        torch.autograd.graph.increment_version([new[name] for name in self.parameters])
        if self.scheduler is not None:
            self.scheduler.step()

    def save(self, state: StageState) -> None:
        """Add to a state: masters, and what the optimizer keeps of each parameter."""
        for name in self.rounded:
            state.tensors[f"master/{name}"] = self.parameters[name].detach()
        groups = self.optimizer.param_groups if self.optimizer else []
        group_of = {parameter: group for group in groups for parameter in group["params"]}
        for name, parameter in self.parameters.items():
            kept = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            plain: dict[str, Any] = {}
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    state.tensors[f"optimizer/{key}/{name}"] = value
                else:
                    plain[key] = value
            group = {k: v for k, v in group_of.get(parameter, {}).items() if k != "params"}
            state.values[name] = {"state": plain, "group": _plain(group)}

    def load(self, state: StageState, step: int) -> None:
        """Go on from a state after `step` updates.

        The learning-rate schedule is replayed: it depends on the number of updates alone.
        """
        for name in self.rounded:
            master = state.tensors.get(f"master/{name}", state.tensors[f"weights/{name}"])
            self.parameters[name].data.copy_(master)
        if self.optimizer is None:
            return
        names = {parameter: name for name, parameter in self.parameters.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for _ in range(step):
                if self.scheduler is not None:
                    self.scheduler.step()
        for group in self.optimizer.param_groups:
            name = names[group["params"][0]] if group["params"] else ""
            for key, value in state.values.get(name, {}).get("group", {}).items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for key, value in state.tensors.items():
            kind, _, rest = key.partition("/")
            kept, _, name = rest.partition("/")
            if kind == "optimizer" and name in self.parameters:
                parameter = self.parameters[name]
                placed = value.to(parameter.device) if value.dim() else value
                self.optimizer.state[parameter][kept] = placed
        for name, parameter in self.parameters.items():
            if plain := state.values.get(name, {}).get("state"):
                self.optimizer.state[parameter].update(plain)


def _master(leaf: nn.Parameter) -> Tensor:
    small = leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.detach().float() if small else leaf.data


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that are numbers; what else a group holds, the user's code makes anew."""
    numbers = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
    kinds = (int, float, bool, str, type(None))
    return {
        key: list(value) if isinstance(value, (tuple, list)) else value
        for key, value in numbers.items()
        if isinstance(value, kinds)
        or (isinstance(value, (tuple, list)) and all(isinstance(v, kinds) for v in value))
    }
