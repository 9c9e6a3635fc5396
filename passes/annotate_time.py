"""annotate_time: how long each node takes on a device, by a roofline."""

import torch
from torch import fx

from p2bw.compiler.devices import Device
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
