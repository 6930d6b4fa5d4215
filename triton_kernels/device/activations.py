"""Activations and their derivatives: one branch for each name of `resnet_fused.spec.activations.KINDS`.

Values and derivatives are PyTorch's, at the kinks too, and NaN passes. `slope` is leaky_relu's constant or prelu's
learned value; the others ignore it. Where a derivative takes only two values, the derivative at the output equals the
derivative at the input, so `derivative` accepts either.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(v, slope, KIND: tl.constexpr):
    """act(v) of float32 [rows, N]; slope: a number or [1, N]."""
    if KIND == "identity":
        return v
    elif KIND == "relu":
        return tl.where(v <= 0, 0.0, v)
    elif KIND == "relu6":
        return relu6(v)
    elif KIND == "leaky_relu" or KIND == "prelu":
        return tl.where(v > 0, v, v * slope)
    elif KIND == "silu":
        return v * tl.sigmoid(v)
    elif KIND == "hardswish":
        return v * relu6(v + 3.0) / 6.0
    elif KIND == "hardsigmoid":
        return relu6(v + 3.0) / 6.0
    elif KIND == "gelu":
        return v * normal_distribution(v)
    elif KIND == "gelu_tanh":
        return v * tl.sigmoid(twice_u(v))
    else:
        tl.static_assert(False, "an activation without a branch in activate")


@triton.jit
def derivative(v, slope, KIND: tl.constexpr):
    """act'(v) of float32 [rows, N]; slope: a number or [1, N]."""
    if KIND == "identity":
        return tl.full(v.shape, 1.0, tl.float32)
    elif KIND == "relu":
        return tl.where(v <= 0, 0.0, 1.0)
    elif KIND == "relu6":
        return tl.where((v <= 0) | (v >= 6), 0.0, 1.0)
    elif KIND == "leaky_relu" or KIND == "prelu":
        return tl.where(v > 0, 1.0, slope)
    elif KIND == "silu":
        e = tl.exp(-tl.abs(v))
        r = 1.0 / (1.0 + e)
        return tl.where(v > 0, r, e * r) + v * (e * r * r)
    elif KIND == "hardswish":
        return tl.where(v <= -3, 0.0, tl.where(v < 3, v / 3.0 + 0.5, 1.0))
    elif KIND == "hardsigmoid":
        return tl.where((v > -3) & (v < 3), 1.0 / 6.0, 0.0)
    elif KIND == "gelu":
        return normal_distribution(v) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    elif KIND == "gelu_tanh":
        # s (1 - s), the same for t and -t, without the difference: 1 - s has few digits where s is nearly 1
        t = twice_u(v)
        e = tl.exp(-tl.abs(t))
        r = 1.0 / (1.0 + e)
        s = tl.where(t > 0, r, e * r)
        return s + v * (e * r * r) * 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    else:
        tl.static_assert(False, "an activation without a branch in derivative")


@triton.jit
def pass_back(dv, v, slope, KIND: tl.constexpr):
    """dv * act'(v). ReLU selects instead of multiplying: where it masks, gradients that are not finite become 0 too."""
    if KIND == "relu":
        return tl.where(v <= 0, 0.0, dv)
    else:
        return dv * derivative(v, slope, KIND)


@triton.jit
def relu6(v):
    low = tl.where(v <= 0, 0.0, v)
    return tl.where(low > 6, 6.0, low)


@triton.jit
def normal_distribution(v):
    """The normal distribution function at v; GELU is v times it (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def twice_u(v):
    """0.5 (1 + tanh(u)) = sigmoid(2 u), u being GELU's approximation."""
    return 1.5957691216057308 * (v + 0.044715 * v * v * v)
