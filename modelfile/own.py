"""Modules of the user's own that run as they are: taken out of their model, alone with memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from p2bw.contract.errors import ModelError
from p2bw.modelfile.build import build, build_real, build_recorded
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.microbatch import seeded

Values = Callable[[str, Tensor], Tensor]  # (name in the model, tensor without memory) -> tensor

# Where a module keeps its parameters, buffers and children.
_REGISTERED = ("_parameters", "_buffers", "_modules")


class OwnModules:
    """Takes modules out of a user's model that is built once, without its weights."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self._model: nn.Module | None = None
        self._initial: tuple[nn.Module, Values] | None = None

    def blank(self, path: str) -> nn.Module:
        """The module at a path, its parameters and buffers zeros until they are loaded by name."""
        if self._model is None:
            with seeded("model"):
                self._model = build(self.file, FakeTensorMode(allow_non_fake_inputs=True))
        module = _with_memory(self._model, path, _zeros)
        if not any(_elsewhere(module)):
            return module
        # Its constants have no values, or it keeps parameters where only a real model shows them.
        reason = ModelError(f"{self.file.path.name}: {path} needs the values of its tensors")
        with seeded("model"):
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            self._model = build_real(self.file, mode, reason)
        module = _with_memory(self._model, path, _zeros)
        for name in _elsewhere(module):
            raise ModelError(
                f"{self.file.path.name}: {path} keeps a parameter or buffer in {name}, where no "
                f"other weights can be loaded; keep it in an nn.ParameterList or look it up by name"
            )
        return module

    def initial(self, path: str) -> nn.Module:
        """The module at a path with first weights by the user's own initialisers."""
        module = self.blank(path)
        if self._initial is None:
            try:
                model, recording = build_recorded(self.file, seed=0)
                self._initial = model, recording.values
            except ModelError:  # its code looks at weights
                with seeded("model"):
                    self._initial = self.file.model(), lambda _, tensor: tensor
        model, values = self._initial
        source = model.get_submodule(path)
        first = dict((*source.named_parameters(), *source.named_buffers()))
        with torch.no_grad():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                tensor.copy_(values(f"{path}.{name}", first[name]))
        return module


def _zeros(name: str, tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).zero_()


def _with_memory(model: nn.Module, path: str, values: Values) -> nn.Module:
    """Give the tensors of one module of a model memory; what is tied in it stays tied."""
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the originals live on: no id is used twice
    module = model.get_submodule(path)
    for prefix, part in module.named_modules():
        for slots in (part._parameters, part._buffers):
            for name, tensor in list(slots.items()):
                if tensor is None or not isinstance(tensor, FakeTensor):
                    continue
                if id(tensor) not in done:
                    made = values(f"{path}.{prefix}.{name}", tensor)
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    done[id(tensor)] = tensor, made
                setattr(part, name, done[id(tensor)][1])
    return module


def _elsewhere(module: nn.Module) -> Iterator[str]:
    """Attributes with tensors that have no memory, or parameters that are not registered there."""
    for prefix, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute in _REGISTERED or isinstance(part, nn.RNNBase):
                continue  # recurrent layers keep their own lists of weights, and keep them right
            if any(isinstance(leaf, (FakeTensor, nn.Parameter)) for leaf in tree_leaves(value)):
                yield f"{prefix}.{attribute}".lstrip(".")
