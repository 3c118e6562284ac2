"""The device functions of ``csrc/math`` in Triton, name for name: one block of fp32 values in, one block out.

Every operation is IEEE and correctly rounded (``div_rn``, ``sqrt_rn``, and no contraction in kernels launched with
``EXACT``), so quantized codes agree bit for bit with the C++ kernels and with ``reference``.

A grid is four values: its hull ``lo``, ``hi`` in grid units, and for a codebook ``levels`` (pointer to ascending
float32 levels) with the compile-time ``N_LEVELS``; ``KIND`` is compile-time as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl

from .. import contract

FLOAT = tl.constexpr(contract.FLOAT)
UNIFORM = tl.constexpr(contract.UNIFORM)
BINARY = tl.constexpr(contract.BINARY)
CODEBOOK = tl.constexpr(contract.CODEBOOK)
LEAST_RATE = tl.constexpr(contract.LEAST_RATE)

# Launch options of every kernel but the packed products, whose sums have a bound and no fixed bits. A fused
# multiply-add would round once where the CPU and the reference round twice.
EXACT = {"enable_fp_fusion": False}

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---- scalar.inl ---------------------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's own ``/`` is approximate on the GPU."""
    return tl.div_rn(a, b)


@triton.jit
def root(a):
    """sqrt(a), correctly rounded."""
    return tl.sqrt_rn(a)


@triton.jit
def negate_where_negative(a, by):
    return tl.where(by < 0.0, 0.0 - a, a)


@triton.jit
def round_even(a):
    """Nearest integer, ties to even, for |a| <= 2^22; never -0."""
    return (a + 12582912.0) - 12582912.0  # 1.5 * 2^23: the spacing of floats is 1 there


@triton.jit
def read_scalar(x):
    """A 0-dim argument as float32: passed by value, or as a pointer, so that the host never waits."""
    if isinstance(x, tl.tensor) and x.dtype.is_ptr():  # in the interpreter a number is Python's own
        return tl.load(x).to(tl.float32)
    else:
        return tl.cast(x, tl.float32)


@triton.jit
def widen(x):
    """A storage type to float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:  # the interpreter's own conversion loses denormals
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 to its storage type, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # the interpreter's own conversion truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + (0x7FFF + ((bits >> 16) & 1)), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def narrow_e4m3(x):
    """float32 to the bits of float8 e4m3fn as uint8, to nearest even, what is larger than 448 to 448; NaN is 0x7f."""
    bits = x.to(tl.uint32, bitcast=True)
    a = bits & 0x7FFFFFFF
    normal = (a - 0x3C000000 + 0x7FFFF + ((a >> 20) & 1)) >> 20
    # the adder rounds to multiples of 2^-9
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(a < 0x3C800000, small, normal)
    code = tl.where(a > 0x43E00000, 0x7E, code)
    return tl.where(x == x, code | ((bits >> 24) & 0x80), 0x7F).to(tl.uint8)


@triton.jit
def widen_e4m3(code):
    """The bits of e4m3fn as float32: in the place of float32's they count 2^120 less."""
    code = code.to(tl.uint32)
    x = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where((code & 0x7F) == 0x7F, float("nan"), x)


@triton.jit
def narrow_level(c, DTYPE: tl.constexpr):
    """A level, or any number, in a type of levels (``LEVELS``); int8 has 0 in NaN's place and takes integers."""
    if DTYPE == tl.int8:
        return tl.where(c == c, c, 0.0).to(tl.int8)
    elif DTYPE == tl.float8e4nv:  # which processors before compute capability 8.9 do not know
        return c.to(tl.float8e4nv)
    else:
        return narrow_e4m3(c)


# ---- grid.inl -----------------------------------------------------------------------------------------------------


@triton.jit
def hull(lo, hi, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """(low, high) in grid units, as float32."""
    if KIND == CODEBOOK:
        return tl.load(levels), tl.load(levels + (N_LEVELS - 1))
    else:
        return tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)


@triton.jit
def clamp_between(x, lo, hi):
    """x moved into [lo, hi]; NaN stays NaN (``tl.clamp`` would lose it)."""
    x = tl.where(x > hi, hi, x)
    return tl.where(lo > x, lo, x)


@triton.jit
def in_hull(w, scale, lo, hi):
    """x = w / s moved into the hull."""
    return clamp_between(divide(w, scale), lo, hi)


@triton.jit
def nearest(x, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """Q(x) for x in the hull: ties to even (uniform) or to the lower level (binary, codebook); NaN stays NaN."""
    if KIND == UNIFORM:
        return round_even(x)
    elif KIND == BINARY:
        return tl.where(x > 0.0, 1.0, tl.where(x == x, -1.0, x))
    else:
        below = tl.load(levels)
        r = tl.zeros_like(x) + below
        for k in range(1, N_LEVELS):
            level = tl.load(levels + k)
            r = tl.where(x > 0.5 * below + 0.5 * level, level, r)
            below = level
        return tl.where(x == x, r, x)


@triton.jit
def offset(x, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """How far x, in the hull, stands from its nearest level: (near, far, distance, u, delta).

    near, far: the bracket's two ends, near as Q(x), but of an exact midpoint the lower one; distance = x - near;
    delta: the bracket's length; u = |distance| / delta, in [0, 1/2].
    """
    if KIND == UNIFORM:
        near = round_even(x)
        distance = x - near  # exact
        delta = tl.full(x.shape, 1.0, tl.float32)
        up = tl.where(distance == -0.5, delta, 0.0)  # the midpoint that was rounded up
        near = near - up
        distance = distance + up
        far = near + negate_where_negative(delta, distance)
        u = tl.abs(distance)
    elif KIND == BINARY:
        near = nearest(x, levels, KIND, N_LEVELS)
        distance = x - near
        delta = tl.full(x.shape, 2.0, tl.float32)
        far = 0.0 - near
        u = tl.abs(distance) * 0.5
    else:
        below = tl.zeros_like(x) + tl.load(levels)
        above = tl.zeros_like(x) + tl.load(levels + 1)
        for k in range(1, N_LEVELS - 1):  # the last level opens no bracket
            level = tl.load(levels + k)
            below = tl.where(x >= level, level, below)
            above = tl.where(x >= level, tl.load(levels + k + 1), above)
        upper = x > 0.5 * below + 0.5 * above
        near = tl.where(upper, above, below)
        far = tl.where(upper, below, above)
        distance = x - near
        delta = above - below
        u = divide(tl.abs(distance), delta)
        u = tl.where(u > 0.5, 0.5, u)
        near = tl.where(x == x, near, x)
    return near, far, distance, u, delta


@triton.jit
def nearest_level(w, scale, lo, hi, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """Q(w / s) for any w: +-inf gives an end, NaN stays NaN."""
    return nearest(in_hull(w, scale, lo, hi), levels, KIND, N_LEVELS)


@triton.jit
def quantize_dequantize(w, scale, lo, hi, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """y = s Q(w / s)."""
    return scale * nearest_level(w, scale, lo, hi, levels, KIND, N_LEVELS)


@triton.jit
def clamp_hull(w, scale, lo, hi):
    """w moved into the hull [s c_0, s c_(K-1)]; NaN stays NaN."""
    return clamp_between(w, scale * lo, scale * hi)


@triton.jit
def pass_inside(gradient, w, low, high):
    """gradient where low <= w <= high (and where w is NaN), 0 elsewhere; the ends in weight units, as w is stored."""
    return tl.where((w < low) | (w > high), 0.0, gradient)


# ---- constraint.inl -----------------------------------------------------------------------------------------------


@triton.jit
def feasible_radius(eps):
    """r / Delta = (1 - sqrt(1 - sqrt(eps))) / 2, without its cancellation."""
    q = root(eps)
    return divide(0.5 * q, 1.0 + root(1.0 - q))


@triton.jit
def project_interval(w, scale, radius, lo, hi, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """Clamp to the hull, then to the nearest feasible point; an exact midpoint goes to the lower side."""
    w = clamp_hull(w, scale, lo, hi)
    near, _, distance, u, delta = offset(in_hull(w, scale, lo, hi), levels, KIND, N_LEVELS)
    return tl.where(u > radius, scale * (near + negate_where_negative(radius * delta, distance)), w)


@triton.jit
def soften(w, scale, slack, lo, hi, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """Between a weight (slack 1) and its level (slack 0)."""
    placed = clamp_hull(w, scale, lo, hi)
    near, _, distance, u, delta = offset(in_hull(w, scale, lo, hi), levels, KIND, N_LEVELS)
    over = u - 0.5 * (1.0 - slack)
    reach = divide(1.0, slack) * tl.where(over > 0.0, over, 0.0) * delta
    return scale * (near + negate_where_negative(reach, distance)) + slack * (w - placed)


@triton.jit
def cap_of(lr):
    """1 / (4 max(lr, LEAST_RATE)): finite, since lr kappa would be 0 inf otherwise."""
    return divide(1.0, 4.0 * tl.where(lr > LEAST_RATE, lr, LEAST_RATE))


@triton.jit
def push_of(u, delta, scale, eps, alpha, cap):
    """What the constraint asks of a weight, whatever its gradient is: (kappa, -h / 16).

    With q = u (1 - u), h = eps - 16 q^2, |h'| = (32 / Delta) q (1 - 2u): kappa = min(alpha (-h) / |h'|, Delta cap) is
    the slowest allowed velocity towards the nearest level, -inf where the weight is free (h >= 0 or a midpoint);
    cap = ``cap_of(lr)``.
    """
    q = u - u * u
    to_middle = 0.5 - u
    excess = q * q - tl.where(eps < 1.0, 0.0625 * eps, float("inf"))  # at eps = 1 all is feasible
    pushed = (excess > 0.0) & (to_middle > 0.0)
    length = scale * delta
    # selected before the division, which is slow where it is by 0
    kappa = divide(tl.where(pushed, excess * (length * (0.25 * alpha)), 1.0), tl.where(pushed, q * to_middle, 1.0))
    limit = length * cap
    kappa = tl.where(kappa < limit, kappa, limit)
    return tl.where(pushed, kappa, float("-inf")), excess


@triton.jit
def skew(g, kappa, distance):
    """The skewed velocity v = side * max(kappa, side * d), side = towards the nearest level, signed as a gradient.

    That is -v from g = -d; g itself where the weight is free. A NaN in g survives.
    """
    towards = negate_where_negative(g, distance)
    return negate_where_negative(tl.where(kappa > towards, kappa, towards), distance)


# ---- update.inl ---------------------------------------------------------------------------------------------------
#
# A rule is its descent, a device function (g, w, state, constants) -> (what the base optimizer subtracts from w, over
# lr; new state), and the constants that it takes: numbers, None where a term is to be left out at compile time.


@triton.jit
def sgd_descent(g, w, state, constants):
    """``torch.optim.SGD``; state: the momentum buffer, or nothing."""
    momentum, one_minus_dampening, weight_decay, nesterov = constants
    if weight_decay is not None:
        g = g + weight_decay * w
    if len(state) > 0:
        buffer = momentum * state[0] + one_minus_dampening * g
        state = (buffer,)
        if nesterov is not None:
            g = g + momentum * buffer
        else:
            g = buffer
    return g, state


def sgd_constants(corrections, momentum, dampening, weight_decay, nesterov):
    return momentum, 1 - dampening, weight_decay or None, nesterov or None


@triton.jit
def adamw_descent(g, w, state, constants):
    """``torch.optim.AdamW``; state: first and second moment."""
    one_minus_beta1, beta2, one_minus_beta2, adam_eps, weight_decay, first_correction, root_second_correction = (
        constants
    )
    a, b = state
    a = a + one_minus_beta1 * (g - a)
    b = beta2 * b + one_minus_beta2 * (g * g)
    step = divide(a * read_scalar(first_correction), root(b) * read_scalar(root_second_correction) + adam_eps)
    if weight_decay is not None:
        step = step + weight_decay * w
    return step, (a, b)


def adamw_constants(corrections, beta1, beta2, adam_eps, weight_decay):
    return 1 - beta1, beta2, 1 - beta2, adam_eps, weight_decay or None, *corrections(beta1, beta2)


@triton.jit
def lion_descent(g, w, state, constants):
    """Lion (Chen et al., 2023); state: the moving average of gradients."""
    beta1, one_minus_beta1, beta2, one_minus_beta2, weight_decay = constants
    c = beta1 * state[0] + one_minus_beta1 * g
    step = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, tl.where(c == c, 0.0, c)))  # NaN stays NaN
    if weight_decay is not None:
        step = step + weight_decay * w
    return step, (beta2 * state[0] + one_minus_beta2 * g,)


def lion_constants(corrections, beta1, beta2, weight_decay):
    return beta1, 1 - beta1, beta2, 1 - beta2, weight_decay or None


class Rule(NamedTuple):
    descent: triton.JITFunction
    constants: Callable[..., tuple]  # of corrections(beta1, beta2) and the rule's numbers
    buffers: int
    optional: bool = False  # whether it does without its buffers


RULES = {
    "sgd": Rule(sgd_descent, sgd_constants, 1, optional=True),
    "adamw": Rule(adamw_descent, adamw_constants, 2),
    "lion": Rule(lion_descent, lion_constants, 1),
}


@triton.jit
def step_weight(
    w, g, state, scale, lo, hi, levels, lr, cap, eps, alpha, constants, KIND: tl.constexpr, N_LEVELS: tl.constexpr,
    DESCENT: tl.constexpr, DIRECTION: tl.constexpr, CLAMP: tl.constexpr, MAXIMIZE: tl.constexpr,
    CONSTRAINED: tl.constexpr,
):  # fmt: skip
    """One weight through one step: base direction, skew where ``CONSTRAINED`` (eps < 1), move, clamp.

    Returns (new w, new state, descent, -h / 16 where the step started).
    """
    inside = clamp_hull(w, scale, lo, hi)
    if CLAMP:
        w = inside
    if MAXIMIZE:
        g = 0.0 - g
    excess = tl.zeros_like(w)
    if CONSTRAINED:
        # Where in its bracket w stands is not a matter of the last bit; its level is, and is taken from the exact
        # quotient.
        x = inside * divide(1.0, scale)
        _, _, distance, u, delta = offset(x, levels, KIND, N_LEVELS)
        kappa, excess = push_of(u, delta, scale, eps, alpha, cap)
        if not DIRECTION:
            g = skew(g, kappa, distance)
    descent, state = DESCENT(g, w, state, constants)
    if CONSTRAINED and DIRECTION:
        descent = skew(descent, kappa, distance)
    w = w - lr * descent
    if CLAMP:
        w = clamp_hull(w, scale, lo, hi)
    return w, state, descent, excess


# ---- random.inl ---------------------------------------------------------------------------------------------------


@triton.jit
def philox(key0, key1, counter):
    """Philox4x32-10 (Salmon et al., SC 2011): the four words of each block; 64-bit counters, 64-bit key."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = key0.to(tl.uint32, bitcast=True)
    k1 = key1.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        n0 = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0
        n2 = tl.umulhi(c0, 0xD2511F53) ^ c3 ^ k1
        c1 = c2 * 0xCD9E8D57
        c3 = c0 * 0xD2511F53
        c0 = n0
        c2 = n2
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform01(bits):
    """Uniform in [0, 1), 24 bits."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def element_uniforms(key0, key1, start, BLOCK: tl.constexpr):
    """The uniforms of elements start ... start + BLOCK - 1; start is a multiple of 4: one Philox block for four."""
    counter = (start.to(tl.int64) >> 2) + tl.arange(0, BLOCK // 4)
    c0, c1, c2, c3 = philox(key0, key1, counter)
    return uniform01(tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3)))


@triton.jit
def luq_level(r, uniform):
    """Of r = |x| / alpha: below 1 stochastically 0 or 1; above, one of the two neighbouring powers of two."""
    bits = r.to(tl.int32, bitcast=True)
    power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = r >= 1.0
    low, high = tl.where(large, power, 0.0), tl.where(large, power + power, 1.0)
    return tl.where(uniform < tl.where(large, mantissa - 1.0, r), high, low)


@triton.jit
def stochastic_level(w, uniform, scale, lo, hi, levels, KIND: tl.constexpr, N_LEVELS: tl.constexpr):
    """The bracket's far end with probability u, else the nearest level: E[level] = w / s inside the hull."""
    near, far, _, u, _ = offset(in_hull(w, scale, lo, hi), levels, KIND, N_LEVELS)
    return tl.where(uniform < u, far, near)


# ---- sam.inl --------------------------------------------------------------------------------------------------------


@triton.jit
def sam_scaled(w, g, eta, ADAPTIVE: tl.constexpr):
    """T g with T = |w| + eta where adapted, else 1."""
    if ADAPTIVE:
        return (tl.abs(w) + eta) * g
    else:
        return g


@triton.jit
def sam_perturbed(w, g, eta, c, a, ADAPTIVE: tl.constexpr):
    """w + (c T^2 - a) g."""
    if ADAPTIVE:
        t = tl.abs(w) + eta
        return w + (c * (t * t) - a) * g
    else:
        return w + (c - a) * g


@triton.jit
def sam_mean(second, first):
    return 0.5 * (second + first)
