"""annotate_time: how long each node takes on a device, by a roofline or by a profile."""

import math
from collections.abc import Sequence

import torch
from torch import fx

from p2bw.compiler.devices import Device
from p2bw.compiler.measured import Profile, block_times, feed_s
from p2bw.compiler.program import Program, tensor_arguments


def annotate_time(program: Program, *, device: Device) -> Program:
    """Seconds forward and backward of each node: the slower of arithmetic and memory, per kernel.

    A node that moves nothing and computes nothing (a view) takes no time; any other pays the
    device's overhead of one launch, and an opaque call that of all it was seen to launch.
    """
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for node in program.graph.nodes:
        rate = device.sustained_flops(_arithmetic(program, node))
        opaque = program.opaque.get(node.name)
        for seconds, direction in ((forward, "forward"), (backward, "backward")):
            flops = program.fact(node, f"flops_{direction}")
            traffic = program.fact(node, f"traffic_{direction}")
            busy = max(flops / rate, traffic / device.sustained_bandwidth)
            launches = getattr(opaque, direction).kernels if opaque else 1
            seconds[node.name] = busy + launches * device.op_overhead_s if busy else 0.0
    return program.learn("annotate_time", forward_s=forward, backward_s=backward)


def use_profile(program: Program, *, profile: Profile) -> Program:
    """The same with each block's measured seconds, divided among its nodes as they were before.

    Every stage that reads inputs makes the microbatch's data: the first and the last of the readers
    take the time for that, so that two stages do if there are two.
    """
    assert program.blocks is not None, "group_blocks has not run"
    measured = block_times(profile, program)
    readers = [b.name for b in program.blocks if any(_reads_inputs(program, n) for n in b.nodes)]
    makes_data = {*readers[:1], *readers[-1:]}
    data_s = feed_s(profile, program.batch_size)
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for block in program.blocks:
        times = measured[block.name]
        forward_s = times.forward_s + (data_s if block.name in makes_data else 0.0)
        forward |= _divided(program, block.nodes, "forward_s", forward_s)
        backward |= _divided(program, block.nodes, "backward_s", times.backward_s)
    return program.learn("use_profile", forward_s=forward, backward_s=backward)


def _reads_inputs(program: Program, name: str) -> bool:
    return any(argument.op == "placeholder" for argument in tensor_arguments(program.node(name)))


def _divided(program: Program, nodes: Sequence[str], fact: str, seconds: float) -> dict[str, float]:
    before = [program.fact(name, fact) for name in nodes]
    total = math.fsum(before)
    return {
        name: seconds * (share / total if total else 1 / len(nodes))
        for name, share in zip(nodes, before, strict=True)
    }


def _arithmetic(program: Program, node: fx.Node) -> torch.dtype:
    """The dtype that a node's arithmetic is done in: the widest of its floating-point tensors."""
    types = [kind.dtype for kind in program.facts[node.name].out]
    for argument in tensor_arguments(node):
        types.extend(kind.dtype for kind in program.facts[argument.name].out)
    for region in program.facts[node.name].context:
        if region.startswith("autocast("):
            # Operators with many FLOPs are those that autocast casts down.
            name = region.removeprefix("autocast(").removesuffix(")")
            types = [getattr(torch, name)]
    floating = [dtype for dtype in types if dtype.is_floating_point]
    return max(floating, key=lambda dtype: dtype.itemsize, default=torch.float32)
