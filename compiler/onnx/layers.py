"""Operators with weights: matrix products, convolutions, pooling, normalisation, recurrence."""

import re
from collections.abc import Mapping, Sequence

from p2bw.compiler.onnx.values import Leaf, Local, Node, Translate, typed


def _matmul(node: Node) -> None:
    x, weight = node.tensor(0), node.value(1)
    path = node.translator.transposed.get(weight.mark) if isinstance(weight, Local) else None
    if path is None or node.rank(0) < 2:
        node.gives(f"{x} @ {node.tensor(1)}")
        return
    tensor = node.translator.tensors[path]
    outer, inner = tensor.shape
    leaf = None
    if path[-1] == "weight":
        constructor = typed(f"nn.Linear({inner}, {outer}, bias=False)", tensor.dtype)
        leaf = _linear_leaf(path, constructor, x)
    code = f"F.linear({x}, ⟦{'.'.join(path)}⟧)"
    statement = node.gives(code, hint="linear", leaf=leaf)
    node.translator.linear[statement.results[0]] = path


def _linear_leaf(path: tuple[str, ...], constructor: str, call: str) -> Leaf | None:
    return Leaf(path[:-1], constructor, frozenset({path[-1]}), call) if len(path) > 1 else None


def _gemm(node: Node) -> None:
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    flips = node.attribute("transA", 0), node.attribute("transB", 0)
    bias_fits = not node.has(2) or node.rank(2) == 1
    if flips == (0, 1) and alpha == beta == 1 and bias_fits:
        arguments = ", ".join(node.tensor(i) for i in range(3) if node.has(i))
        leaf = None
        if node.parameter(1) is not None:
            outer, inner = node.fixed(1)
            bias = "" if node.has(2) else ", bias=False"
            leaf = node.leaf(f"nn.Linear({inner}, {outer}{bias})", node.tensor(0), 1, 2)
            leaf = leaf if _standard(node, 1, 2) and (not node.has(2) or _is_full(node)) else None
        node.gives(f"F.linear({arguments})", hint="linear", leaf=leaf)
        return
    x, y = (f"{node.tensor(i)}{'.t()' if flips[i] else ''}" for i in range(2))
    code = f"{x} @ {y}" if alpha == 1 else f"{alpha:.9g} * ({x} @ {y})"
    if node.has(2) and beta:
        code += f" + {node.tensor(2)}" if beta == 1 else f" + {beta:.9g} * {node.tensor(2)}"
    node.gives(code, hint="linear")


def _is_full(node: Node) -> bool:
    """Whether the bias has one value for each output, and not one for all."""
    return node.fixed(2)[0] == node.fixed(1)[0]


def _standard(node: Node, weight: int, bias: int) -> bool:
    """Whether the parameters are called as those of torch.nn are."""
    names = {weight: "weight", bias: "bias"}
    paths = {i: node.parameter(i) for i in names if node.has(i)}
    return all(path is not None and path[-1] == names[i] for i, path in paths.items())


def _einsum(node: Node) -> None:
    equation = node.attribute("equation").decode("ascii", "replace").replace(" ", "")
    node.require(
        re.fullmatch(r"[A-Za-z,.]+(->[A-Za-z.]*)?", equation) is not None, "no equation of letters"
    )
    tensors = ", ".join(node.tensor(i) for i in range(node.count))
    node.gives(f'torch.einsum("{equation}", {tensors})')


def _spatial(node: Node) -> int:
    """How many dimensions are neither batch nor channel."""
    count = node.rank(0) - 2
    node.require(count in (1, 2, 3), f"{count} spatial dimensions")
    return count


def _pads(node: Node, kernel: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after, by spatial dimension."""
    count = len(kernel)
    mode = node.attribute("auto_pad", b"NOTSET")
    dilations = node.attribute("dilations") or [1] * count
    if mode in (b"NOTSET", b"VALID"):
        flat = (node.attribute("pads") if mode == b"NOTSET" else None) or [0] * (2 * count)
        return [(flat[i], flat[i + count]) for i in range(count)]
    node.require(mode in (b"SAME_UPPER", b"SAME_LOWER"), "an unknown auto_pad")
    pads = []
    for size, k, stride, dilation in zip(
        node.sizes(0)[2:], kernel, strides, dilations, strict=True
    ):
        node.require(size is not None and size.fixed is not None, "SAME padding of unknown sizes")
        assert size is not None
        total = max((-(-size.plus // stride) - 1) * stride + (k - 1) * dilation + 1 - size.plus, 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if mode == b"SAME_UPPER" else (large, small))
    return pads


def _one(values: Sequence[int]) -> str:
    """One number where all agree."""
    return str(values[0]) if len(set(values)) == 1 else str(tuple(values))


def _options(**values: tuple[str, str]) -> str:
    """Keyword arguments whose value is not the default."""
    return "".join(
        f", {name}={text}" for name, (text, default) in values.items() if text != default
    )


def _padded(node: Node, pads: list[tuple[int, int]], value: str = "") -> str:
    """The first input, padded by as much as is not the same on both sides."""
    if all(before == after for before, after in pads):
        return node.tensor(0)
    flat = [size for pair in reversed(pads) for size in pair]
    return node.step(f"F.pad({node.tensor(0)}, {tuple(flat)}{value})", "pad")


def _conv(node: Node) -> None:
    dims = _spatial(node)
    shape = node.fixed(1)
    kernel, group = shape[2:], node.attribute("group", 1)
    strides = node.attribute("strides") or [1] * dims
    dilations = node.attribute("dilations") or [1] * dims
    pads = _pads(node, kernel, strides)
    x = _padded(node, pads)
    padding = [before for before, _ in pads] if x == node.tensor(0) else [0] * dims
    common = {"stride": (_one(strides), "1"), "padding": (_one(padding), "0")}
    groups = {"dilation": (_one(dilations), "1"), "groups": (str(group), "1")}
    options = _options(**common, **groups)
    channels = f"{shape[1] * group}, {shape[0]}"
    _convolved(node, x, ("conv", f"Conv{dims}d"), f"{channels}, {_one(kernel)}", options)


def _conv_transpose(node: Node) -> None:
    dims = _spatial(node)
    shape = node.fixed(1)
    kernel, group = shape[2:], node.attribute("group", 1)
    node.require(not node.attribute("output_shape"), "output_shape")
    node.require(node.attribute("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"), "auto_pad")
    strides = node.attribute("strides") or [1] * dims
    dilations = node.attribute("dilations") or [1] * dims
    extra = node.attribute("output_padding") or [0] * dims
    pads = _pads(node, kernel, strides)
    node.require(all(before == after for before, after in pads), "padding of one side")
    options = _options(
        stride=(_one(strides), "1"),
        padding=(_one([before for before, _ in pads]), "0"),
        output_padding=(_one(extra), "0"),
        groups=(str(group), "1"),
    ) + _options(dilation=(_one(dilations), "1"))
    names = ("conv_transpose", f"ConvTranspose{dims}d")
    sizes = f"{shape[0]}, {shape[1] * group}, {_one(kernel)}"
    _convolved(node, node.tensor(0), names, sizes, options)


def _convolved(node: Node, x: str, names: tuple[str, str], sizes: str, options: str) -> None:
    """What a convolution gives: as a module of these sizes, or as a function of x."""
    function, module = names
    bias = "" if node.has(2) else ", bias=False"
    leaf = node.leaf(f"nn.{module}({sizes}{options}{bias})", x, 1, 2)
    weights = ", ".join(node.tensor(i) for i in (1, 2) if node.has(i))
    node.gives(
        f"F.{function}{module[-2:]}({x}, {weights}{options})",
        hint=function,
        leaf=leaf if _standard(node, 1, 2) else None,
    )


def _pool(kind: str) -> Translate:
    def translate(node: Node) -> None:
        dims = _spatial(node)
        node.require(not node.wants(1), "its indices")
        kernel = node.attribute("kernel_shape")
        strides = node.attribute("strides") or [1] * dims
        dilations = node.attribute("dilations") or [1] * dims
        pads = _pads(node, kernel, strides)
        average = kind == "avg"
        counted = bool(node.attribute("count_include_pad", 0))
        even = all(before == after for before, after in pads)
        node.require(even or not average, "padding of one side")
        node.require(not average or set(dilations) == {1}, "dilations")
        small = all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True))
        node.require(small or not even, "padding of more than half the kernel")
        x = _padded(node, pads, ', value=float("-inf")')
        options = _options(
            stride=(_one(strides), _one(kernel)),
            padding=(_one([before if even else 0 for before, _ in pads]), "0"),
            ceil_mode=(str(bool(node.attribute("ceil_mode", 0))), "False"),
        )
        if average and any(before for before, _ in pads):
            options += _options(count_include_pad=(str(counted), "True"))
        options += _options(dilation=(_one(dilations), "1"))
        node.gives(f"F.{kind}_pool{dims}d({x}, {_one(kernel)}{options})", hint=f"{kind}_pool")

    return translate


def _global_pool(method: str) -> Translate:
    def translate(node: Node) -> None:
        axes = tuple(range(2, node.rank(0)))
        node.gives(f"{node.tensor(0)}.{method}({axes}, keepdim=True)", hint="pool")

    return translate


def _batch_norm(node: Node) -> None:
    node.require(not any(node.wants(i) for i in range(1, 5)), "its running statistics as outputs")
    dims = {2: 1, 3: 1, 4: 2, 5: 3}.get(node.rank(0))
    features = node.fixed(1)[0]
    momentum = round(1 - node.attribute("momentum", 0.9), 6)
    epsilon = float(f"{node.attribute('epsilon', 1e-5):.6g}")
    options = _options(eps=(repr(epsilon), "1e-05"), momentum=(repr(momentum), "0.1"))
    names = ("weight", "bias", "running_mean", "running_var")
    paths = [node.parameter(i) for i in range(1, 5)]
    leaf = None
    if dims and all(path and path[-1] == name for path, name in zip(paths, names, strict=True)):
        constructor = f"nn.BatchNorm{dims}d({features}{options})"
        leaf = node.leaf(constructor, node.tensor(0), 1, 2, 3, 4)
    x, weight, bias, mean, variance = (node.tensor(i) for i in range(5))
    node.gives(
        f"F.batch_norm({x}, {mean}, {variance}, {weight}, {bias}, training=self.training{options})",
        hint="batch_norm",
        leaf=leaf,
    )


def _instance_norm(node: Node) -> None:
    options = f", eps={node.attribute('epsilon', 1e-5):.6g}"
    x, weight, bias = (node.tensor(i) for i in range(3))
    node.gives(f"F.instance_norm({x}, weight={weight}, bias={bias}{options})")


def _layer_norm(node: Node) -> None:
    node.require(not node.wants(1) and not node.wants(2), "its mean or deviation as outputs")
    rms = node.op == "RMSNormalization"
    sizes = node.sizes(0)[node.axis(-1) :]
    node.require(all(s is not None and s.fixed is not None for s in sizes), "unknown sizes")
    shape = [s.plus for s in sizes if s is not None]
    node.require(list(node.fixed(1)) == shape, "a scale of another shape")
    node.require(not node.has(2) or list(node.fixed(2)) == shape, "a bias of another shape")
    epsilon = f"{node.attribute('epsilon', 1e-5):.6g}"
    options = f", eps={epsilon}" if rms else _options(eps=(epsilon, "1e-05"))
    weights = ", ".join(node.tensor(i) for i in (1, 2) if node.has(i))
    name, module = ("rms_norm", "RMSNorm") if rms else ("layer_norm", "LayerNorm")
    normalized = str(shape[0]) if len(shape) == 1 else str(tuple(shape))
    bias = "" if rms or node.has(2) else ", bias=False"
    leaf = node.leaf(f"nn.{module}({normalized}{options}{bias})", node.tensor(0), 1, 2)
    node.gives(
        f"F.{name}({node.tensor(0)}, ({', '.join(map(str, shape))},), {weights}{options})",
        hint="norm",
        leaf=leaf if _standard(node, 1, 2) else None,
    )


def _group_norm(node: Node) -> None:
    node.require(node.opset >= 21, "a scale for each group, as before opset 21")
    groups, channels = node.attribute("num_groups"), node.fixed(1)[0]
    options = _options(eps=(f"{node.attribute('epsilon', 1e-5):.6g}", "1e-05"))
    x, weight, bias = (node.tensor(i) for i in range(3))
    leaf = node.leaf(f"nn.GroupNorm({groups}, {channels}{options})", x, 1, 2)
    node.gives(
        f"F.group_norm({x}, {groups}, {weight}, {bias}{options})",
        hint="norm",
        leaf=leaf if _standard(node, 1, 2) else None,
    )


def _resize(node: Node) -> None:
    dims = _spatial(node)
    sizes, out = node.sizes(0), node.out_sizes()
    fixed = [None if s is None else s.fixed for s in (*sizes[2:], *(out or ())[2:])]
    node.require(out is not None and None not in fixed, "sizes that are unknown")
    before, after = (
        [size for size in part if size is not None] for part in (fixed[:dims], fixed[dims:])
    )
    scales = [float(s) for s in node.constant(2)[2:]] if node.has(2) and node.count == 3 else []
    for scale, old, new in zip(scales, before, after, strict=False):
        node.require(scale * old == new, "scales that do not divide evenly")
    mode = node.attribute("mode", b"nearest")
    grid = node.attribute("coordinate_transformation_mode", b"half_pixel")
    whole = all(new % old == 0 for old, new in zip(before, after, strict=True))
    node.require(not node.attribute("antialias", 0), "antialias")
    if mode == b"nearest":
        rounding = node.attribute("nearest_mode", b"round_prefer_floor")
        simple = grid == b"asymmetric" and rounding == b"floor"
        # A point in the middle of two is the only case in which the roundings differ.
        centred = grid in (b"half_pixel", b"pytorch_half_pixel") and b"round" in rounding
        node.require(simple or (centred and whole), "another way to round than PyTorch has")
        extra = ', mode="nearest"'
    else:
        node.require(mode in (b"linear", b"cubic"), "an unknown mode")
        node.require(dims == 2 or mode == b"linear", "cubic for other than images")
        cubic = node.attribute("cubic_coeff_a", -0.75) == -0.75
        node.require(mode == b"linear" or cubic, "another cubic_coeff_a than PyTorch has")
        outside = node.attribute("exclude_outside", 0)
        node.require(not outside, "exclude_outside")
        aligned = grid == b"align_corners"
        centred = grid == b"half_pixel" or (grid == b"pytorch_half_pixel" and min(after) > 1)
        node.require(aligned or centred, "another grid than PyTorch has")
        linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        extra = f', mode="{linear if mode == b"linear" else "bicubic"}"'
        extra += ", align_corners=True" if aligned else ""
    shape = f"({', '.join(map(str, after))}{',' if dims == 1 else ''})"
    node.gives(f"F.interpolate({node.tensor(0)}, {shape}{extra})", hint="upsample")


def _attention(node: Node) -> None:
    node.require(node.rank(0) == 4, "heads that are not a dimension of their own")
    node.require(node.count <= 4 and not any(node.wants(i) for i in (1, 2, 3)), "a cache")
    node.require(not node.attribute("softcap", 0.0), "softcap")
    q, k, v = (node.tensor(i) for i in range(3))
    options = f", attn_mask={node.tensor(3)}" if node.has(3) else ""
    options += ", is_causal=True" if node.attribute("is_causal", 0) else ""
    if (scale := node.attribute("scale")) is not None:
        options += f", scale={float(scale):.9g}"
    options += ", enable_gqa=True" if node.sizes(0)[1] != node.sizes(1)[1] else ""
    node.gives(f"F.scaled_dot_product_attention({q}, {k}, {v}{options})", hint="attention")


def _recurrent(node: Node) -> None:
    """LSTM, GRU and RNN by the helper function of that name."""
    kind = {"lstm": "lstm", "gru": "gru"}.get(node.op.lower(), "rnn")
    hidden = node.attribute("hidden_size")
    direction = node.attribute("direction", b"forward")
    ways = 2 if direction == b"bidirectional" else 1
    node.require(direction != b"reverse", "direction reverse")
    node.require(not node.attribute("layout", 0), "layout 1")
    node.require(not node.has(4), "sequence lengths")
    node.require("clip" not in node.attributes, "clip")
    node.require("activations" not in node.attributes, "other activations")
    node.require(not node.attribute("input_forget", 0), "input_forget")
    node.require(not node.has(7), "peepholes")
    if kind == "gru":
        node.require(node.attribute("linear_before_reset", 0) == 1, "linear_before_reset 0")
    x, w, r = (node.tensor(i) for i in range(3))
    zeros = f"{x}.new_zeros({ways}, {x}.shape[1], {hidden})"
    states = [
        node.tensor(i) if node.has(i) else zeros for i in ((5, 6) if kind == "lstm" else (5,))
    ]
    gates = {"lstm": 8, "gru": 6, "rnn": 2}[kind]
    bias = node.tensor(3) if node.has(3) else f"{x}.new_zeros({ways}, {gates * hidden})"
    names = list(node.proto.output) + [""] * (len(states) + 1 - len(node.proto.output))
    node.translator.helpers.add(kind)
    node.gives_all(names, f"{kind}({x}, {w}, {r}, {bias}, {', '.join(states)})", hint="output")


LAYERS: Mapping[str, Translate] = {
    "Attention": _attention,
    "AveragePool": _pool("avg"),
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool("mean"),
    "GlobalMaxPool": _global_pool("amax"),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _pool("max"),
    "RMSNormalization": _layer_norm,
    "RNN": _recurrent,
    "Resize": _resize,
}
