"""Operators that work element by element, and reductions."""

from collections.abc import Mapping

from p2bw.compiler.onnx.values import Local, Node, Numbers, Translate, UnsupportedError


def _unary(code: str) -> Translate:
    def translate(node: Node) -> None:
        node.gives(code.format(node.tensor(0)))

    return translate


_UNARY = {
    "Abs": "{}.abs()",
    "Acos": "{}.acos()",
    "Acosh": "{}.acosh()",
    "Asin": "{}.asin()",
    "Asinh": "{}.asinh()",
    "Atan": "{}.atan()",
    "Atanh": "{}.atanh()",
    "Ceil": "{}.ceil()",
    "Cos": "{}.cos()",
    "Cosh": "{}.cosh()",
    "Erf": "{}.erf()",
    "Exp": "{}.exp()",
    "Floor": "{}.floor()",
    "HardSwish": "F.hardswish({})",
    "IsNaN": "{}.isnan()",
    "Log": "{}.log()",
    "Mish": "F.mish({})",
    "Neg": "-{}",
    "Not": "~{}",
    "Reciprocal": "{}.reciprocal()",
    "Relu": "F.relu({})",
    "Round": "{}.round()",
    "Sigmoid": "{}.sigmoid()",
    "Sign": "{}.sign()",
    "Sin": "{}.sin()",
    "Sinh": "{}.sinh()",
    "Softplus": "F.softplus({})",
    "Softsign": "F.softsign({})",
    "Sqrt": "{}.sqrt()",
    "Tan": "{}.tan()",
    "Tanh": "{}.tanh()",
}


def _activation(code: str, **defaults: float) -> Translate:
    """A function of a tensor and of attributes."""

    def translate(node: Node) -> None:
        numbers = {
            name: repr(float(f"{node.attribute(name, default):.9g}"))
            for name, default in defaults.items()
        }
        node.gives(code.format(node.tensor(0), **numbers))

    return translate


_ACTIVATIONS = {
    "Celu": _activation("F.celu({}, {alpha})", alpha=1.0),
    "Elu": _activation("F.elu({}, {alpha})", alpha=1.0),
    "HardSigmoid": _activation("({} * {alpha} + {beta}).clamp(0, 1)", alpha=0.2, beta=0.5),
    "LeakyRelu": _activation("F.leaky_relu({}, {alpha})", alpha=0.01),
    "Selu": _activation(
        "{gamma} * F.elu({}, {alpha})", alpha=1.67326319217681884765625, gamma=1.05070102214813232
    ),
    "Swish": _activation("{0} * ({0} * {alpha}).sigmoid()", alpha=1.0),
    "ThresholdedRelu": _activation("torch.where({0} > {alpha}, {0}, 0.0)", alpha=1.0),
}


def _gelu(node: Node) -> None:
    approximate = node.attribute("approximate", b"none")
    tanh = ', approximate="tanh"' if approximate == b"tanh" else ""
    node.gives(f"F.gelu({node.tensor(0)}{tanh})")


def _prelu(node: Node) -> None:
    x, slope = node.tensor(0), node.operand(1)
    node.gives(f"torch.where({x} >= 0, {x}, {slope} * {x})")


_ON_NUMBERS = {"+": "Add", "-": "Sub", "*": "Mul", "//": "Div"}


def _binary(symbol: str) -> Translate:
    def translate(node: Node) -> None:
        if _whole_numbers(node, "//" if node.op == "Div" else symbol):
            return
        left, right = node.operand(0), node.operand(1)
        if node.op == "Add" and _add_bias(node):
            return
        if node.op == "Div" and "int" in node.dtype(0):  # towards zero
            left = node.tensor(0) if node.is_number(0) and node.is_number(1) else left
            node.gives(f'torch.div({left}, {right}, rounding_mode="trunc")')
            return
        if node.is_number(0) and node.is_number(1):
            left = node.tensor(0)
        node.gives(f"{left} {symbol} {right}")

    return translate


def _whole_numbers(node: Node, symbol: str) -> bool:
    """Arithmetic on sizes, in Python."""
    values = [node.value(i) for i in range(2)]
    if symbol not in _ON_NUMBERS or not any(isinstance(value, Numbers) for value in values):
        return False
    if any(isinstance(value, Local) for value in values) or "int" not in node.dtype(0):
        return False
    left, right = node.integers(0), node.integers(1)
    count = max(len(left), len(right))
    if len(left) != len(right) and min(len(left), len(right)) != 1:
        return False
    if symbol == "//" and any(isinstance(item, str) or item <= 0 for item in right):
        return False
    if symbol == "//" and any("-" in str(item) for item in left):
        return False
    left, right = (left * count)[:count], (right * count)[:count]
    items = tuple(_compute(a, symbol, b) for a, b in zip(left, right, strict=True))
    node.is_value(Numbers(items, scalar=node.rank(0) == node.rank(1) == 0))
    return True


def _compute(a: int | str, symbol: str, b: int | str) -> int | str:
    if isinstance(a, str) or isinstance(b, str):
        return f"({a} {symbol} {b})"
    return {"+": a + b, "-": a - b, "*": a * b}[symbol] if symbol != "//" else a // b


def _add_bias(node: Node) -> bool:
    """Linear without its bias, and then the bias: one F.linear."""
    for x, b in ((0, 1), (1, 0)):
        value, path = node.value(x), node.parameter(b)
        if path is None or not isinstance(value, Local):
            continue
        statement = node.translator.made.get(value.mark)
        alone = node.translator.uses[node.proto.input[x]] == 1
        weight = node.translator.linear.get(value.mark)
        if statement is None or weight is None or not alone or node.rank(b) != 1:
            continue
        if node.fixed(b)[0] != node.translator.tensors[weight].shape[0]:
            continue
        statement.code = f"{statement.code[:-1]}, {node.tensor(b)})"
        if statement.leaf is not None and path[:-1] == statement.leaf.path:
            leaf = statement.leaf
            statement.leaf = type(leaf)(
                leaf.path,
                leaf.constructor.replace(", bias=False", ""),
                leaf.owns | {path[-1]},
                leaf.call,
            )
        else:
            statement.leaf = None
        del node.translator.linear[value.mark]
        node.is_value(value)
        return True
    return False


_BINARY = {
    "Add": "+",
    "And": "&",
    "Div": "/",
    "Equal": "==",
    "Greater": ">",
    "GreaterOrEqual": ">=",
    "Less": "<",
    "LessOrEqual": "<=",
    "Mul": "*",
    "Or": "|",
    "Pow": "**",
    "Sub": "-",
    "Xor": "^",
}


def _equal(node: Node) -> None:
    """Sizes are compared in Python, where Expand's -1 is told from a size."""
    if isinstance(node.value(0), Numbers) or isinstance(node.value(1), Numbers):
        left, right = node.integers(0), node.integers(1)
        if len(left) == len(right):
            items = tuple(_same(a, b) for a, b in zip(left, right, strict=True))
            node.is_value(Numbers(items, node.rank(0) == 0), "bool")
            return
    _binary("==")(node)


def _same(a: int | str, b: int | str) -> int | str:
    numbers = [item for item in (a, b) if isinstance(item, int)]
    if len(numbers) == 2 or any(item < 0 for item in numbers):  # no size is negative
        return int(a == b)
    return f"int({a} == {b})"


def _where(node: Node) -> None:
    condition = node.value(0)
    if isinstance(condition, Numbers):
        count = len(condition.items)
        left, right = ((node.integers(i) * count)[:count] for i in (1, 2))
        picked: list[int | str] = []
        for flag, a, b in zip(condition.items, left, right, strict=True):
            known = a if flag else b
            picked.append(f"({a} if {flag} else {b})" if isinstance(flag, str) else known)
        node.is_value(Numbers(tuple(picked), condition.scalar))
        return
    both = node.is_number(1) and node.is_number(2)
    yes, no = node.tensor(1) if both else node.operand(1), node.operand(2)
    node.gives(f"torch.where({node.tensor(0)}, {yes}, {no})")


def _variadic(pair: str, clamp: str = "") -> Translate:
    """Sum, Max, Min: of any number of tensors."""

    def translate(node: Node) -> None:
        code = node.tensor(0)
        for index in range(1, node.count):
            if clamp and node.is_number(index):
                code = f"{code}.{clamp}({node.operand(index)})"
            else:
                code = pair.format(code, node.tensor(index) if clamp else node.operand(index))
        if node.count == 1:
            node.is_value(node.value(0))
        else:
            node.gives(code)

    return translate


def _mean(node: Node) -> None:
    total = " + ".join(node.tensor(i) for i in range(node.count))
    node.gives(f"({total}) / {node.count}")


def _clip(node: Node) -> None:
    bounds = []
    for index, name in ((1, "min"), (2, "max")):
        if node.has(index):
            bounds.append(f"{name}={node.operand(index)}")
    if bounds:
        node.gives(f"{node.tensor(0)}.clamp({', '.join(bounds)})")
    else:
        node.is_value(node.value(0))


def _mod(node: Node) -> None:
    function = "torch.fmod" if node.attribute("fmod", 0) else "torch.remainder"
    node.gives(f"{function}({node.tensor(0)}, {node.operand(1)})")


def _is_inf(node: Node) -> None:
    negative, positive = node.attribute("detect_negative", 1), node.attribute("detect_positive", 1)
    node.require(bool(negative or positive), "neither sign")
    name = "isinf" if negative and positive else "isposinf" if positive else "isneginf"
    node.gives(f"torch.{name}({node.tensor(0)})")


def axes_of(node: Node) -> tuple[int, ...] | None:
    """Axes from the attribute of older opsets or from an input; None: not given."""
    axes = node.attribute("axes")
    if axes is None and node.has(1):
        axes = [int(axis) for axis in node.constant(1).reshape(-1)]
    if axes is None:
        return None
    rank = max(node.rank(0), 1)
    return tuple(axis % rank for axis in axes)


_REDUCTIONS = {
    "ReduceL1": "{x}.abs().sum({d})",
    "ReduceL2": "torch.linalg.vector_norm({x}, {d2})",
    "ReduceLogSum": "{x}.sum({d}).log()",
    "ReduceLogSumExp": "{x}.logsumexp({d})",
    "ReduceMax": "{x}.amax({d})",
    "ReduceMean": "{x}.mean({d})",
    "ReduceMin": "{x}.amin({d})",
    "ReduceSum": "{x}.sum({d})",
    "ReduceSumSquare": "{x}.square().sum({d})",
}


def _reduction(code: str) -> Translate:
    def translate(node: Node) -> None:
        axes = axes_of(node)
        if not axes and node.attribute("noop_with_empty_axes", 0):
            raise UnsupportedError("noop_with_empty_axes")
        axes = axes or tuple(range(node.rank(0)))
        keep = ", keepdim=True" if node.attribute("keepdims", 1) else ""
        dims = str(axes[0]) if len(axes) == 1 else str(axes)
        node.gives(code.format(x=node.tensor(0), d=f"{dims}{keep}", d2=f"dim={dims}{keep}"))

    return translate


def _reduce_prod(node: Node) -> None:
    axes = axes_of(node) or tuple(range(node.rank(0)))
    keep = bool(node.attribute("keepdims", 1))
    code = node.tensor(0)
    for axis in sorted(axes, reverse=True):
        code = f"{code}.prod({axis}{', keepdim=True' if keep else ''})"
    node.gives(code)


def _arg(method: str) -> Translate:
    def translate(node: Node) -> None:
        node.require(not node.attribute("select_last_index", 0), "select_last_index")
        keep = ", keepdim=True" if node.attribute("keepdims", 1) else ""
        node.gives(f"{node.tensor(0)}.{method}({node.axis(0)}{keep})")

    return translate


def _softmax(function: str) -> Translate:
    def translate(node: Node) -> None:
        node.gives(f"{function}({node.tensor(0)}, dim={node.axis(-1)})", hint=function[2:])

    return translate


def _cumsum(node: Node) -> None:
    axis = int(node.constant(1).reshape(-1)[0]) % max(node.rank(0), 1)
    node.require(not node.attribute("exclusive", 0), "exclusive")
    if node.attribute("reverse", 0):
        node.gives(f"{node.tensor(0)}.flip({axis}).cumsum({axis}).flip({axis})")
    else:
        node.gives(f"{node.tensor(0)}.cumsum({axis})")


POINTWISE: Mapping[str, Translate] = {
    **{op: _unary(code) for op, code in _UNARY.items()},
    **_ACTIVATIONS,
    **{op: _binary(symbol) for op, symbol in _BINARY.items()},
    **{op: _reduction(code) for op, code in _REDUCTIONS.items()},
    "ArgMax": _arg("argmax"),
    "ArgMin": _arg("argmin"),
    "Clip": _clip,
    "CumSum": _cumsum,
    "Equal": _equal,
    "Gelu": _gelu,
    "IsInf": _is_inf,
    "LogSoftmax": _softmax("F.log_softmax"),
    "Max": _variadic("torch.maximum({}, {})", "clamp_min"),
    "Mean": _mean,
    "Min": _variadic("torch.minimum({}, {})", "clamp_max"),
    "Mod": _mod,
    "PRelu": _prelu,
    "ReduceProd": _reduce_prod,
    "Softmax": _softmax("F.softmax"),
    "Sum": _variadic("{} + {}"),
    "Where": _where,
}
