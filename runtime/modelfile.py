"""The user's model file: plain PyTorch with a few module-level functions (README, "model file")."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A loaded model file. Running a model file runs its author's code, like `python model.py`."""

    path: Path
    factory: str
    settings: MappingProxyType[str, Any]
    module: ModuleType

    def model(self) -> nn.Module:
        """A new model, in training mode, from the user's factory and settings."""
        built: nn.Module = getattr(self.module, self.factory)(**self.settings)
        return built.train()

    def inputs(self, batch_size: int) -> Any:
        return self.module.inputs(batch_size)

    def targets(self, batch_size: int) -> Any:
        """Example targets, or None if the model itself returns the loss."""
        function = self.function("targets")
        return function(batch_size) if function else None

    def function(self, name: str) -> Callable[..., Any] | None:
        """An optional function of the file: loss, optimizer, scheduler, data."""
        return getattr(self.module, name, None)


def load_model_file(
    path: Path, factory: str = "model", settings: dict[str, Any] | None = None
) -> ModelFile:
    """Run a model file under a private module name."""
    name = f"_p2bw_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return ModelFile(
        path=path, factory=factory, settings=MappingProxyType(settings or {}), module=module
    )
