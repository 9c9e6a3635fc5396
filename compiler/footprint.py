"""What a stage holds while it trains: its code and the runtime's own, run on fake tensors."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from p2bw.compiler.live import Live, Size, rounded
from p2bw.compiler.optimizer_state import OnesForNumbers
from p2bw.compiler.plan import TiedSpec
from p2bw.compiler.program import Program, tensor_arguments
from p2bw.compiler.split import StageGraph, Transfer
from p2bw.compiler.stand_in import StandIns
from p2bw.contract import plan as contract
from p2bw.contract.schedule import Pipeline
from p2bw.contract.stages import load_stage
from p2bw.modelfile.load import ModelFile
from p2bw.passes.kernels import Workspaces, cpu_scratch, gpu_scratch, kernels_of
from p2bw.runtime.compute import Compute
from p2bw.runtime.weights import Updater, Weights

BLOCK = 512  # bytes that CUDA's caching allocator rounds every tensor up to


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Sizes of what a stage holds, at rest and in each kind of action.

    `forward` to `merge` are the most that such an action holds over what lived before it.
    """

    rest: Size  # all versions of the weights, masters, optimizer state, the module's buffers
    gradients: Size  # one set, without those of `tied`
    tied: Mapping[str, Size]  # gradients of the parameters that other stages hold too
    messages: Mapping[str, Size]  # tensors that come from other stages, and go to them
    small: Size  # gradients that replicas sum up in one message, copied into it
    stash: Size  # of one microbatch between its forward and its backward
    results: Size  # of one forward, besides its stash, until they are sent
    passed: Size  # gradients of one backward, until they are sent
    forward: Size
    first_backward: Size  # one that finds no gradients to add to
    backward: Size
    update: Size
    merge: Size


def footprint(
    program: Program,
    graph: StageGraph,
    artifact: Path,
    file: ModelFile,
    *,
    pipe: Pipeline,
    recompute: bool,
    tied: Sequence[TiedSpec],
    on_gpu: bool,
) -> Footprint:
    """Let the runtime train a stage of the artifact for a microbatch or two, and an update.

    Nothing is computed: fake tensors have sizes only, and what they would take up is counted.
    On a GPU every tensor takes whole blocks of the caching allocator.
    """
    with ExitStack() as stack:
        for mode in (FakeTensorMode(), kernels_of(on_gpu)):
            stack.enter_context(mode)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        copies = pipe.copies(graph.index)
        stage = _Rehearsal(program, graph, artifact, file, recompute, copies, tied, on_gpu)
        return stage.run(pipe)


def message_sizes(graph: StageGraph, unit: int) -> dict[str, Size]:
    """Of the tensors that come from other stages and go to them; `unit` is the allocator's."""
    transfers = (*graph.receives, *graph.sends)
    return {t.tensor: rounded(t.type.bytes, unit) for t in transfers}


class _Rehearsal:
    """One stage on fake tensors, and how much of them lives."""

    def __init__(
        self,
        program: Program,
        graph: StageGraph,
        artifact: Path,
        file: ModelFile,
        recompute: bool,
        copies: int,
        tied: Sequence[TiedSpec],
        on_gpu: bool,
    ) -> None:
        self.program, self.graph, self.file = program, graph, file
        self.live = Live(*((BLOCK, gpu_scratch) if on_gpu else (1, cpu_scratch)))
        with self.live, Workspaces():  # type: ignore[no-untyped-call]
            module = load_stage(artifact, graph.index, StandIns(program, graph.nodes))
            self.weights = Weights(module, copies)
            self.tied = {
                t.names[0]: name
                for t in tied
                if graph.index in t.stages and len(t.stages) > 1
                for name in self.weights.names
                if name in t.names
            }
            shared = self.tied.values()
            own = [name for name in self.weights.names if name not in shared]
            self.own = Updater(self.weights, own, file.optimizer, file.scheduler)
            self.shared = Updater(self.weights, shared, file.optimizer, file.scheduler)
            if on_gpu:
                for updater in (self.own, self.shared):
                    _update_together(updater)
            stage = _stage(graph, recompute)
            cpu = torch.device("cpu")
            self.compute = Compute(stage, module, self.weights, 0, cpu, 1.0)
        self.compute.changing = _written(program, graph)  # it cannot look at values here

    def run(self, pipe: Pipeline) -> Footprint:
        live, first = self.live, None
        with live, Workspaces():  # type: ignore[no-untyped-call]
            if pipe.drains or pipe.microbatches == 1:
                first = self.microbatch()
            else:  # there, a backward that finds gradients to add to is what counts
                for leaf in self.weights.leaves(0).values():
                    leaf.grad = torch.empty_like(leaf)
            later = self.microbatch()
            taken = self.weights.take_gradients([0])
            sizes = {name: live.size(g.untyped_storage().nbytes()) for name, g in taken.items()}
            del taken
            update = self.update(self.own, sizes)
            merge = self.update(self.shared, sizes)
            rest = live.now
        own = [sizes[name] for name in sizes if name not in self.tied.values()]
        return Footprint(
            rest=rest,
            gradients=sum(own, start=Size()),
            tied={tensor: sizes[name] for tensor, name in self.tied.items()},
            messages=message_sizes(self.graph, live.unit),
            small=sum((size for size in own if size.bytes < 1 << 20), start=Size()),
            stash=later.stash,
            results=later.results,
            passed=later.passed,
            forward=later.forward,
            first_backward=(first or later).backward,
            backward=later.backward,
            update=update,
            merge=merge,
        )

    def microbatch(self) -> "_Microbatch":
        live, before, peaks = self.live, self.live.now, list[Size]()
        with live.peak(peaks):
            results = self.compute.forward(0, 0, dict(self._arguments()))
        both = live.now - before
        del results
        stash = live.now - before
        with live.peak(peaks):
            found = self.compute.backward(0, 0, dict(self._gradients()))
        passed = live.now
        del found
        return _Microbatch(stash, both - stash, passed - live.now, peaks[0], peaks[1])

    def _arguments(self) -> Iterator[tuple[str, Tensor]]:
        """The program's inputs, contiguous; received tensors as their sender lays them out."""
        for name in self.graph.arguments:
            (kind,) = self.program.facts[name].out
            (stride,) = self.program.fact(name, "strides")
            yield name, torch.empty_strided(kind.shape, stride, dtype=kind.dtype)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        for transfer in self.graph.sends:
            if transfer.gradient:
                kind = transfer.type
                yield transfer.tensor, torch.empty(kind.shape, dtype=kind.dtype)

    def update(self, updater: Updater, sizes: Mapping[str, Size]) -> Size:
        leaves = self.weights.leaves(0)
        given = {n: torch.empty_like(leaves[n]) for n in updater.parameters if n in sizes}
        before, peaks = self.live.now, list[Size]()
        with self.live.peak(peaks), OnesForNumbers():  # type: ignore[no-untyped-call]
            updater.update(0, given)
        state = self.live.now - before  # made in the first update, and there to stay
        return peaks[0] - state


@dataclass(frozen=True, slots=True)
class _Microbatch:
    """As in Footprint."""

    stash: Size
    results: Size
    passed: Size
    forward: Size
    backward: Size


def _update_together(updater: Updater) -> None:
    """What torch's optimizers choose by themselves on a GPU: one call for all parameters."""
    for group in updater.optimizer.param_groups if updater.optimizer else ():
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _stage(graph: StageGraph, recompute: bool) -> contract.Stage:
    return contract.Stage(
        index=graph.index,
        recompute=recompute,
        inputs=graph.inputs,
        arguments=graph.arguments,
        results=graph.results,
        receives=tuple(_transfer(t, t.producer) for t in graph.receives),
        sends=tuple(_transfer(t, t.consumer) for t in graph.sends),
        devices=(),
    )


def _transfer(transfer: Transfer, peer: int) -> contract.Transfer:
    return contract.Transfer(
        tensor=transfer.tensor,
        peer=peer,
        shape=transfer.type.shape,
        dtype=transfer.type.dtype,
        gradient=transfer.gradient,
    )


def _written(program: Program, graph: StageGraph) -> tuple[str, ...]:
    """The buffers that a forward of the stage writes to."""
    found: dict[str, None] = {}
    for name in graph.nodes:
        arguments = tensor_arguments(program.node(name))
        for index in program.fact(name, "mutates"):
            if arguments[index].op == "get_attr":
                found[str(arguments[index].target)] = None
    return tuple(found)
