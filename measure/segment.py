"""A run of blocks, for real: seconds of each block's forward and backward, where they stand.

Operators that run alone are seen too fast (their data lies in caches) or too slow (nothing runs
beside them), so they are never timed alone: marks are set between the blocks of a whole run.
Backwards run in the exact reverse order of the forwards, so one mark per block tells them apart.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from p2bw.compiler.interpret import call_opaque
from p2bw.compiler.program import Block, OpaqueCall, Program, tensor_arguments
from p2bw.measure.device import clock
from p2bw.passes.execute import flatten_tensors


class Stopwatch:
    """Points in time: of this process, or on a GPU of its stream, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.clock = clock(device)

    def now(self) -> Any:
        if not self.on_gpu:
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True, slots=True)
class Spans:
    """Seconds of one forward and backward, by position of the block."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]


class Segment:
    """Consecutive blocks of a program as one function of what they are given."""

    def __init__(
        self,
        program: Program,
        blocks: Sequence[Block],
        owner: nn.Module | None,
        device: torch.device,
    ) -> None:
        """`owner` is the user's model, which the calls of its opaque modules are made on."""
        self.program = program
        self.device = device
        self.blocks = tuple(blocks)
        self.owner = owner
        self.watch = Stopwatch(device)
        inside = {name for block in blocks for name in block.nodes}
        nodes = [program.node(name) for block in blocks for name in block.nodes]
        self.given = tuple(
            dict.fromkeys(a for n in nodes for a in tensor_arguments(n) if a.name not in inside)
        )
        self.results = tuple(
            node
            for node in nodes
            if any(user.name not in inside for user in node.users)
            and any(program.fact(node, "requires_grad"))
        )
        self.marks: list[tuple[Any, Any]] = []  # by block: when its forward ended, and went on
        self.backwards: list[tuple[int, Any]] = []
        self.regions = ExitStack()
        self.module = fx.GraphModule(nn.Module(), self._graph(nodes))

    def run(self, tensors: Mapping[fx.Node, Tensor]) -> Spans:
        """One forward and backward on what `given` stands for; gradients add up in the leaves."""
        self.marks, self.backwards = [], []
        arguments = [tensors[node] for node in self.given]
        start = self.watch.now()
        try:
            results = self.module(*arguments)
        finally:
            self.regions.close()
        ends = [tensor for tensor in results if tensor.requires_grad]
        gradients = [torch.ones_like(end) for end in ends]
        back = self.watch.now()
        if ends:
            torch.autograd.backward(ends, gradients)
        end = self.watch.now()
        return Spans(self._forward(start), self._backward(back, end))

    def _graph(self, nodes: Sequence[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        new = {node: graph.placeholder(node.name) for node in self.given}
        context: tuple[str, ...] = ()
        position = 0
        for index, block in enumerate(self.blocks):
            for name in block.nodes:
                node = nodes[position]
                position += 1
                if self.program.facts[name].context != context:
                    context = self.program.facts[name].context
                    graph.call_function(self._enter(node))
                new[node] = self._copy(graph, node, new)
            reached = self._last_with_gradient(block)
            graph.call_function(self._mark(index), (new[reached],) if reached else ())
        if context:
            graph.call_function(self._leave())
        graph.output(tuple(new[node] for node in self.results))
        return graph

    def _copy(self, graph: fx.Graph, node: fx.Node, new: Mapping[fx.Node, fx.Node]) -> fx.Node:
        if opaque := self.program.opaque.get(node.name):
            inputs = fx.node.map_arg(node.args[1], new.__getitem__)
            return graph.call_function(self._opaque(opaque), (inputs,))

        def convert(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return new[value]
            return self.device if isinstance(value, torch.device) else value

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), convert)
        assert callable(node.target)
        return graph.call_function(node.target, args, kwargs)

    def _last_with_gradient(self, block: Block) -> fx.Node | None:
        """The node of a block whose backward comes first; None if it has none."""
        for name in reversed(block.nodes):
            if self.program.fact(name, "traffic_backward"):
                return self.program.node(name)
        return None

    def _mark(self, index: int) -> Callable[..., None]:
        def backward(gradients: Any) -> None:
            self.backwards.append((index, self.watch.now()))

        def mark(result: Any = None) -> None:
            ended = self.watch.now()
            maker = next((t.grad_fn for t in flatten_tensors(result) if t.grad_fn), None)
            if maker is not None:
                maker.register_prehook(backward)
            self.marks.append((ended, self.watch.now() if maker else ended))

        return mark

    def _enter(self, node: fx.Node) -> Callable[[], None]:
        def enter() -> None:
            self.regions.close()
            self.regions.enter_context(self.program.entering(node, self.device.type))

        return enter

    def _leave(self) -> Callable[[], None]:
        def leave() -> None:
            self.regions.close()

        return leave

    def _opaque(self, opaque: OpaqueCall) -> Callable[[list[Tensor]], list[Tensor]]:
        def call(inputs: list[Tensor]) -> list[Tensor]:
            assert self.owner is not None
            return call_opaque(self.owner, opaque, inputs)

        return call

    def _forward(self, start: Any) -> tuple[float, ...]:
        spans = []
        for ended, went_on in self.marks:
            spans.append(self.watch.seconds(start, ended))
            start = went_on
        return tuple(spans)

    def _backward(self, start: Any, end: Any) -> tuple[float, ...]:
        """Until the next block's mark; what comes before the first is its block's too."""
        spans = [0.0] * len(self.blocks)
        times = [start, *(mark for _, mark in self.backwards[1:]), end]
        for (index, _), a, b in zip(self.backwards, times, times[1:], strict=False):
            spans[index] += self.watch.seconds(a, b)
        return tuple(spans)
