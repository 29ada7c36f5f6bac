"""Device functions of numbers: exponentials and logarithms, softplus and sigmoid, the two terms and their slopes.

Each works on scalars and tensors of any shape, float32 or float64.
"""

import triton
import triton.language as tl

# Stands for infinity where inf would meet a factor 0: 0 * inf is NaN, 0 * BIG is 0. A constant that float32 holds.
BIG = tl.constexpr(1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def fast_exp(x):
    """exp for a whole tile: one multiplication and one instruction. Results below 2^-126 may be flushed to 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def log1p(t):
    """log(1 + t) for t in [0, 1], to 3 units of 2^-24 in float32 (log itself, by the other branch: 5)."""
    if t.dtype == tl.float32:
        # log(1 + t) / t, interpolated at the ten Chebyshev nodes of [0, 1]: a quarter of the instructions of a log.
        p = 0.019542526 - 0.003176057 * t
        p = p * t - 0.05637361
        p = p * t + 0.105436236
        p = p * t - 0.15269667
        p = p * t + 0.19663274
        p = p * t - 0.24951616
        p = p * t + 0.3332971
        p = p * t - 0.49999893
        return (p * t + 1.0) * t
    else:
        # The rounding error of w = 1 + t cancels in log(w) / (w - 1).
        w = 1.0 + t
        lost = w == 1.0
        return tl.where(lost, t, tl.log(w) * (t / tl.where(lost, 1.0, w - 1.0)))


@triton.jit
def neg_log1m(p):
    """-log(1 - p) for p in [0, 1/2], to 3 units of 2^-24 in float32."""
    if p.dtype == tl.float32:
        # Divided by p, interpolated at the nine Chebyshev nodes of [0, 1/2].
        q = 1.4079567 * p - 1.6302117
        q = q * p + 1.2050139
        q = q * p - 0.18157165
        q = q * p + 0.2645476
        q = q * p + 0.24343744
        q = q * p + 0.333662
        q = q * p + 0.49999374
        return (q * p + 1.0) * p
    else:
        return -tl.log(1.0 - p)


@triton.jit
def softplus_and_ratio(z):
    """softplus(z), and sigmoid(z) as a numerator and a denominator, for a whole tile."""
    t = fast_exp(-tl.abs(z))
    return tl.maximum(z, 0.0) + log1p(t), tl.where(z >= 0, 1.0, t), 1.0 + t


@triton.jit
def softplus_and_sigmoid(z):
    """softplus(z), softplus(-z), sigmoid(z) and sigmoid(-z) from one exponential that cannot overflow."""
    t = tl.exp(-tl.abs(z))
    log1p_t = log1p(t)
    larger = 1.0 / (1.0 + t)
    smaller = t * larger
    return (
        tl.maximum(z, 0.0) + log1p_t,
        tl.maximum(-z, 0.0) + log1p_t,
        tl.where(z >= 0, larger, smaller),
        tl.where(z >= 0, smaller, larger),
    )


@triton.jit
def ldam_term(v):
    """LDAM from the gap v of scaled logits, the margin included; and its slope, the derivative in v."""
    nll, _, slope, _ = softplus_and_sigmoid(v)
    return nll, slope


@triton.jit
def focal_term(u, gamma):
    """Focal loss from the gap u = logsumexp(others) - x_y; and its slope, the derivative in u."""
    u = tl.where(u < -BIG, -BIG, u)  # gamma = 0 at u = -inf: exp(-0 * inf) would be NaN
    nll, neg_log_q, q, p = softplus_and_sigmoid(u)  # -log p_y, -log(1 - p_y), 1 - p_y, p_y
    factor = tl.exp(-gamma * neg_log_q)
    p_nll = p * tl.where(nll > BIG, BIG, nll)  # tends to 0 as u grows: 0 * inf would be NaN
    return factor * nll, factor * (gamma * p_nll + q)
