"""The oracle for emitted code: cut a program anywhere, run its stages as a pipeline would."""

import itertools
import random
import types
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from p2bw.compiler.emit import emit_stage
from p2bw.compiler.interpret import interpret
from p2bw.compiler.program import Program
from p2bw.compiler.seeded import SeededRandom
from p2bw.compiler.split import StageGraph, split
from p2bw.compiler.trace import trace
from p2bw.contract.stages import lending
from p2bw.modelfile.initial import copy_state
from p2bw.modelfile.load import ModelFile, load_model_file
from p2bw.passes.annotate_autograd import annotate_autograd
from p2bw.passes.group_blocks import group_blocks


def program_of(path: Path, factory: str = "tiny", batch: int = 2) -> tuple[ModelFile, Program]:
    """A traced program in blocks as small as they can be, so that it can be cut anywhere."""
    file = load_model_file(path, factory=factory)
    program = annotate_autograd(trace(file, batch))
    second = {node.name: 1.0 for node in program.compute_nodes}
    program = program.learn("annotate_time", forward_s=second, backward_s=second)
    return file, group_blocks(program)


def cut(
    program: Program, depth: int, seed: int | None = None, *, relayed: bool = False
) -> tuple[StageGraph, ...]:
    """Stages of equally many blocks; with a seed, each block a little off, edges still forward.

    Tensors that skip stages are sent straight to their readers, or all of them are relayed.
    """
    assert program.blocks is not None
    rng = random.Random(seed)
    block_of = {node: block.name for block in program.blocks for node in block.nodes}
    stage: dict[str, int] = {}
    for position, block in enumerate(program.blocks):
        wish = position * depth // len(program.blocks)
        if seed is not None:
            wish += rng.choice((-1, 0, 0, 1))
        sources = (a.name for n in block.nodes for a in program.node(n).all_input_nodes)
        first = max((stage.get(block_of.get(s, ""), 0) for s in sources), default=0)
        stage[block.name] = min(depth - 1, max(first, wish, 0))
    used = sorted(set(stage.values()))
    tensors = [node.name for node in program.compute_nodes] if relayed else []
    return split(program, {name: used.index(k) for name, k in stage.items()}, tensors)


def load(text: str, file: ModelFile | None = None) -> nn.Module:
    """A stage from its text; `file` is for opaque modules."""
    module = types.ModuleType("stage")
    module.__file__ = "stage.py"
    exec(text, module.__dict__)
    with lending(file):
        stage = module.Stage()
    assert isinstance(stage, nn.Module)
    return stage


def run(
    program: Program, stages: Sequence[StageGraph], modules: Sequence[nn.Module], feed: list[Tensor]
) -> Tensor:
    """Forward through all stages and backward through them in reverse; the loss."""
    counter = itertools.count()
    calls = {
        node.name: [next(counter) for _ in range(program.fact(node, "random_calls"))]
        for node in program.compute_nodes
    }
    values = dict(zip(program.inputs, feed, strict=True))
    arrived: dict[tuple[int, str], Tensor] = {}
    produced = []
    for graph, module in zip(stages, modules, strict=True):
        arguments = [values.get(a, arrived.get((graph.index, a))) for a in graph.arguments]
        with SeededRandom(i for node in graph.nodes for i in calls[node]):
            results = module(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        produced.append(dict(zip(graph.results, results, strict=True)))
        for send in graph.sends:
            tensor = produced[-1][send.tensor].detach().clone()
            arrived[send.consumer, send.tensor] = tensor.requires_grad_(send.gradient)
    for graph, named in reversed(list(zip(stages, produced, strict=True))):
        gradients: dict[str, Tensor] = {}
        for send in sorted(graph.sends, key=lambda send: -send.consumer):
            gradient = arrived[send.consumer, send.tensor].grad
            if gradient is not None:
                before = gradients.get(send.tensor)
                gradients[send.tensor] = gradient if before is None else before + gradient
        roots = [named[tensor] for tensor in gradients]
        seeds: list[Tensor | None] = list(gradients.values())
        if program.loss.name in named:
            roots, seeds = [named[program.loss.name], *roots], [None, *seeds]
        if roots:
            torch.autograd.backward(roots, seeds)
    return next(named[program.loss.name] for named in produced if program.loss.name in named)


def texts_of(program: Program, stages: Sequence[StageGraph]) -> list[str]:
    return [emit_stage(program, stage, len(stages)) for stage in stages]


def compare(file: ModelFile, program: Program, stages: Sequence[StageGraph]) -> list[str]:
    """Run the model and its stages; the texts, once loss, gradients and buffers are equal."""
    torch.manual_seed(0)
    model = file.model()
    feed = list(file.flatten_microbatch(file.inputs(program.batch_size), _targets(file, program)))
    texts = texts_of(program, stages)
    modules = [load(text, file) for text in texts]
    for module in modules:
        copy_state(model, module)
    with SeededRandom(itertools.count()):
        loss = interpret(program, model, feed)
    loss.backward()
    assert torch.equal(run(program, stages, modules, feed), loss)
    # A sum of three gradients or more depends on their order, which a cut may change.
    sent = {program.node(s.tensor) for graph in stages for s in graph.sends if s.gradient}
    shared = any(len(node.users) > 2 for node in sent)
    for attribute in program.parameters.values():
        _check_gradient(model, modules, attribute.names, exact=not shared)
    for module in modules:
        for name, buffer in module.named_buffers():
            if name in dict(model.named_buffers()):
                assert torch.equal(buffer, model.get_buffer(name)), name
    return texts


def _targets(file: ModelFile, program: Program) -> object:
    return file.targets(program.batch_size)


def _check_gradient(
    model: nn.Module, modules: Sequence[nn.Module], names: tuple[str, ...], exact: bool
) -> None:
    """Bitwise, but for sums of three terms or more, whose order a cut may change."""
    want = model.get_parameter(names[0]).grad
    found = []
    for module in modules:
        held = {id(p): p for n, p in module.named_parameters() if n in names}
        found += [p.grad for p in held.values() if p.grad is not None]
    if want is None or not found:
        assert want is None or not want.any(), names
        assert not found
        return
    total = found[-1]
    for gradient in reversed(found[:-1]):
        total = total + gradient
    if len(found) == 1 and exact:
        assert torch.equal(total, want), names
    else:
        assert (total - want).abs().max() <= 1e-6 * want.abs().max(), names
