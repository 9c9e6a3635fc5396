"""The normalisations of torch.nn, from the calls that their forwards make."""

from collections.abc import Sequence

from p2bw.compiler.emit.expr import Node, Num, Raw, Seq
from p2bw.compiler.emit.leaf import Leaf, Match


def batch_norm(name: str, m: Match) -> Leaf:
    m.require(m.op.name == "batch_norm.default" and m.get("training") is True)
    weight, bias = m.own("weight"), m.own("bias")
    m.require((weight is None) == (bias is None))
    mean, variance = m.own("running_mean"), m.own("running_var")
    m.require((mean is None) == (variance is None))
    kwargs: dict[str, Node] = {}
    if m.get("eps") != 1e-5:
        kwargs["eps"] = m.num("eps")
    if m.get("momentum") != 0.1:
        kwargs["momentum"] = m.num("momentum")
    if weight is None:
        kwargs["affine"] = Raw("False")
    if mean is None:
        kwargs["track_running_stats"] = Raw("False")
        m.require(len(m.ops) == 1)
    else:
        counting = m.ops[0]
        m.require(len(m.ops) == 2 and counting.name == "add_.Tensor")
        m.require(counting["other"] == 1 and counting.changed() <= {"self", "other"})
        m.own_node(counting["self"], "num_batches_tracked")
    channels = m.op.types(m.op["input"]).shape[1]
    return m.leaf(name, [Num(channels, "num_features")], kwargs, m.input("input"))


def instance_norm(name: str, m: Match) -> Leaf:
    m.only("instance_norm.default")
    m.require(m.get("use_input_stats") is True)
    m.require(m.get("running_mean") is None and m.get("running_var") is None)
    weight, bias = m.own("weight"), m.own("bias")
    m.require((weight is None) == (bias is None))
    kwargs: dict[str, Node] = {}
    if m.get("eps") != 1e-5:
        kwargs["eps"] = m.num("eps")
    if m.get("momentum") != 0.1:
        kwargs["momentum"] = m.num("momentum")
    if weight is not None:
        kwargs["affine"] = Raw("True")
    channels = m.op.types(m.op["input"]).shape[1]
    return m.leaf(name, [Num(channels, "num_features")], kwargs, m.input("input"))


def layer_norm(name: str, m: Match) -> Leaf:
    m.only("layer_norm.default")
    weight, bias = m.own("weight"), m.own("bias")
    kwargs: dict[str, Node] = {}
    if m.get("eps") != 1e-5:
        kwargs["eps"] = m.num("eps")
    if weight is None:
        m.require(bias is None)
        kwargs["elementwise_affine"] = Raw("False")
    elif bias is None:
        kwargs["bias"] = Raw("False")
    return m.leaf(name, [_shape(m, m.get("normalized_shape"))], kwargs, m.input("input"))


def _shape(m: Match, shape: Sequence[int]) -> Node:
    numbers = tuple(Num(size, "normalized_shape") for size in shape)
    return numbers[0] if len(numbers) == 1 else Seq("()", numbers)


def rms_norm(name: str, m: Match) -> Leaf:
    m.only("rms_norm.default")
    kwargs: dict[str, Node] = {}
    if m.get("eps") is not None:
        kwargs["eps"] = m.num("eps")
    if m.own("weight") is None:
        kwargs["elementwise_affine"] = Raw("False")
    return m.leaf(name, [_shape(m, m.get("normalized_shape"))], kwargs, m.input("input"))


def group_norm(name: str, m: Match) -> Leaf:
    m.only("group_norm.default")
    weight, bias = m.own("weight"), m.own("bias")
    m.require((weight is None) == (bias is None))
    kwargs: dict[str, Node] = {}
    if m.get("eps") != 1e-5:
        kwargs["eps"] = m.num("eps")
    if weight is None:
        kwargs["affine"] = Raw("False")
    channels = m.op.types(m.op["input"]).shape[1]
    sizes = [m.num("num_groups"), Num(channels, "num_channels")]
    return m.leaf(name, sizes, kwargs, m.input("input"))
