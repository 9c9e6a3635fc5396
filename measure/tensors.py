"""The tensors that a segment is run on: the user's own model whole, or just what it is given."""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2bw.compiler.program import Program
from p2bw.contract.errors import ModelError
from p2bw.measure.segment import Segment
from p2bw.modelfile.build import build_recorded
from p2bw.modelfile.initial import lookup
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import flatten_microbatch, map_tensors, seed_all, seeded
from p2bw.modelfile.own import OwnModules


class Tensors:
    """Makes what a segment is given, on the device; with the model `whole`, the model's own.

    Without, weights are random numbers, as nothing but their shapes matters to the time, and
    buffers have their values: they may be indices. So have the program's inputs. What other blocks
    would compute is random where it is a number, zero where it may be an index, true for a mask.
    """

    def __init__(
        self, file: ModelFile, program: Program, device: torch.device, *, whole: bool
    ) -> None:
        self.file = file
        self.program = program
        self.device = device
        seed_all(0)
        self.model = file.model().to(device) if whole else None
        self.microbatch = file.inputs(program.batch_size), file.targets(program.batch_size)
        tensors = flatten_microbatch(*self.microbatch)
        self.inputs = {n: t.to(device) for n, t in zip(program.inputs, tensors, strict=True)}

    @property
    def owner(self) -> nn.Module:
        """What an opaque module is looked up on."""
        return self.model or _Own(OwnModules(self.file), self.device)

    def on_device(self) -> tuple[Any, Any]:
        """Inputs and targets as the user's functions make them, on the device."""
        move = partial(map_tensors, function=lambda _, tensor: tensor.to(self.device))
        return move(self.microbatch[0]), move(self.microbatch[1])

    def given(self, segment: Segment) -> Mapping[fx.Node, Tensor]:
        return {node: self._given(node) for node in segment.given}

    def _given(self, node: fx.Node) -> Tensor:
        if node.op == "placeholder":
            return self.inputs[node.name]
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        (kind,) = self.program.facts[node.name].out
        (strides,) = self.program.fact(node, "strides")
        tensor = torch.empty_strided(kind.shape, strides, dtype=kind.dtype, device=self.device)
        return _filled(tensor).requires_grad_(self.program.fact(node, "requires_grad")[0])

    def _attribute(self, name: str) -> Tensor:
        if name in self.program.constants:
            return self.program.constants[name].to(self.device)
        if self.model is not None:
            found = lookup(self.model, name)
            assert found is not None, name
            return found
        if name in self.program.parameters:
            attribute = self.program.parameters[name]
            empty = torch.empty(
                attribute.type.shape, dtype=attribute.type.dtype, device=self.device
            )
            return _filled(empty).requires_grad_(attribute.trainable)
        return self._recorded(name).to(self.device)

    @cached_property
    def _recorded(self) -> Callable[[str], Tensor]:
        """A buffer's value, by the user's own code, without the rest of the model."""
        try:
            model, recording = build_recorded(self.file, 0)
        except ModelError:  # its code looks at weights: zeros are valid indices, too
            return lambda name: torch.zeros(
                self.program.buffers[name].type.shape, dtype=self.program.buffers[name].type.dtype
            )

        def value(name: str) -> Tensor:
            tensor = lookup(model, name)
            assert tensor is not None, name
            return recording.values(name, tensor)

        return value


class _Own(nn.Module):
    """Stands for a model of which only modules that could not be traced are ever asked for."""

    def __init__(self, own: OwnModules, device: torch.device) -> None:
        super().__init__()
        self.own = own
        self.device = device
        self.found: dict[str, nn.Module] = {}

    def get_submodule(self, target: str) -> nn.Module:
        if target not in self.found:
            self.found[target] = self.own.initial(target).to(self.device)
        return self.found[target]


def _filled(tensor: Tensor) -> Tensor:
    with seeded("profile"):
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.normal_(std=0.02)
        return tensor.fill_(tensor.dtype == torch.bool)
