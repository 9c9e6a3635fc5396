"""Build a user's model without its weights: every parameter and buffer a fake tensor.

Small tensors are computed for real while the model is built, so that code such as
`torch.linspace(0, rate, depth).tolist()` works and tables kept as plain attributes keep their
values; what a model registers as a parameter loses its memory at once.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.contract.errors import ModelError
from p2bw.modelfile.conversion import converting_fakes
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.record import Recording, written
from p2bw.modelfile.truncated import truncated_normal_as_one_operator

REAL_BYTES = 4 << 30  # a model that needs its values is built for real up to this size

# In elements, for one tensor to be real. Random values are slow to draw, and an empty tensor has
# none to lose.
_TABLE = 1 << 22
_RANDOM = 1 << 12
_EMPTY = 1 << 16


class _NeedsValuesError(Exception):
    """The model's constructor writes unknown values into a tensor whose values are known."""


class _TooLargeError(Exception):
    """A model that is built for real has passed REAL_BYTES."""


def build(file: ModelFile, mode: FakeTensorMode) -> nn.Module:
    """The user's model with fake parameters and buffers on the CPU, without allocating them.

    A constructor that needs the values of large tensors is run for real if the model is small.
    """
    try:
        model = _build(file, mode)
    except ModelError as problem:
        return build_real(file, mode, problem)
    return _fakeify(model, mode)


def build_recorded(file: ModelFile, seed: int) -> tuple[nn.Module, Recording]:
    """The user's model with its large tensors fake, and how to compute the values of each."""
    recording = Recording(seed)
    model = _build(file, FakeTensorMode(allow_non_fake_inputs=True), recording)
    named = model.named_parameters(remove_duplicate=False)
    recording.name((*named, *model.named_buffers(remove_duplicate=False)))
    return model, recording


def _build(file: ModelFile, mode: FakeTensorMode, recording: Recording | None = None) -> nn.Module:
    # A copied tensor takes along what it refers to; a second mode would own the first one's memory.
    mode.__deepcopy__ = lambda memo: mode  # type: ignore[attr-defined]
    with (
        warnings.catch_warnings(),
        converting_fakes() as settle,
        truncated_normal_as_one_operator(),
        _registering_fakes(mode, recording),
        _SmallTensorsReal(mode),
        recording or nullcontext(),
    ):
        # copy.deepcopy asks for it, to find out that there is none.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        model = file.model()
    settle(model)
    return model


def build_real(file: ModelFile, mode: FakeTensorMode, problem: ModelError) -> nn.Module:
    """The same from a real construction, so that all its constants have their values."""
    try:
        with _limited():
            model = file.model()
    except ModelError as error:
        if isinstance(error.__cause__, _TooLargeError):
            raise ModelError(
                f"{problem}\nmodels are built without weights, and this one needs the values of "
                f"large tensors; building it for real would take more than "
                f"{REAL_BYTES >> 30} GiB. Compute such values from Python numbers, and keep "
                f"large tables as buffers: self.register_buffer(name, table)"
            ) from problem
        raise
    return _fakeify(model, mode)


class _SmallTensorsReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs small operators on known values for real, and everything else on fake tensors."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = [t for t in _tensors((args, kwargs)) if not isinstance(t, FakeTensor)]
        if any(isinstance(t, FakeTensor) for t in _tensors((args, kwargs))):
            if func._schema.is_mutable and _writes_known(func, args, kwargs):
                raise _NeedsValuesError(f"{func} writes the result of a large computation")
            with self.fake:
                return func(*args, **kwargs)
        if func._schema.is_mutable or any(t.is_meta for t in known):
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            return func(*args, **kwargs)
        with self.fake:
            outputs = func(*args, **kwargs)
        limit = max(_limit(func), 2 * sum(t.numel() for t in known))
        for output in _tensors(outputs):
            if output.device.type == "meta":
                return func(*args, **kwargs)
            if output.device.type != "cpu" or output.numel() > limit:
                return outputs
        return func(*args, **kwargs)


def _limit(func: Any) -> int:
    if torch.Tag.nondeterministic_seeded in func.tags:
        return _RANDOM
    return _EMPTY if func.name().startswith("aten::empty") else _TABLE


def _writes_known(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    changed = _tensors(list(written(func, args, kwargs)))
    return any(not isinstance(tensor, FakeTensor) for tensor in changed)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


@contextmanager
def _registering_fakes(mode: FakeTensorMode, recording: Recording | None) -> Iterator[None]:
    """Free the memory of parameters and large buffers as soon as a module registers them."""

    def parameter(module: nn.Module, name: str, value: Tensor) -> Any:
        made = _fake(value, mode)
        if recording is not None and made is not value:
            recording.replaced(value, by=made)
        return made

    def buffer(module: nn.Module, name: str, value: Tensor) -> Any:
        return parameter(module, name, value) if value.numel() > _EMPTY else value

    with _hooks(parameter, buffer):
        yield


@contextmanager
def _limited() -> Iterator[None]:
    """Refuse a construction that registers more than REAL_BYTES."""
    total = 0

    def count(module: nn.Module, name: str, value: Tensor) -> None:
        nonlocal total
        total += value.nbytes
        if total > REAL_BYTES:
            raise _TooLargeError

    with _hooks(count, count):
        yield


@contextmanager
def _hooks(parameter: Callable[..., Any], buffer: Callable[..., Any]) -> Iterator[None]:
    def unless_none(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, name, value: None if value is None else hook(module, name, value)

    handles = (
        register_module_parameter_registration_hook(unless_none(parameter)),
        register_module_buffer_registration_hook(unless_none(buffer)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fake(tensor: Any, mode: FakeTensorMode) -> Any:
    """A tensor without memory; one that is on no device yet (meta) waits for `_fakeify`."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or type(tensor) not in _KINDS:
        return tensor
    return mode.from_tensor(tensor)


_KINDS = (Tensor, nn.Parameter, nn.Buffer)


def _fakeify(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Make every parameter and buffer a fake CPU tensor; ties stay ties."""
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the originals live on: no id is used twice

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = (tensor, _on_cpu(tensor, mode))
        return done[id(tensor)][1]

    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    slots[name] = fake(tensor)  # type: ignore[assignment]
    return model


def _on_cpu(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
        return tensor
    if type(tensor) not in (*_KINDS, FakeTensor) and not isinstance(tensor, FakeTensor):
        raise ModelError(
            f"the model holds a {type(tensor).__module__}.{type(tensor).__name__}; "
            f"only plain tensors can be compiled"
        )
    with mode:
        made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made
