"""Modules that cannot be traced, kept as one opaque call each of the user's own module.

Tracing goes on around them: in the traced step the forward of such a module is a call of the
operator p2bw::opaque, with the call's tensors and the module's parameters and buffers as its
arguments. What comes out of it is known from a real run of the module by itself.
"""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from p2bw.compiler.opaque_run import (
    Argument,
    Observed,
    UnfitError,
    filled,
    is_writable,
    observe,
    state_of,
    with_slots,
)
from p2bw.compiler.program import OpaqueCall, TensorType
from p2bw.compiler.trace_errors import UntraceableError, chain
from p2bw.contract.errors import ModelError
from p2bw.modelfile.load import ModelFile
from p2bw.modelfile.own import OwnModules

_library = torch.library.Library("p2bw", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "opaque(str call, Tensor[] inputs, Tensor[] state) -> Tensor[]"
)
OPAQUE = torch.ops.p2bw.opaque.default

_outputs: dict[str, Observed] = {}  # of the calls in the trace that is being made


@torch.library.register_fake("p2bw::opaque", lib=_library)  # type: ignore[untyped-decorator]
def _fake(call: str, inputs: list[Tensor], state: list[Tensor]) -> list[Tensor]:
    saw = _outputs[call]
    return [
        torch.empty_strided(kind.shape, stride, dtype=kind.dtype)
        for kind, stride in zip(saw.outputs, saw.strides, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that tracing has come to."""

    path: str
    arguments: Any  # with a Slot for each tensor
    tensors: tuple[Argument, ...]
    grad: bool
    autocast: torch.dtype | None

    def regions(self) -> ExitStack:
        """What surrounds the call."""
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(self.grad))
        if self.autocast is not None:
            stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
        return stack


class _UnknownCallError(ModelError):
    """Tracing has come to a call of an opaque module that has not been run yet."""

    def __init__(self, call: _Call) -> None:
        super().__init__(f"{call.path} has not been run")
        self.call = call


@dataclass(slots=True)
class Opaques:
    """The modules of one model that tracing goes around, found as it fails in them."""

    file: ModelFile
    model: nn.Module  # without memory, as it is traced
    own: OwnModules
    causes: dict[str, ModelError] = field(default_factory=dict)  # path -> why it is not traced
    likeness: dict[str, Hashable] = field(default_factory=dict)  # path -> see _likeness
    known: dict[Hashable, Observed] = field(default_factory=dict)
    calls: dict[str, OpaqueCall] = field(default_factory=dict)  # of the last trace

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """The modules' forwards are opaque calls; trace the step in here."""
        self.calls.clear()
        _outputs.clear()
        with ExitStack() as stack:
            for path in self.causes:
                module = self.model.get_submodule(path)
                forward = partial(self._forward, path, module)
                stack.enter_context(mock.patch.object(module, "forward", forward))
            yield

    def _forward(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            arguments, tensors = with_slots((args, kwargs), "is called with")
            if not is_writable(arguments):
                raise UnfitError("is called with objects that code cannot spell out")
        except UnfitError as error:
            raise self._refused(path, error) from error
        given = tuple(
            Argument(TensorType(tuple(t.shape), t.dtype), t.stride(), t.requires_grad)
            for t in tensors
        )
        casts = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        call = _Call(path, arguments, given, torch.is_grad_enabled(), casts)
        saw = self.known.get(self._key(call))
        if saw is None:
            raise _UnknownCallError(call)
        name = f"{path}:{len(self.calls)}"
        _outputs[name] = saw
        self.calls[name] = OpaqueCall(
            path=path,
            type_name=self._type_name(module),
            reason=_reason(self.causes[path]),
            arguments=arguments,
            **{f.name: getattr(saw, f.name) for f in fields(Observed)},
        )
        return filled(saw.result, torch.ops.p2bw.opaque(name, tensors, state_of(module)))

    def _type_name(self, module: nn.Module) -> str:
        kind = type(module)
        private = kind.__module__ == self.file.module.__name__
        return f"{self.file.path.stem if private else kind.__module__}.{kind.__qualname__}"

    def learn(self, error: ModelError) -> bool:
        """Whether there is a way around what stopped the trace: then it is worth another one."""
        if isinstance(error, _UnknownCallError):
            return self._run(error.call)
        path = blamed(error, self.model)
        return path is not None and self._hide(path, error)

    def _hide(self, path: str, cause: ModelError) -> bool:
        """Hide the modules of one class; what is hidden already, and fails, in the one around."""
        while path in self.causes:
            path = _around(path, self.model)
        if not path:
            return False
        kind = type(self.model.get_submodule(path))
        for name, module in self.model.named_modules():
            if type(module) is kind and name:
                self.causes.setdefault(name, cause)
                self.likeness[name] = _likeness(module)
        return True

    def _run(self, call: _Call) -> bool:
        cause = self.causes[call.path]
        initial = partial(self.own.initial, call.path)
        try:
            with self.file.code.running(f"running {call.path} by itself"):
                saw = observe(initial, call.arguments, call.tensors, call.regions)
        except ModelError as error:
            reason = error.__cause__
            if isinstance(reason, UnfitError):
                if self._hide(call.path, cause):
                    return True
                raise self._refused(call.path, reason) from error
            if str(cause).partition(": ")[0] == str(error).partition(": ")[0]:
                raise cause from error  # the user's own mistake, there as here
            raise ModelError(f"{cause}\n{error}") from error
        assert self._key(call) not in self.known, "tracing would go on for ever"
        self.known[self._key(call)] = saw
        return True

    def _refused(self, path: str, error: UnfitError) -> ModelError:
        return ModelError(
            f"{self.causes[path]}\nnor can {path} stay one call of your own code: it {error}"
        )

    def _key(self, call: _Call) -> Hashable:
        """What calls that give and cost the same have in common."""
        leaves, spec = tree_flatten(call.arguments)
        plain = tuple(map(repr, leaves))
        like = self.likeness[call.path]
        return (like, plain, str(spec), call.tensors, call.grad, call.autocast)


def _likeness(module: nn.Module) -> Hashable:
    """Modules of which this is equal are built alike: 96 equal layers are run once."""
    parts = []
    for name, part in module.named_modules():
        own = {k: v for k, v in vars(part).items() if k not in ("_parameters", "_buffers")}
        plain = tuple(
            (k, repr(v) if isinstance(v, (bool, int, float, str, tuple, list)) else id(v))
            for k, v in own.items()
            if not k.startswith("_") and k != "forward"
        )
        parts.append((name, type(part), plain))
    tensors = (*module.named_parameters(), *module.named_buffers())
    types = tuple((n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors)
    return (tuple(parts), types)


def blamed(error: ModelError, model: nn.Module) -> str | None:
    """Path of the innermost module that could not be traced, "" for the model itself."""
    # Tracing calls a module with several names through proxies, which share its attributes.
    paths = {id(vars(module)): path for path, module in model.named_modules()}
    for link in chain(error):
        if isinstance(link, UntraceableError):
            return link.path
        running: list[str] = []
        traceback = link.__traceback__
        while traceback is not None:
            frame, code = traceback.tb_frame, traceback.tb_frame.f_code
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(first, nn.Module) and id(vars(first)) in paths:
                running.append(paths[id(vars(first))])
            traceback = traceback.tb_next
        if running:
            return running[-1]
    return None


def _around(path: str, model: nn.Module) -> str:
    """The path of the user's module around another, "" for the model itself."""
    while path:
        path = path.rpartition(".")[0]
        if not type(model.get_submodule(path)).__module__.startswith("torch."):
            break
    return path


def _reason(cause: ModelError) -> str:
    """The place and the reason, without the cure."""
    return str(cause).partition("\n")[0].partition(";")[0].partition(", which a compiled")[0]
