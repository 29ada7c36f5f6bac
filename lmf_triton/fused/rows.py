"""Device functions of rows: which rows a program has, their summaries and coefficients, and the tiles of their logits.

Numerics: every reduction runs over the classes other than the target ("the others"), and every exponent is a
difference to their largest logit. So neither 1 - p nor -log(p) is ever formed by a subtraction.

Fields of these tuples have one value a row; a ``Summary`` may also be that of parts of rows, along axis 1. A field for
exponentials that the loss does not need is 0, and nothing is compiled for it.

Two constexprs say what is compiled: FORM, a ``Form``, and RULE, the ``Rule`` of the reduction (reduction.py).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .math import fast_exp, focal_term, ldam_term


class Form(NamedTuple):
    """Which terms the loss has, and which exponentials of the others they need."""

    has_ldam: bool  # alpha != 0
    has_focal: bool  # beta != 0
    plain: bool  # exp(x): for focal loss, and for LDAM if scale is 1
    scaled: bool  # exp(scale * x): for LDAM if scale is not 1


class Rows(NamedTuple):
    """The samples of one program: BLOCK_ROWS rows of one group."""

    group: tl.tensor  # a scalar
    index: tl.tensor  # of the row in its group
    exists: tl.tensor
    target: tl.tensor  # class, int32
    kept: tl.tensor  # it exists, and has a target in range that is not to be ignored
    out_of_range: tl.tensor  # its target is no class, nor to be ignored


class Summary(NamedTuple):
    """All that the loss needs of the others, apart from x_y. Without any others it is (-inf, 0, 0)."""

    max: tl.tensor
    plain: tl.tensor  # sum of exp(x_j - max)
    scaled: tl.tensor  # sum of exp(scale * (x_j - max))


class Terms(NamedTuple):
    """LDAM and focal loss of rows, with coefficient and weight; and their slopes, divided by the denominators too.

    A slope is the derivative of a term in its own gap.
    """

    ldam: tl.tensor
    ldam_slope: tl.tensor
    focal: tl.tensor
    focal_slope: tl.tensor


class Coefs(NamedTuple):
    """From which the gradient of a row follows.

    It is -slope for the target, and plain * exp(x_j - max) + scaled * exp(scale * (x_j - max)) for another class.
    """

    max: tl.tensor  # finite
    plain: tl.tensor
    scaled: tl.tensor
    slope: tl.tensor


class Denominators(NamedTuple):
    """What the losses and gradients of the two terms are divided by; scalars."""

    ldam: tl.tensor
    focal: tl.tensor


N_COEFS = tl.constexpr(len(Coefs._fields))


@triton.jit
def load_rows(
    block, target_ptr, stride_group, stride_row, n_rows, n_classes, ignore_index, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """The rows of a block, where blocks are counted through one group after the other."""
    row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
    group = (block // row_blocks).to(tl.int64)
    index = (block % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = index < n_rows
    target_ptrs = target_ptr + group * stride_group + index * stride_row
    target, kept, out_of_range = load_target(target_ptrs, exists, n_classes, ignore_index)
    return Rows(group, index, exists, target, kept, out_of_range)


@triton.jit
def load_target(target_ptrs, exists, n_classes, ignore_index):
    """Class of each row, whether the row takes part in the loss, and whether its class is out of range."""
    # Compared in int64 whatever is stored, so that no value of a narrow or wide type is mistaken for another.
    target = tl.load(target_ptrs, mask=exists, other=0).to(tl.int64)
    considered = exists & (target != ignore_index)
    in_range = (target >= 0) & (target < n_classes)
    return target.to(tl.int32), considered & in_range, considered & (in_range == 0)


@triton.jit
def load_weight(weight_ptr, target, kept, dtype: tl.constexpr):
    """The weight of each row, 0 where it does not take part."""
    if weight_ptr is None:
        return kept.to(dtype)
    else:
        return tl.load(weight_ptr + target, mask=kept, other=0.0).to(dtype)


@triton.jit
def offsets(rows, stride_group, stride_row):
    """Where each row starts in a tensor with these strides."""
    return rows.group * stride_group + rows.index * stride_row


@triton.jit
def tile_ptrs(row_ptrs, offs_c, stride_class):
    """Pointers to a tile: rows by classes."""
    return row_ptrs[:, None] + offs_c[None, :].to(tl.int64) * stride_class


@triton.jit
def tile_mask(exists, offs_c, n_classes):
    """What of a tile is in the tensor."""
    return exists[:, None] & (offs_c < n_classes)[None, :]


@triton.jit
def load_others(row_ptrs, offs_c, stride_class, rows, n_classes, dtype: tl.constexpr, EVICTION: tl.constexpr):
    """A tile of logits, -inf at the target, in rows that do not take part, and outside the tensor."""
    # Not masked by kept: a mask that depends on data would break up the wide loads of class-strided tiles.
    x = tl.load(
        tile_ptrs(row_ptrs, offs_c, stride_class),
        mask=tile_mask(rows.exists, offs_c, n_classes),
        other=-float("inf"),
        eviction_policy=EVICTION,
    ).to(dtype)
    return tl.where(rows.kept[:, None] & (offs_c[None, :] != rows.target[:, None]), x, -float("inf"))


@triton.jit
def summarise_tile(others, FORM: tl.constexpr):
    """The summary of each element of a tile: relative to itself, its exponential is 1."""
    return Summary(others, 1.0 if FORM.plain else 0.0, 1.0 if FORM.scaled else 0.0)


@triton.jit
def summarise_loop(
    row_ptrs,
    stride_class,
    first_block,
    rows,
    n_classes,
    scale,
    dtype: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    CLASS_BLOCKS: tl.constexpr,
):
    """The summary of each lane: of the classes of CLASS_BLOCKS blocks that pass through it."""
    zeros = tl.zeros([BLOCK_ROWS, BLOCK_CLASSES], dtype)
    lanes = Summary(zeros - float("inf"), zeros, zeros)
    for block in range(CLASS_BLOCKS):
        offs_c = (first_block + block) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        # They are read once more, for the gradient.
        others = load_others(row_ptrs, offs_c, stride_class, rows, n_classes, dtype, EVICTION="evict_last")
        lanes = add_class(lanes, others, scale, FORM)
    return lanes


@triton.jit
def add_class(lanes, x, scale, FORM: tl.constexpr):
    """The summary of each lane with one more class, whose logit is x."""
    rise = x - lanes.max
    is_empty = x == -float("inf")
    plain = online_sum(lanes.plain, rise, is_empty) if FORM.plain else lanes.plain
    scaled = online_sum(lanes.scaled, scale * rise, is_empty) if FORM.scaled else lanes.scaled
    return Summary(tl.maximum(lanes.max, x), plain, scaled)


@triton.jit
def online_sum(total, rise, is_empty):
    """One step of sum(exp(x - max)), given by how much the new x is above the maximum so far."""
    e = tl.exp(-tl.abs(rise))  # with fast_exp triton 3.9 spills here on sm_100
    return tl.where(is_empty, total, tl.where(rise > 0, total * e + 1.0, total + e))


@triton.jit
def load_summaries(summaries_ptr, rows, n_rows, n_parts, BLOCK_PARTS: tl.constexpr):
    """The summaries that summarise_kernel has stored, of each part of each row."""
    parts = tl.arange(0, BLOCK_PARTS)
    ptrs = summaries_ptr + (rows.index * n_parts)[:, None] + parts[None, :]
    stride_field = n_rows * n_parts
    exists = tile_mask(rows.exists, parts, n_parts)
    return Summary(
        tl.load(ptrs, mask=exists, other=-float("inf")),
        tl.load(ptrs + stride_field, mask=exists, other=0.0),
        tl.load(ptrs + 2 * stride_field, mask=exists, other=0.0),
    )


@triton.jit
def store_summary(summaries_ptr, summary, part, rows, n_rows, n_parts):
    """One part's summary of each row, where load_summaries looks for it."""
    ptrs = summaries_ptr + rows.index * n_parts + part
    stride_field = n_rows * n_parts
    tl.store(ptrs, summary.max, mask=rows.exists)
    tl.store(ptrs + stride_field, summary.plain, mask=rows.exists)
    tl.store(ptrs + 2 * stride_field, summary.scaled, mask=rows.exists)


@triton.jit
def combine(parts, scale, FORM: tl.constexpr):
    """The summary of each row from those of its parts along axis 1: single classes, lanes, or programs' parts."""
    m = tl.max(parts.max, axis=1)
    exponents = parts.max - origin(m)[:, None]
    zero = tl.zeros(m.shape, m.dtype)
    plain = tl.sum(parts.plain * fast_exp(exponents), axis=1) if FORM.plain else zero
    scaled = tl.sum(parts.scaled * fast_exp(scale * exponents), axis=1) if FORM.scaled else zero
    return Summary(m, plain, scaled)


@triton.jit
def origin(m):
    """What the exponents of a summary with maximum m are relative to: m, or 0 where there are no others."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def redistribute(per_row, BLOCK_ROWS: tl.constexpr):
    """The same values, one a row, in whatever layout suits what follows: a gather may change it, at its price.

    Without it the compiler computes the loss of a row once in every lane that has a part of the row.
    """
    if BLOCK_ROWS > 1:
        return tl.gather(per_row, tl.arange(0, BLOCK_ROWS), 0)
    else:
        return per_row


@triton.jit
def redistribute_summary(summary, BLOCK_ROWS: tl.constexpr):
    """The same summary for the work of one value a row."""
    return Summary(
        redistribute(summary.max, BLOCK_ROWS),
        redistribute(summary.plain, BLOCK_ROWS),
        redistribute(summary.scaled, BLOCK_ROWS),
    )


@triton.jit
def redistribute_coefs(coefs, m, BLOCK_ROWS: tl.constexpr):
    """The same coefficients for the work on a tile, with the maximum as the tile has it.

    With another copy of the maximum the compiler would not see that the tile's exponentials are at hand already.
    """
    return Coefs(
        origin(m),
        redistribute(coefs.plain, BLOCK_ROWS),
        redistribute(coefs.scaled, BLOCK_ROWS),
        redistribute(coefs.slope, BLOCK_ROWS),
    )


@triton.jit
def terms_and_slopes(
    summary, x_y, margins_ptr, rows, weight, denominators, alpha, beta, gamma, scale, FORM: tl.constexpr
):  # fmt: skip
    """Both terms and their slopes, from the gap between the others and the target.

    Without others (C = 1, or all at -inf) the gap is -inf. It is NaN where the target is no class, and where x_y is
    infinite and has no softmax. Rows that do not take part are exactly 0, whatever their logits and the denominators.

    The options are no tuple: for float64 logits they are constexprs, which a tuple would round to float32.
    """
    # Told by a sum, since a maximum overlooks NaN.
    no_others = (summary.plain if FORM.plain else summary.scaled) == 0
    plain_sum = tl.where(no_others, 1.0, summary.plain)  # log(1), not log(0): no other value, but fewer registers
    scaled_sum = tl.where(no_others, 1.0, summary.scaled)
    # The maximum that the gradient has: a second copy of it would spill.
    gap = tl.where(no_others, -float("inf"), origin(summary.max)) - x_y
    gap = tl.where(rows.out_of_range | (x_y == float("inf")), float("nan"), gap)
    active = rows.kept | rows.out_of_range
    zero = tl.zeros(gap.shape, gap.dtype)
    ldam, ldam_slope, focal, focal_slope = zero, zero, zero, zero
    # One term is weighted before the other begins: fewer values are under way.
    if FORM.has_focal:
        value, slope = focal_term(gap + tl.log(plain_sum), gamma)
        focal = tl.where(active, beta * (weight * value), 0.0)
        focal_slope = tl.where(active, beta * (weight / denominators.focal * slope), 0.0)
    if FORM.has_ldam:
        if margins_ptr is not None:
            gap += tl.load(margins_ptr + rows.target, mask=rows.kept, other=0.0).to(gap.dtype)
        v = scale * gap + tl.log(scaled_sum) if FORM.scaled else gap + tl.log(plain_sum)
        value, slope = ldam_term(v)
        ldam = tl.where(active, alpha * (weight * value), 0.0)
        ldam_slope = tl.where(active, alpha * (weight / denominators.ldam * slope), 0.0)
    return Terms(ldam, ldam_slope, focal, focal_slope)


@triton.jit
def load_denominators(totals_ptr, weight, kept, N_TOTALS: tl.constexpr, RULE: tl.constexpr):
    """What the loss and gradient of each term are divided by, see reduction.py: 1 unless they are means.

    From totals_kernel's partial sums; without them, from the rows of this program, which then has them all.
    """
    weight_total = tl.full([], 1.0, weight.dtype)
    count = weight_total
    if RULE.is_mean and totals_ptr is None:
        weight_total = tl.sum(weight)
        count = tl.sum(kept.to(weight.dtype))
    elif RULE.is_mean:
        offs = tl.arange(0, N_TOTALS)
        weight_total = tl.sum(tl.load(totals_ptr + offs))
        count = tl.sum(tl.load(totals_ptr + N_TOTALS + offs))
    return Denominators(weight_total, count if RULE.focal_by_count else weight_total)


@triton.jit
def coefs_of(summary, terms, scale, FORM: tl.constexpr):
    """The coefficients of each row's gradient."""
    plain = terms.focal_slope
    scaled = tl.zeros(plain.shape, plain.dtype)
    if FORM.scaled:
        scaled = scale * terms.ldam_slope
    else:
        plain += terms.ldam_slope
    # The largest other's exponential is 1: a sum is less only where there are no others, and its slope is 0.
    plain_coef = plain / tl.maximum(summary.plain, 1.0)
    scaled_coef = scaled / tl.maximum(summary.scaled, 1.0)
    return Coefs(origin(summary.max), plain_coef, scaled_coef, plain + scaled)


@triton.jit
def sum_of_rows(terms, denominators, FORM: tl.constexpr, RULE: tl.constexpr):
    """The share of these rows in a sum or mean, divided once, after the sum.

    A term that is absent has no say in it, not even by a denominator of 0.
    """
    loss = tl.zeros([], terms.ldam.dtype)
    if not RULE.is_mean:
        loss += tl.sum(terms.ldam + terms.focal)
    elif not RULE.focal_by_count:
        loss += tl.sum(terms.ldam + terms.focal) / denominators.ldam
    else:
        if FORM.has_ldam:
            loss += tl.sum(terms.ldam) / denominators.ldam
        if FORM.has_focal:
            loss += tl.sum(terms.focal) / denominators.focal
    return loss


@triton.jit
def store_coefs(row_ptrs, coefs, exists):
    """The coefficients of each row, side by side."""
    tl.store(row_ptrs, coefs.max, mask=exists)
    tl.store(row_ptrs + 1, coefs.plain, mask=exists)
    tl.store(row_ptrs + 2, coefs.scaled, mask=exists)
    tl.store(row_ptrs + 3, coefs.slope, mask=exists)


@triton.jit
def load_coefs(row_ptrs, upstream, exists):
    """The coefficients of each row, times its upstream gradient."""
    return Coefs(
        tl.load(row_ptrs, mask=exists, other=0.0),
        upstream * tl.load(row_ptrs + 1, mask=exists, other=0.0),
        upstream * tl.load(row_ptrs + 2, mask=exists, other=0.0),
        upstream * tl.load(row_ptrs + 3, mask=exists, other=0.0),
    )


@triton.jit
def gradient(others, offs_c, target, coefs, scale, FORM: tl.constexpr):
    """A tile of the gradient. Where the tile's exponentials are at hand already, the compiler reuses them."""
    exponents = others - coefs.max[:, None]
    grad = tl.zeros(exponents.shape, exponents.dtype)
    if FORM.plain:
        grad += coefs.plain[:, None] * fast_exp(exponents)
    if FORM.scaled:
        grad += coefs.scaled[:, None] * fast_exp(scale * exponents)
    return tl.where(offs_c[None, :] == target[:, None], -coefs.slope[:, None], grad)


@triton.jit
def store_gradient(row_ptrs, offs_c, stride_class, exists, n_classes, grad, EVICTION: tl.constexpr):
    """A tile of the gradient, rounded to the dtype in which it is kept."""
    tl.store(
        tile_ptrs(row_ptrs, offs_c, stride_class),
        grad.to(row_ptrs.dtype.element_ty),
        mask=tile_mask(exists, offs_c, n_classes),
        eviction_policy=EVICTION,
    )
