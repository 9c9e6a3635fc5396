"""Modules of torch.nn, rebuilt from the calls that they made."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from p2bw.compiler.emit.expr import Node, Num, Raw, Seq, quoted
from p2bw.compiler.emit.leaf import Leaf, Match, MismatchError
from p2bw.compiler.emit.norms import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)


def match_leaf(type_name: str, match: Match) -> Leaf | None:
    """The torch.nn module of this type that makes exactly these calls, if there is one."""
    package, _, name = type_name.rpartition(".")
    builder = _BUILDERS.get(name)
    if builder is None or not package.startswith("torch.nn.modules"):
        return None
    try:
        return builder(name, match)
    except MismatchError:
        return None


Builder = Callable[[str, Match], Leaf]


def _linear(name: str, m: Match) -> Leaf:
    m.only("linear.default")
    features = m.sure("weight").shape
    kwargs: dict[str, Node] = {} if m.own("bias") else {"bias": Raw("False")}
    sizes = (Num(features[1], "in_features"), Num(features[0], "out_features"))
    return m.leaf(name, sizes, kwargs, m.input("input"))


def _embedding(name: str, m: Match) -> Leaf:
    m.only("embedding.default")
    rows, columns = m.sure("weight").shape
    kwargs: dict[str, Node] = {}
    if m.get("padding_idx") != -1:
        kwargs["padding_idx"] = m.num("padding_idx")
    for flag in ("scale_grad_by_freq", "sparse"):
        if m.get(flag):
            kwargs[flag] = Raw("True")
    sizes = (Num(rows, "num_embeddings"), Num(columns, "embedding_dim"))
    return m.leaf(name, sizes, kwargs, m.input("indices"))


def _embedding_bag(name: str, m: Match) -> Leaf:
    """Bags of one length (a matrix of indices), or with offsets."""
    m.require(m.op.name == "embedding_bag.padding_idx")
    rows, columns = m.sure("weight").shape
    mode = m.get("mode")
    kwargs: dict[str, Node] = {}
    if mode != 1:
        kwargs["mode"] = Raw(quoted(("sum", "mean", "max")[mode]))
    if m.get("padding_idx") is not None:
        kwargs["padding_idx"] = m.num("padding_idx")
    for flag in ("scale_grad_by_freq", "sparse", "include_last_offset"):
        if m.get(flag):
            kwargs[flag] = Raw("True")
    m.require(m.get("per_sample_weights") is None)
    indices, offsets = m.get("indices"), m.get("offsets")
    inputs: tuple[fx.Node, ...] = (indices, offsets)
    if len(m.ops) == 3:
        arange, reshape = m.ops[:2]
        m.require(arange.name == "arange.start_step" and reshape.name == "reshape.default")
        m.require(indices is reshape.node and offsets is arange.node)
        matrix = reshape["self"]
        shape = reshape.types(matrix).shape
        m.require(len(shape) == 2 and list(reshape["shape"]) == [-1])
        bounds = [arange["start"], arange["end"], arange["step"]]
        m.require(bounds == [0, shape[0] * shape[1], shape[1]])
        inputs = (matrix,)
    else:
        m.require(len(m.ops) == 1)
    sizes = (Num(rows, "num_embeddings"), Num(columns, "embedding_dim"))
    return m.leaf(name, sizes, kwargs, *inputs)


def _sizes(m: Match, values: Sequence[int], name: str) -> Node:
    """One number where all dimensions agree."""
    values = list(values)
    if len(set(values)) == 1:
        return Num(values[0], name)
    return Seq("()", tuple(Num(value, name) for value in values))


def _convolution(name: str, m: Match) -> Leaf:
    transposed = "Transpose" in name
    base = name.replace("ConvTranspose", "conv_transpose").replace("Conv", "conv")
    m.only(f"{base}.default", f"{base}.input", f"{base}.padding")
    shape = m.sure("weight").shape
    groups = m.get("groups")
    inner, outer = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    args = [Num(inner, "in_channels"), Num(outer, "out_channels")]
    kwargs: dict[str, Node] = {}
    # Older defaults are lists of one; compare by value.
    for key, default in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        if m.op.has(key) and (value := m.get(key)) is not None:
            if isinstance(value, str):
                kwargs[key] = Raw(quoted(value))
            elif _listed(value, default) != [default] * len(_listed(value, default)):
                kwargs[key] = _sizes(m, value, key)
    if set(_listed(m.get("dilation"), 1)) != {1}:
        kwargs["dilation"] = _sizes(m, m.op["dilation"], "dilation")
    if groups != 1:
        kwargs["groups"] = Num(groups, "groups")
    if m.own("bias") is None:
        kwargs["bias"] = Raw("False")
    kernel = _sizes(m, shape[2:], "kernel_size")
    return m.leaf(name, [*args, kernel], kwargs, m.input("input"))


def _listed(value: Any, default: int) -> list[int]:
    if isinstance(value, int):
        return [value]
    return list(value) or [default]


def _dropout(name: str, m: Match) -> Leaf:
    base = {"Dropout": "dropout", "AlphaDropout": "alpha_dropout"}.get(name, "feature_dropout")
    if name == "FeatureAlphaDropout":
        base = "feature_alpha_dropout"
    m.only(f"{base}.default", f"{base}_.default")
    m.require(m.get("train") is True)
    inplace = "_." in m.op.name
    kwargs: dict[str, Node] = {"inplace": Raw("True")} if inplace else {}
    source = m.input("self" if m.op.has("self") else "input")
    return m.leaf(name, [m.num("p")], kwargs, source)


def _numbers(target: str, *parameters: tuple[str, str, Any], inplace: bool = False) -> Builder:
    """A module of one call whose constructor takes that call's numbers.

    `parameters` are (schema name, constructor's name, constructor's default).
    """

    def build(name: str, m: Match) -> Leaf:
        base, _, overload = target.partition(".")
        m.only(target, *([f"{base}_.{overload}"] if inplace else []))
        kwargs: dict[str, Node] = {}
        for argument, keyword, default in parameters:
            value = m.get(argument)
            if isinstance(value, (list, tuple)):
                if value and list(value) != _listed(default, 0):
                    kwargs[keyword] = _sizes(m, value, keyword)
            elif value != default or type(value) is not type(default):
                kwargs[keyword] = m.op.literal(value, keyword)
        if m.op.name.startswith(f"{base}_."):
            kwargs["inplace"] = Raw("True")
        return m.leaf(name, (), kwargs, m.input(m.op.schema[0].name))

    return build


def _relu6(name: str, m: Match) -> Leaf:
    m.only("hardtanh.default", "hardtanh_.default")
    m.require((m.get("min_val"), m.get("max_val")) == (0, 6))
    kwargs: dict[str, Node] = {"inplace": Raw("True")} if "_." in m.op.name else {}
    return m.leaf(name, (), kwargs, m.input("self"))


def _prelu(name: str, m: Match) -> Leaf:
    m.only("prelu.default")
    (count,) = m.sure("weight").shape
    kwargs: dict[str, Node] = {} if count == 1 else {"num_parameters": Num(count, "num_parameters")}
    return m.leaf(name, (), kwargs, m.input("self"))


def _pool(name: str, m: Match) -> Leaf:
    kind = "max_pool" if name.startswith("Max") else "avg_pool"
    m.only(f"{kind}{name[-2]}d.default")
    kernel = m.get("kernel_size")
    kwargs: dict[str, Node] = {}
    stride = _listed(m.get("stride"), 0)
    if stride != [0] and stride != list(kernel):
        kwargs["stride"] = _sizes(m, stride, "stride")
    if set(_listed(m.get("padding"), 0)) != {0}:
        kwargs["padding"] = _sizes(m, m.op["padding"], "padding")
    if kind == "max_pool" and set(_listed(m.get("dilation"), 1)) != {1}:
        kwargs["dilation"] = _sizes(m, m.op["dilation"], "dilation")
    if m.get("ceil_mode"):
        kwargs["ceil_mode"] = Raw("True")
    if kind == "avg_pool" and not m.get("count_include_pad"):
        kwargs["count_include_pad"] = Raw("False")
    source = m.input(m.op.schema[0].name)
    return m.leaf(name, [_sizes(m, kernel, "kernel_size")], kwargs, source)


def _adaptive(name: str, m: Match) -> Leaf:
    m.only(f"adaptive_avg_pool{name[-2]}d.default")
    size = _sizes(m, m.get("output_size"), "output_size")
    return m.leaf(name, [size], {}, m.input("self"))


def _upsample(name: str, m: Match) -> Leaf:
    mode = {"nearest": "nearest", "bilinear": "bilinear", "trilinear": "trilinear"}
    kind = m.op.name.removeprefix("upsample_").partition(".")[0]
    m.only(f"upsample_{kind}.vec")
    m.require(kind[:-2] in mode)
    kwargs: dict[str, Node] = {}
    if m.get("output_size") is not None:
        kwargs["size"] = _sizes(m, m.op["output_size"], "size")
    if m.get("scale_factors") is not None:
        factors = m.op["scale_factors"]
        m.require(len(set(factors)) == 1)
        kwargs["scale_factor"] = Num(factors[0], "scale_factor")
    if kind[:-2] != "nearest":
        kwargs["mode"] = Raw(quoted(kind[:-2]))
        if m.get("align_corners"):
            kwargs["align_corners"] = Raw("True")
    return m.leaf(name, (), kwargs, m.input("input"))


def _recurrent(name: str, m: Match) -> Leaf:
    """LSTM, GRU and RNN, with the zero states that they make when called without any."""
    target = {"LSTM": "lstm.input", "GRU": "gru.input"}
    op, lstm = m.op, name == "LSTM"
    m.require(
        op.name
        in (target.get(name, ""), *(("rnn_tanh.input", "rnn_relu.input") if name == "RNN" else ()))
    )
    bias, layers, both = m.get("has_biases"), m.get("num_layers"), m.get("bidirectional")
    m.require(m.get("train") is True)
    names = [
        f"{kind}_l{layer}{suffix}"
        for layer in range(layers)
        for suffix in (("", "_reverse") if both else ("",))
        for kind in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ()))
    ]
    params = m.get("params")
    m.require(len(params) == len(names))
    types = [m.own_node(value, own) for value, own in zip(params, names, strict=True)]
    assert types[0] is not None
    assert types[1] is not None
    hidden = types[1].shape[1]
    m.require(types[1].shape[0] == hidden * {"LSTM": 4, "GRU": 3, "RNN": 1}[name])
    source = m.input("input")
    states = m.get("hx")
    inputs: tuple[Any, ...] = (source, tuple(states) if lstm else states)
    if len(m.ops) > 1:
        made = [op.node for op in m.ops[:-1]]
        m.require(made == (list(states) if lstm else [states]))
        shape = op.types(source).shape
        batch = shape[0 if m.get("batch_first") else 1]
        for zeros in m.ops[:-1]:
            m.require(zeros.name == "zeros.default")
            m.require(list(zeros["size"]) == [layers * (1 + both), batch, hidden])
            m.require(zeros["dtype"] in (None, op.types(source).dtype))
        inputs = (source,)
    kwargs: dict[str, Node] = {}
    if layers != 1:
        kwargs["num_layers"] = Num(layers, "num_layers")
    if name == "RNN" and op.name == "rnn_relu.input":
        kwargs["nonlinearity"] = Raw(quoted("relu"))
    if not bias:
        kwargs["bias"] = Raw("False")
    if m.get("batch_first"):
        kwargs["batch_first"] = Raw("True")
    if m.get("dropout"):
        kwargs["dropout"] = m.num("dropout")
    if both:
        kwargs["bidirectional"] = Raw("True")
    sizes = (Num(types[0].shape[1], "input_size"), Num(hidden, "hidden_size"))
    return m.leaf(name, sizes, kwargs, *inputs)


_BUILDERS: dict[str, Builder] = {
    "Linear": _linear,
    "Embedding": _embedding,
    "EmbeddingBag": _embedding_bag,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
    "GroupNorm": group_norm,
    "PReLU": _prelu,
    "Upsample": _upsample,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **{f"Conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _convolution for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": batch_norm for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": instance_norm for n in (1, 2, 3)},
    **{f"MaxPool{n}d": _pool for n in (1, 2, 3)},
    **{f"AvgPool{n}d": _pool for n in (1, 2, 3)},
    **{f"AdaptiveAvgPool{n}d": _adaptive for n in (1, 2, 3)},
    **dict.fromkeys(
        ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"),
        _dropout,
    ),
    "ReLU": _numbers("relu.default", inplace=True),
    "ReLU6": _relu6,
    "SiLU": _numbers("silu.default", inplace=True),
    "Mish": _numbers("mish.default", inplace=True),
    "SELU": _numbers("selu.default", inplace=True),
    "Hardswish": _numbers("hardswish.default", inplace=True),
    "Hardsigmoid": _numbers("hardsigmoid.default", inplace=True),
    "ELU": _numbers("elu.default", ("alpha", "alpha", 1.0), inplace=True),
    "CELU": _numbers("celu.default", ("alpha", "alpha", 1.0), inplace=True),
    "LeakyReLU": _numbers(
        "leaky_relu.default", ("negative_slope", "negative_slope", 0.01), inplace=True
    ),
    "Hardtanh": _numbers(
        "hardtanh.default",
        ("min_val", "min_val", -1.0),
        ("max_val", "max_val", 1.0),
        inplace=True,
    ),
    "GELU": _numbers("gelu.default", ("approximate", "approximate", "none")),
    "Sigmoid": _numbers("sigmoid.default"),
    "Tanh": _numbers("tanh.default"),
    "Softplus": _numbers(
        "softplus.default", ("beta", "beta", 1.0), ("threshold", "threshold", 20.0)
    ),
    "LogSigmoid": _numbers("log_sigmoid.default"),
    "GLU": _numbers("glu.default", ("dim", "dim", -1)),
    "Softmax": _numbers("softmax.int", ("dim", "dim", None)),
    "LogSoftmax": _numbers("log_softmax.int", ("dim", "dim", None)),
    "Flatten": _numbers(
        "flatten.using_ints", ("start_dim", "start_dim", 1), ("end_dim", "end_dim", -1)
    ),
    "PixelShuffle": _numbers("pixel_shuffle.default", ("upscale_factor", "upscale_factor", None)),
}
