"""From an annotated Program to a PlacementProblem: sums over blocks, in plain numbers."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from p2bw.compiler.devices import Device
from p2bw.compiler.plan import Schedule
from p2bw.compiler.problem import (
    BlockCost,
    ParameterCost,
    PlacementProblem,
    TensorCost,
    Times,
)
from p2bw.compiler.program import Attribute, Block, Program, TensorType, tensor_arguments
from p2bw.compiler.storage import kept_tensor, storage_of
from p2bw.compiler.topology import Topology
from p2bw.runtime.weights import TOGETHER


def placement_problem(
    program: Program,
    *,
    topology: Topology,
    schedule: Schedule,
    microbatches: int | None,
    optimizer: Mapping[TensorType, int],
    on: Mapping[str, Program],
    clip_norm: float | None = None,
    update_s: Mapping[TensorType, float] | None = None,
) -> PlacementProblem:
    """What the placement has to know of a program with times and blocks.

    `optimizer` gives the bytes of optimizer state of a parameter of each type; `microbatches` is
    per update (None: as many as there are stages); `on` has the program with the times of every
    other kind of device in the topology. `update_s` has measured seconds of one optimizer step of a
    parameter of each type, where there is a profile.
    """
    assert program.blocks is not None, "group_blocks has not run"
    home = {node: block.name for block in program.blocks for node in block.nodes}
    stash = _stash(program, home)
    tensors = tuple(_tensors(program, home))
    return PlacementProblem(
        microbatch=program.batch_size,
        schedule=schedule,
        microbatches=microbatches,
        clip_norm=clip_norm,
        blocks=tuple(_block(program, block, stash[block.name], on) for block in program.blocks),
        parameters=tuple(_parameters(program, home, topology, optimizer, update_s or {})),
        tensors=(*tensors, *_summation_order(program, home, tensors)),
        topology=topology,
    )


def _block(program: Program, block: Block, stash: int, on: Mapping[str, Program]) -> BlockCost:
    nodes = [program.node(name) for name in block.nodes]
    times = _times(program, block)
    return BlockCost(
        name=block.name,
        forward_s=times.forward_s,
        backward_s=times.backward_s,
        on={kind: _times(other, block) for kind, other in on.items()},
        stash_bytes=stash,
        transient_bytes=max(
            _update_bytes(program, nodes), *(transient_bytes(program, node) for node in nodes)
        ),
        buffer_bytes=sum(
            program.facts[name].out[0].bytes
            for name in {a.name for node in nodes for a in tensor_arguments(node)}
            if program.node(name).op == "get_attr"
            and str(program.node(name).target) not in program.parameters
        ),
    )


def _times(program: Program, block: Block) -> Times:
    nodes = [program.node(name) for name in block.nodes]
    return Times(
        # fsum, here and wherever floats decide: from Python 3.12 on, sum rounds them otherwise.
        forward_s=math.fsum(program.fact(node, "forward_s") for node in nodes),
        backward_s=math.fsum(program.fact(node, "backward_s") for node in nodes),
    )


def transient_bytes(program: Program, node: fx.Node) -> int:
    """What one node holds besides the stash while it runs: its new outputs, or its gradients."""
    made = sum(
        kind.bytes
        for kind, alias in zip(
            program.facts[node.name].out, program.fact(node, "alias"), strict=True
        )
        if alias is None
    )
    if not any(program.fact(node, "requires_grad")):
        return made
    given = sum(
        kind.bytes
        for argument in set(tensor_arguments(node))
        for kind, needed in zip(
            program.facts[argument.name].out, program.fact(argument, "requires_grad"), strict=True
        )
        if needed
    )
    return made + given


def _update_bytes(program: Program, nodes: Iterable[fx.Node]) -> int:
    """What updating a block's parameters holds for a moment: as much as is updated at once, and
    of 16-bit weights a gradient in fp32 besides."""
    sizes = []
    for node in {a for n in nodes for a in tensor_arguments(n) if a.op == "get_attr"}:
        attribute = program.parameters.get(str(node.target))
        if attribute is not None and attribute.trainable:
            small = attribute.type.dtype in (torch.bfloat16, torch.float16)
            sizes.append(attribute.type.bytes * (4 if small else 1))  # twice as large, twice
    return min(sum(sizes), max(2 * TOGETHER, *sizes, 0))


def _stash(program: Program, home: Mapping[str, str]) -> dict[str, int]:
    """Per block, the storages made there that autograd keeps for any node of the program.

    An upper bound of what a stage keeps: where the reader is in a later stage, the maker's stage
    need not keep the storage, and the reader's keeps what it received (TensorCost.saved).
    """
    kept: dict[tuple[str, str, str, int], int] = {}
    for node in program.compute_nodes:
        for saved in program.fact(node, "saved"):
            if saved.kind == "fresh":
                kept[home[node.name], "fresh", node.name, saved.index] = saved.bytes
                continue
            maker, output = storage_of(program, *kept_tensor(program, node.name, saved))
            operation = program.node(maker).op
            if operation == "call_function":
                kept[home[maker], "tensor", maker, output] = saved.bytes
            elif operation == "placeholder":
                kept[home[node.name], "tensor", maker, output] = saved.bytes
    totals = dict.fromkeys(home.values(), 0)
    for (block, *_), size in kept.items():
        totals[block] += size
    return totals


def _parameters(
    program: Program,
    home: Mapping[str, str],
    topology: Topology,
    optimizer: Mapping[TensorType, int],
    measured: Mapping[TensorType, float],
) -> Iterator[ParameterCost]:
    for node in program.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in program.parameters:
            continue
        attribute = program.parameters[str(node.target)]
        blocks = dict.fromkeys(home[user.name] for user in node.users if user.name in home)
        if not blocks:
            continue
        state = optimizer.get(attribute.type, 0) if attribute.trainable else 0
        yield ParameterCost(
            name=attribute.name,
            bytes=attribute.type.bytes,
            gradient_bytes=attribute.type.bytes if attribute.trainable else 0,
            optimizer_bytes=state,
            update_s=measured.get(attribute.type, 0.0)
            if measured and attribute.trainable
            else _update_s(attribute, state, topology.device),
            on={kind.name: _update_s(attribute, state, kind) for kind in topology.kinds[1:]},
            blocks=tuple(blocks),
        )


def _update_s(attribute: Attribute, state: int, device: Device) -> float:
    """One optimizer step is bound by memory: copy the newest version, then read and write all."""
    if not attribute.trainable:
        return 0.0
    copy, step = 2 * attribute.type.bytes, 3 * attribute.type.bytes + 2 * state
    return (copy + step) / device.sustained_bandwidth


def _tensors(program: Program, home: Mapping[str, str]) -> Iterator[TensorCost]:
    for node in program.compute_nodes:
        consumers = dict.fromkeys(home[user.name] for user in node.users if user.name in home)
        consumers.pop(home[node.name], None)
        if not consumers:
            continue
        (kind,) = program.facts[node.name].out
        (gradient,) = program.fact(node, "requires_grad")
        yield TensorCost(
            name=node.name,
            producer=home[node.name],
            consumers=tuple(consumers),
            bytes=kind.bytes,
            gradient_bytes=kind.bytes if gradient else 0,
            # The leaf that collects its gradient lives until the backward, saved or not.
            saved=gradient or _is_saved(program, node, home),
            ordered=len(_summed(program, node, home)) >= 3,
        )


def _summation_order(
    program: Program, home: Mapping[str, str], tensors: Iterable[TensorCost]
) -> Iterator[TensorCost]:
    """Edges without bytes that keep a gradient of three or more terms equal to eager's, bit by bit.

    Eager adds the terms of the last readers first. So does a pipeline, in which later stages send
    theirs first, as long as later readers are never in earlier stages.
    """
    flow = nx.DiGraph((t.producer, consumer) for t in tensors for consumer in t.consumers)
    flow.add_nodes_from(home.values())
    for node in program.compute_nodes:
        readers = _summed(program, node, home)
        if len(readers) < 3:
            continue
        for i, (reader, later) in enumerate(pairwise(readers)):
            first, second = home[reader.name], home[later.name]
            if first != second and not nx.has_path(flow, second, first):
                flow.add_edge(first, second)
                yield TensorCost(
                    name=f"{node.name} read in order {i}",
                    producer=first,
                    consumers=(second,),
                    bytes=0,
                    gradient_bytes=0,
                    saved=False,
                )


def _summed(program: Program, node: fx.Node, home: Mapping[str, str]) -> list[fx.Node]:
    """The readers of a tensor that add to its gradient, in the program's order.

    An opaque call comes twice: inside it, any number of readers may.
    """
    if not any(_gradients(program, node)):
        return []
    readers = [user for user in node.users if user.name in home and any(_gradients(program, user))]
    return [user for user in readers for _ in range(1 + (user.name in program.opaque))]


def _gradients(program: Program, node: fx.Node) -> tuple[bool, ...]:
    needed: tuple[bool, ...] = program.fact(node, "requires_grad")
    return needed


def _is_saved(program: Program, node: fx.Node, home: Mapping[str, str]) -> bool:
    for user in node.users:
        if home.get(user.name) in (None, home[node.name]):
            continue
        arguments = tensor_arguments(user)
        for saved in program.fact(user, "saved"):
            if saved.kind == "input" and arguments[saved.index] is node:
                return True
    return False
