"""How people write the commonest ATen calls: operators, functions and methods."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Signature:
    """A Python function and which argument of the ATen schema each of its parameters takes.

    `arguments` are (schema name, keyword) in the function's order; no keyword: always positional;
    "=dim": always by keyword.
    """

    function: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...] = ()


OPERATORS = {
    **{f"{n}.{o}": "+" for n in ("add",) for o in ("Tensor", "Scalar")},
    **{f"sub.{o}": "-" for o in ("Tensor", "Scalar")},
    **{f"mul.{o}": "*" for o in ("Tensor", "Scalar")},
    **{f"div.{o}": "/" for o in ("Tensor", "Scalar")},
    "rsub.Scalar": "r-",
    "pow.Tensor_Scalar": "**",
    "pow.Tensor_Tensor": "**",
    "pow.Scalar": "**",
    "matmul.default": "@",
    "floor_divide.default": "//",
    "floor_divide.Scalar": "//",
    "remainder.Tensor": "%",
    "remainder.Scalar": "%",
    **{
        f"{n}.{o}": s
        for n, s in (
            ("eq", "=="),
            ("ne", "!="),
            ("lt", "<"),
            ("le", "<="),
            ("gt", ">"),
            ("ge", ">="),
        )
        for o in ("Tensor", "Scalar")
    },
    **{
        f"{n}.{o}": s
        for n, s in (
            ("__and__", "&"),
            ("bitwise_and", "&"),
            ("__or__", "|"),
            ("bitwise_or", "|"),
            ("__xor__", "^"),
            ("bitwise_xor", "^"),
        )
        for o in ("Tensor", "Scalar")
    },
}

AUGMENTED = {
    f"{name}_.{overload}": f"{symbol}="
    for name, symbol in (("add", "+"), ("sub", "-"), ("mul", "*"), ("div", "/"))
    for overload in ("Tensor", "Scalar")
}


def _f(function: str, arguments: str, prefix: str = "F.", **constants: str) -> Signature:
    """Parse "input:, weight, dim:=dim": schema name, then what the function calls it."""
    pairs = []
    for item in arguments.split():
        name, colon, keyword = item.partition(":")
        pairs.append((name, keyword if colon else name))
    return Signature(prefix + function, tuple(pairs), tuple(constants.items()))


_POOL = "self: kernel_size stride:=stride padding:=padding"
_MAX_POOL = _f("max_pool", f"{_POOL} dilation:=dilation ceil_mode:=ceil_mode").arguments
_AVG_POOL = _f(
    "avg_pool", f"{_POOL} ceil_mode:=ceil_mode count_include_pad:=count_include_pad"
).arguments
_CONV = "input: weight: bias:=bias stride:=stride padding:=padding "
_LOSS = "self: target: weight:=weight reduction:=reduction "


def _convolutions() -> dict[str, Signature]:
    table = {}
    for n in (1, 2, 3):
        forward = _f(f"conv{n}d", _CONV + "dilation:=dilation groups:=groups")
        table[f"conv{n}d.default"] = table[f"conv{n}d.padding"] = forward
        overload = "default" if n == 1 else "input"
        table[f"conv_transpose{n}d.{overload}"] = _f(
            f"conv_transpose{n}d",
            _CONV + "output_padding:=output_padding groups:=groups dilation:=dilation",
        )
        table[f"max_pool{n}d.default"] = Signature(f"F.max_pool{n}d", _MAX_POOL)
        divisor = () if n == 1 else (("divisor_override", "=divisor_override"),)
        table[f"avg_pool{n}d.default"] = Signature(f"F.avg_pool{n}d", (*_AVG_POOL, *divisor))
        table[f"adaptive_avg_pool{n}d.default"] = _f(f"adaptive_avg_pool{n}d", "self: output_size")
    return table


def _activations() -> dict[str, Signature]:
    """Functions of one tensor and numbers, with an in-place twin."""
    table = {}
    for name, function, arguments in (
        ("relu", "relu", ""),
        ("relu6", "relu6", ""),
        ("silu", "silu", ""),
        ("mish", "mish", ""),
        ("selu", "selu", ""),
        ("hardswish", "hardswish", ""),
        ("hardsigmoid", "hardsigmoid", ""),
        ("elu", "elu", "alpha"),
        ("celu", "celu", "alpha"),
        ("leaky_relu", "leaky_relu", "negative_slope"),
        ("hardtanh", "hardtanh", "min_val max_val"),
        ("threshold", "threshold", "threshold value"),
    ):
        table[f"{name}.default"] = _f(function, f"self: {arguments}")
        table[f"{name}_.default"] = _f(function, f"self: {arguments}", inplace="True")
    del table["relu_.default"]  # x.relu_()
    return table


FUNCTIONAL: dict[str, Signature] = {
    **_convolutions(),
    **_activations(),
    "linear.default": _f("linear", "input: weight: bias"),
    "bilinear.default": _f("bilinear", "input1: input2: weight: bias"),
    "layer_norm.default": _f("layer_norm", "input: normalized_shape weight bias eps:=eps"),
    "rms_norm.default": _f("rms_norm", "input: normalized_shape weight eps:=eps"),
    "group_norm.default": _f("group_norm", "input: num_groups weight bias eps:=eps"),
    "batch_norm.default": _f(
        "batch_norm",
        "input: running_mean: running_var: weight bias training:=training momentum:=momentum "
        "eps:=eps",
    ),
    "instance_norm.default": _f(
        "instance_norm",
        "input: running_mean:=running_mean running_var:=running_var weight:=weight bias:=bias "
        "use_input_stats:=use_input_stats momentum:=momentum eps:=eps",
    ),
    "gelu.default": _f("gelu", "self: approximate:=approximate"),
    "softplus.default": _f("softplus", "self: beta threshold"),
    "softshrink.default": _f("softshrink", "self: lambd"),
    "hardshrink.default": _f("hardshrink", "self: lambd"),
    "log_sigmoid.default": _f("logsigmoid", "self:"),
    "prelu.default": _f("prelu", "self: weight:"),
    "glu.default": _f("glu", "self: dim:=dim"),
    "softmax.int": _f("softmax", "self: dim:=dim dtype:=dtype"),
    "log_softmax.int": _f("log_softmax", "self: dim:=dim dtype:=dtype"),
    "pad.default": _f("pad", "self: pad mode:=mode value:=value"),
    "one_hot.default": _f("one_hot", "self: num_classes"),
    "pixel_shuffle.default": _f("pixel_shuffle", "self: upscale_factor"),
    "pixel_unshuffle.default": _f("pixel_unshuffle", "self: downscale_factor"),
    "cosine_similarity.default": _f("cosine_similarity", "x1: x2: dim:=dim eps:=eps"),
    "scaled_dot_product_attention.default": _f(
        "scaled_dot_product_attention",
        "query: key: value: attn_mask:=attn_mask dropout_p:=dropout_p is_causal:=is_causal "
        "scale:=scale enable_gqa:=enable_gqa",
    ),
    "cross_entropy_loss.default": _f(
        "cross_entropy",
        _LOSS + "ignore_index:=ignore_index label_smoothing:=label_smoothing",
    ),
    "nll_loss_nd.default": _f("nll_loss", _LOSS + "ignore_index:=ignore_index"),
    "binary_cross_entropy.default": _f("binary_cross_entropy", _LOSS),
    "binary_cross_entropy_with_logits.default": _f(
        "binary_cross_entropy_with_logits", _LOSS + "pos_weight:=pos_weight"
    ),
    "mse_loss.default": _f("mse_loss", "self: target: reduction:=reduction"),
    "l1_loss.default": _f("l1_loss", "self: target: reduction:=reduction"),
    "smooth_l1_loss.default": _f("smooth_l1_loss", "self: target: reduction:=reduction beta:=beta"),
    "huber_loss.default": _f("huber_loss", "self: target: reduction:=reduction delta:=delta"),
    "kl_div.default": _f("kl_div", "self: target: reduction:=reduction log_target:=log_target"),
    "soft_margin_loss.default": _f("soft_margin_loss", "self: target: reduction:=reduction"),
    "linalg_vector_norm.default": _f(
        "linalg.vector_norm",
        "self: ord dim:=dim keepdim:=keepdim dtype:=dtype",
        prefix="torch.",
    ),
    **{
        name: _f(name.partition(".")[0], arguments, prefix="torch.")
        for name, arguments in (
            ("addmm.default", "self: mat1: mat2: beta:=beta alpha:=alpha"),
            ("baddbmm.default", "self: batch1: batch2: beta:=beta alpha:=alpha"),
            ("bmm.default", "self: mat2:"),
            ("mm.default", "self: mat2:"),
            ("outer.default", "self: vec2:"),
            ("addcmul.default", "self: tensor1: tensor2: value:=value"),
            ("where.self", "condition: self: other:"),
            ("where.ScalarOther", "condition: self: other:"),
            ("where.ScalarSelf", "condition: self: other:"),
            ("where.Scalar", "condition: self: other:"),
            ("zeros_like.default", "self: dtype:=dtype memory_format:=memory_format"),
            ("ones_like.default", "self: dtype:=dtype memory_format:=memory_format"),
            ("rand_like.default", "self: dtype:=dtype memory_format:=memory_format"),
            ("randn_like.default", "self: dtype:=dtype memory_format:=memory_format"),
            ("empty_like.default", "self: dtype:=dtype memory_format:=memory_format"),
            ("full_like.default", "self: fill_value: dtype:=dtype memory_format:=memory_format"),
            ("minimum.default", "self: other:"),
            ("maximum.default", "self: other:"),
            ("min.other", "self: other:"),
            ("max.other", "self: other:"),
            ("real.default", "self:"),
            ("imag.default", "self:"),
            ("complex.default", "real: imag:"),
            ("polar.default", "abs: angle:"),
            ("view_as_complex.default", "self:"),
            ("view_as_real.default", "self:"),
        )
    },
}

# Methods of Tensor whose parameters are those of the ATen schema.
_METHODS = """
    abs acos acosh add addbmm addcdiv addcmul addmv addr all amax amin angle any argmax argmin
    argsort as_strided asin asinh atan atan2 atanh baddbmm bernoulli bincount bitwise_left_shift
    bitwise_right_shift bmm ceil cholesky clamp clamp_max clamp_min clone conj contiguous copy
    copysign cos cosh cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagonal
    diff digamma div dot eq erf erfc erfinv exp exp2 expand expand_as expm1 exponential fill fix
    flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac gather ge gt
    heaviside histc hypot index_add index_copy index_fill index_put index_select inner inverse
    isclose isfinite isinf isnan kthvalue ldexp le lerp lgamma log log10 log1p log2 logaddexp
    logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt
    masked_fill masked_scatter masked_select matmul matrix_exp max maximum mean median min minimum
    mm mode moveaxis movedim msort mul multinomial mv nan_to_num nanmean nansum narrow ne neg
    new_empty new_full new_ones new_zeros nextafter nonzero normal not_equal permute pow prod put
    quantile rad2deg random ravel reciprocal relu remainder renorm repeat repeat_interleave reshape
    reshape_as roll rot90 round rsqrt scatter scatter_add scatter_reduce select select_scatter sgn
    sigmoid sign sin sinc sinh slice_scatter softmax sort sqrt square squeeze std sub subtract sum
    swapaxes swapdims t take take_along_dim tan tanh tensor_split tile topk trace transpose tril
    triu true_divide trunc type_as unbind unflatten unfold uniform unsqueeze var vdot view view_as
    vsplit hsplit xlogy zero
"""
METHODS = frozenset(_METHODS.split())
