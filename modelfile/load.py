"""The user's model file: plain PyTorch with a few module-level functions (README, "model file")."""

import difflib
import hashlib
import importlib.util
import inspect
import linecache
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from p2bw.contract.errors import ModelError, UsageError
from p2bw.modelfile.microbatch import apply, describe, flatten_microbatch, seeded
from p2bw.modelfile.usercode import UserCode

Setting = str | int | float | bool | None

__all__ = ["ModelFile", "Setting", "flatten_microbatch", "load_model_file", "parse_settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A loaded model file. Running a model file runs its author's code, like `python model.py`.

    Every failure inside the author's code is a ModelError that names the author's line.
    """

    path: Path
    factory: str
    settings: Mapping[str, Setting]
    autocast: str | None  # a dtype: forward and loss run under torch.autocast
    module: ModuleType
    code: UserCode
    source: bytes
    _ran: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    flatten_microbatch = staticmethod(flatten_microbatch)

    def model(self) -> nn.Module:
        """A new model, in training mode, from the user's factory and settings."""
        factory = getattr(self.module, self.factory)
        with self.code.running(f"{self.factory}()"):
            built = factory(**self.settings)
            self._ran.add(self.factory)
            if not isinstance(built, nn.Module):
                raise ModelError(
                    f"{self.path.name}: {self.factory}() returned {describe(built)}, "
                    f"not a torch.nn.Module; return the model itself"
                )
            return built.train()

    def inputs(self, batch_size: int) -> Any:
        """One microbatch of example inputs: a tensor, a tuple of tensors or a dict."""
        return self._example("inputs", batch_size)

    def targets(self, batch_size: int) -> Any:
        """Example targets, or None if the model itself returns the loss."""
        return self._example("targets", batch_size) if self.function("targets") else None

    def call(self, model: Callable[..., Any], inputs: Any, targets: Any) -> Tensor:
        """The training step of one microbatch, forward and loss: the one definition of it."""
        if self.autocast is None:
            return self._call(model, inputs, targets)
        device = next((t.device.type for t in flatten_microbatch(inputs, targets)), "cpu")
        with torch.autocast(device, dtype=getattr(torch, self.autocast)):
            return self._call(model, inputs, targets)

    def _call(self, model: Callable[..., Any], inputs: Any, targets: Any) -> Tensor:
        loss = apply(model, inputs)
        if function := self.function("loss"):
            loss = apply(function, () if targets is None else targets, loss)
        elif not isinstance(loss, Tensor):
            loss = loss.get("loss") if isinstance(loss, Mapping) else getattr(loss, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        raise ModelError(
            f"{self.path.name}: loss() returned {describe(loss)}, not a scalar tensor"
            if function
            else f"{self.path.name}: the model returned no loss, and the file has no loss(); "
            f"write loss(outputs, *targets) and targets(batch_size), or give the model its labels "
            f"in inputs() so that it returns a loss"
        )

    def optimizer(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """The user's optimizer for some of the model's parameters; AdamW by default.

        A function whose first argument is `named_parameters` is given (name, parameter) pairs, any
        other the parameters alone.
        """
        pairs = list(named)
        parameters = [parameter for _, parameter in pairs]
        function = self.function("optimizer")
        if function is None:
            return torch.optim.AdamW(parameters)
        with self.code.running("optimizer()"):
            made = function(pairs if self.optimizer_takes_names() else parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ModelError(
                f"{self.path.name}: optimizer() returned {describe(made)}, "
                f"not a torch.optim.Optimizer"
            )
        if _required(type(made).step)[1:]:  # after self
            raise ModelError(
                f"{self.path.name}: optimizer() returned {describe(made)}, whose step() computes "
                f"the loss again through a closure; a pipeline gives it one gradient per update, "
                f"so use an optimizer that steps without one, such as AdamW or SGD"
            )
        return made

    def optimizer_takes_names(self) -> bool:
        """Whether the user's optimizer() asks for (name, parameter) pairs."""
        function = self.function("optimizer")
        try:
            arguments = list(inspect.signature(function).parameters) if function else []
        except (TypeError, ValueError):
            return False  # a callable without a signature
        return arguments[:1] in (["named_parameters"], ["named_params"])

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The user's learning-rate schedule, or None."""
        function = self.function("scheduler")
        if function is None:
            return None
        with self.code.running("scheduler()"):
            made = function(optimizer)
        if made is None or callable(getattr(made, "step", None)):
            return made
        raise ModelError(
            f"{self.path.name}: scheduler() returned {describe(made)}; return a schedule of "
            f"torch.optim.lr_scheduler, or None"
        )

    def _synthetic(self, batch_size: int, seed: str) -> tuple[Any, Any]:
        with seeded(seed):
            return self.inputs(batch_size), self.targets(batch_size)

    def data(self, batch_size: int, seed: int) -> Iterator[tuple[Any, Any]]:
        """Microbatches (inputs, targets): the user's, else endless synthetic ones.

        Synthetic microbatch i depends on the seed and i alone, so every process sees the same.
        A user's iterator may end; it yields bare inputs when the file has no targets().
        """
        self._run_factory()
        function = self.function("data")
        if function is None:
            for index in count():
                yield self._synthetic(batch_size, f"{seed}:{index}")  # and keep none of it
        with self.code.running("data()"):
            microbatches = iter(function(batch_size, seed))  # type: ignore[misc]
        with_targets = self.function("targets") is not None
        for index in count():
            with self.code.running("data()"):
                given = next(microbatches, None)
            if given is None:
                return
            if not with_targets:
                yield given, None
            elif isinstance(given, Sequence) and len(given) == 2:
                yield given[0], given[1]
            else:
                raise ModelError(
                    f"{self.path.name}: data() yielded {describe(given)} as microbatch "
                    f"{index}; yield (inputs, targets)"
                )

    def function(self, name: str) -> Callable[..., Any] | None:
        """An optional function of the file: loss, targets, optimizer, scheduler, data."""
        function = getattr(self.module, name, None)
        # `import data` names a neighbour, no function of this file.
        return None if isinstance(function, ModuleType) else function

    def sha256(self) -> str:
        """Of the file's bytes as they were run."""
        return hashlib.sha256(self.source).hexdigest()

    def _run_factory(self) -> None:
        """A factory may leave sizes in globals that inputs() reads: it always runs before them."""
        if self.factory not in self._ran:
            with seeded("factory"):
                try:
                    with torch.device("meta"):
                        self.model()
                except ModelError:  # it needs values: the real thing, or its own error
                    self.model()

    def _example(self, name: str, batch_size: int) -> Any:
        self._run_factory()
        with self.code.running(f"{name}({batch_size})"):
            example = getattr(self.module, name)(batch_size)
        try:
            flatten_microbatch(example, None)
        except ModelError as error:
            raise ModelError(f"{self.path.name}: {name}({batch_size}): {error}") from None
        return example


def parse_settings(items: Iterable[str]) -> dict[str, Setting]:
    """Settings from NAME=VALUE: an int, a float, true, false, none, or else a string."""
    settings: dict[str, Setting] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UsageError(f"--set {item}: write NAME=VALUE, such as --set n_layer=24")
        settings[name] = _setting(item, text.strip())
    return settings


def _setting(item: str, text: str) -> Setting:
    words: dict[str, Setting] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1:
        return text[1:-1]
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        if not math.isfinite(value):
            raise UsageError(f"--set {item}: the number must be finite")
        return value
    return text


def load_model_file(
    path: Path,
    factory: str = "model",
    settings: Mapping[str, Setting] | None = None,
    autocast: str | None = None,
) -> ModelFile:
    """Run a model file under a private module name and check what it defines.

    Its directory is importable from then on, after all else, so that neighbours can be imported
    but a stray `torch.py` among them shadows nothing.
    """
    path = Path(path)
    resolved = path.resolve()
    source = _read(path)
    code = UserCode(str(resolved.parent), path.name)
    module = _run(path, resolved, source, code)
    file = ModelFile(
        path=path,
        factory=factory,
        settings=MappingProxyType(dict(settings or {})),
        autocast=autocast,
        module=module,
        code=code,
        source=source,
    )
    _check_factory(file)
    _check_functions(file)
    return file


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the model file in it")
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _python_files(path.parent), 1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UsageError(f"no such file: {path}{hint}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not source.strip():
        raise ModelError(f"{path.name} is empty; it needs model() and inputs(batch_size)")
    return source


def _python_files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.py")) if directory.is_dir() else []


def _run(path: Path, resolved: Path, source: bytes, code: UserCode) -> ModuleType:
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]
    name = f"_p2bw_model_{digest}_{resolved.stem}"
    linecache.checkcache(str(resolved))
    try:
        program = compile(source, str(resolved), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ModelError(_syntax(path, error)) from error
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None:  # not named .py
        spec = importlib.util.spec_from_loader(name, loader=None, origin=str(resolved))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(resolved)
    if code.directory not in sys.path:
        sys.path.append(code.directory)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        with code.running(f"importing {path.name}"):
            exec(program, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _syntax(path: Path, error: SyntaxError | ValueError) -> str:
    if not isinstance(error, SyntaxError):
        return f"{path.name} is not Python source: {error}"
    place = f"{path.name}:{error.lineno}" if error.lineno else path.name
    if "codec can't decode" in str(error.msg) or "encoding" in str(error.msg):
        return f"{path.name} is not UTF-8 text: {error.msg}; save it as UTF-8"
    text = f"\n    {error.text.strip()}" if error.text else ""
    return f"{place}: {type(error).__name__}: {error.msg}{text}"


def _check_factory(file: ModelFile) -> None:
    name, own = file.path.name, _functions(file.module)
    factory = getattr(file.module, file.factory, None)
    if factory is None:
        near = difflib.get_close_matches(file.factory, own, 1) or own[:1]
        cure = f"; it has {', '.join(own)}: name one as {name}:{near[0]}" if own else ""
        raise ModelError(f"{name} has no {file.factory}(){cure or '; define it'}")
    if not callable(factory):
        raise ModelError(f"{name}: {file.factory} is {describe(factory)}, not a function")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return  # a callable without a signature: calling it will tell
    try:
        signature.bind(**file.settings)
    except TypeError as error:
        raise ModelError(_settings_problem(file, signature, error)) from None


def _settings_problem(file: ModelFile, signature: inspect.Signature, error: TypeError) -> str:
    where = f"{file.path.name}: {file.factory}{signature}"
    for unknown in (s for s in file.settings if s not in signature.parameters):
        near = difflib.get_close_matches(unknown, signature.parameters, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{where} has no setting {unknown!r}{hint}"
    return f"{where}: {error}; give it a default or use --set NAME=VALUE"


def _check_functions(file: ModelFile) -> None:
    name = file.path.name
    for function in ("inputs", "targets", "loss", "optimizer", "scheduler", "data"):
        value = file.function(function)
        if value is not None and not callable(value):
            raise ModelError(f"{name}: {function} is {describe(value)}, not a function")
    if file.function("inputs") is None:
        raise ModelError(
            f"{name} has no inputs(batch_size); define it to return one microbatch of example "
            f"inputs, a tuple or dict of tensors"
        )
    loss, targets = file.function("loss"), file.function("targets")
    if targets and not loss:
        raise ModelError(f"{name} has targets() but no loss(outputs, *targets) that takes them")
    if loss and not targets and (len(_required(loss)) > 1 or isinstance(loss, nn.Module)):
        raise ModelError(
            f"{name} has loss{inspect.signature(loss)} but no targets(batch_size); "
            f"define it to return example targets"
        )


def _required(function: Callable[..., Any]) -> list[str]:
    """The positional arguments without a default."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _functions(module: ModuleType) -> list[str]:
    """Public functions and classes that the file itself defines, in order."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and inspect.isroutine(value)
        and getattr(value, "__module__", None) == module.__name__
        and name not in ("inputs", "targets", "loss", "optimizer", "scheduler", "data")
    ]
