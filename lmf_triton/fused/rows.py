"""Device functions of rows: which rows a program has, their summaries and coefficients, and the tiles of their logits.

Numerics: every reduction runs over the classes other than the target ("the others"), and every exponent is a
difference to their largest logit. So neither 1 - p nor -log(p) is ever formed by a subtraction.

Fields of these tuples have one value a row. A ``Summary`` may also be that of parts of rows: its fields are then tuples
of tiles, or for the lanes of a loop one tile. A field for exponentials that the loss does not need is 0, and nothing is
compiled for it.

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
    first: tl.tensor  # of the rows in their group, a scalar
    exists: tl.tensor
    target: tl.tensor  # class, int32; -1 where the row does not take part
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
    block, target_ptr, stride_group, stride_row, n_rows, n_classes, ignore_index,
    ONE_GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr
):  # fmt: skip
    """The rows of a block, with their targets."""
    group, first, exists = place_rows(block, n_rows, ONE_GROUP, BLOCK_ROWS)
    target_ptrs = row_ptrs(target_ptr, group, first, stride_group, stride_row, BLOCK_ROWS)
    target, kept, out_of_range = load_target(target_ptrs, exists, n_classes, ignore_index)
    return Rows(group, first, exists, target, kept, out_of_range)


@triton.jit
def place_rows(block, n_rows, ONE_GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Group, first row and existing rows of a block, where blocks are counted through one group after the other."""
    group = tl.zeros([], tl.int64)
    if not ONE_GROUP:
        row_blocks = tl.cdiv(n_rows, BLOCK_ROWS)
        group += block // row_blocks
        block = block % row_blocks
    first = block.to(tl.int64) * BLOCK_ROWS
    return group, first, tl.arange(0, BLOCK_ROWS) < tl.minimum(n_rows - first, BLOCK_ROWS).to(tl.int32)


@triton.jit
def rows_of_probabilities(block, n_rows, ONE_GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The rows of a block, all of which take part in the loss, and none as one class."""
    group, first, exists = place_rows(block, n_rows, ONE_GROUP, BLOCK_ROWS)
    return Rows(group, first, exists, tl.full([BLOCK_ROWS], -1, tl.int32), exists, tl.zeros([BLOCK_ROWS], tl.int1))


@triton.jit
def row_ptrs(
    ptr, group, first, stride_group, stride_row, BLOCK_ROWS: tl.constexpr, UNIT: tl.constexpr = 1
):  # fmt: skip
    """Where each row starts in a tensor with strides in units of UNIT elements.

    The first row's address is made of scalars, which cost a thread nothing. Products are of 64 bits before they meet
    UNIT, since a stride in such units may be the one that fits 32.
    """
    first_row = UNIT * (group * stride_group + first * stride_row)
    return ptr + first_row + UNIT * (tl.arange(0, BLOCK_ROWS).to(tl.int64) * stride_row)


@triton.jit
def ptrs_of(rows, ptr, stride_group, stride_row, UNIT: tl.constexpr = 1):
    """Where each of these rows starts in a tensor."""
    return row_ptrs(ptr, rows.group, rows.first, stride_group, stride_row, rows.exists.shape[0], UNIT)


@triton.jit
def load_target(target_ptrs, exists, n_classes, ignore_index):
    """Class of each row, -1 if it does not take part in the loss; whether it does; whether its class is no class."""
    # Compared in int64 whatever is stored, so that no value of a narrow or wide type is mistaken for another.
    target = tl.load(target_ptrs, mask=exists, other=0).to(tl.int64)
    considered = exists & (target != ignore_index)
    in_range = (target >= 0) & (target < n_classes)
    kept = considered & in_range
    return tl.where(kept, target.to(tl.int32), -1), kept, considered & (in_range == 0)


@triton.jit
def load_weight(weight_ptr, target, kept, dtype: tl.constexpr):
    """The weight of each row, 0 where it does not take part."""
    if weight_ptr is None:
        return kept.to(dtype)
    else:
        return tl.load(weight_ptr + target, mask=kept, other=0.0).to(dtype)


@triton.jit
def tile_ptrs(row_ptrs, offs_c, stride_class):
    """Pointers to a tile: rows by classes."""
    return row_ptrs[:, None] + offs_c[None, :].to(tl.int64) * stride_class


@triton.jit
def tile_mask(exists, offs_c, n_classes):
    """What of a tile is in the tensor; n_classes is None where all of its classes are."""
    if n_classes is None:
        return exists[:, None]
    else:
        return exists[:, None] & (offs_c < n_classes)[None, :]


@triton.jit
def load_block(
    row_ptrs, first_class, stride_class, adjustment_ptr, rows, n_classes, dtype: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr, CLASS_TILES: tl.constexpr, WHOLE_TILES: tl.constexpr, VECTOR: tl.constexpr,
    EVICTION: tl.constexpr
):  # fmt: skip
    """The others of a block: its tiles, -inf at the targets and outside the tensor. The first WHOLE_TILES are in it."""
    TILE: tl.constexpr = BLOCK_CLASSES // CLASS_TILES
    loaded = ()
    for i in tl.static_range(CLASS_TILES):  # all of them are under way before the first waits for its target
        offs_c = first_class + i * TILE + tl.arange(0, TILE)
        x = tl.load(
            tile_ptrs(row_ptrs, offs_c, stride_class),
            mask=tile_mask(rows.exists, offs_c, None if i < WHOLE_TILES else n_classes),
            other=-float("inf"),
            eviction_policy=EVICTION,
        )
        loaded = loaded + (x,)
    others = ()
    for i in tl.static_range(CLASS_TILES):
        x = loaded[i].to(dtype)
        if adjustment_ptr is not None:
            offs_c = first_class + i * TILE + tl.arange(0, TILE)
            x += load_per_class(adjustment_ptr, offs_c, n_classes, 0.0, dtype)
        others = others + (without_target(x, rows, first_class + i * TILE, VECTOR),)
    return others


@triton.jit
def load_per_class(ptr, offs_c, n_classes, default, dtype: tl.constexpr):
    """A number for each class of a tile, the same in all rows."""
    if ptr is None:
        return tl.full([1, offs_c.shape[0]], default, dtype)
    else:
        return tl.load(ptr + offs_c, mask=offs_c < n_classes, other=default).to(dtype)[None, :]


@triton.jit
def load_target_logit(row_ptrs, stride_class, adjustment_ptr, rows, dtype: tl.constexpr):
    """The logit of each row's target, 0 where it takes no part."""
    x_y = tl.load(row_ptrs + rows.target.to(tl.int64) * stride_class, mask=rows.kept, other=0.0).to(dtype)
    if adjustment_ptr is not None:
        x_y += tl.load(adjustment_ptr + rows.target, mask=rows.kept, other=0.0).to(dtype)
    return x_y


@triton.constexpr_function
def vector_of(ptr, align):
    """Neighbouring classes that a thread loads at once: as many as 16 bytes hold, or as alignment allows."""
    return min(align, 128 // ptr.dtype.element_ty.primitive_bitwidth)


@triton.jit
def without_target(x, rows, first_class, VECTOR: tl.constexpr):
    """A tile of logits, -inf at the targets; in several rows also where these take no part."""
    if x.shape[0] == 1:
        return at_target(x, rows, first_class, -float("inf"), VECTOR)
    else:
        # Not the mask of the load: one that depends on data would break up the wide loads of class-strided tiles.
        is_other = tl.arange(0, x.shape[1])[None, :] != (rows.target - first_class)[:, None]
        return tl.where(rows.kept[:, None] & is_other, x, -float("inf"))


@triton.jit
def at_target(x, rows, first_class, value, VECTOR: tl.constexpr):
    """A tile with another value at the targets."""
    place = rows.target - first_class
    if x.shape[0] > 1:
        return tl.where(tl.arange(0, x.shape[1])[None, :] == place[:, None], value, x)
    else:
        # Most tiles of one row are without its target. In that which has it, vectors and places in a vector are
        # compared apart: a thread would keep the number of each of its classes in a register otherwise.
        if (scalar(place) >= 0) & (scalar(place) < x.shape[1]):
            here, there = tl.arange(0, x.shape[1])[None, :], place[:, None]
            is_target = ((here & -VECTOR) == (there & -VECTOR)) & ((here & VECTOR - 1) == (there & VECTOR - 1))
            x = tl.where(is_target, value, x)
        return x


@triton.jit
def scalar(per_row):
    """The value of the one row."""
    return tl.max(per_row, axis=0)


@triton.jit
def summarise_block(others, FORM: tl.constexpr):
    """The summary of each class of a block: relative to itself, its exponential is 1."""
    plain, scaled = (), ()
    for _ in tl.static_range(len(others)):
        plain = plain + (1.0 if FORM.plain else 0.0,)
        scaled = scaled + (1.0 if FORM.scaled else 0.0,)
    return Summary(others, plain, scaled)


@triton.jit
def summarise_loop(
    row_ptrs, stride_class, adjustment_ptr, first_block, rows, n_classes, scale, dtype: tl.constexpr,
    FORM: tl.constexpr, BLOCK_CLASSES: tl.constexpr, CLASS_TILES: tl.constexpr, CLASS_BLOCKS: tl.constexpr,
    VECTOR: tl.constexpr
):  # fmt: skip
    """The summary of each lane: of what passes through it of CLASS_BLOCKS blocks.

    In one row a lane takes the classes that a thread loads at once, so that these share what keeps its sums relative
    to the largest so far.
    """
    BLOCK_ROWS: tl.constexpr = rows.exists.shape[0]
    PER_LANE: tl.constexpr = VECTOR if BLOCK_ROWS == 1 else 1
    LANES: tl.constexpr = BLOCK_CLASSES // CLASS_TILES // PER_LANE
    zeros = tl.zeros([BLOCK_ROWS, LANES], dtype)
    lanes = Summary(zeros - float("inf"), zeros, zeros)
    for block in range(CLASS_BLOCKS):
        # They are read once more, for the gradient.
        others = load_block(
            row_ptrs, (first_block + block) * BLOCK_CLASSES, stride_class, adjustment_ptr, rows, n_classes, dtype,
            BLOCK_CLASSES, CLASS_TILES, WHOLE_TILES=0, VECTOR=VECTOR, EVICTION="evict_last",
        )  # fmt: skip
        lanes = add_block(lanes, others, scale, FORM, [BLOCK_ROWS, LANES, PER_LANE])
    return Summary((lanes.max,), (lanes.plain,), (lanes.scaled,))


@triton.jit
def add_block(lanes, others, scale, FORM: tl.constexpr, SHAPE: tl.constexpr):
    """The summaries of lanes with one more block; SHAPE is that of its tiles, cut up by lanes."""
    m = lanes.max
    for i in tl.static_range(len(others)):
        m = tl.maximum(m, tl.max(tl.reshape(others[i], SHAPE), axis=2))
    base = origin(m)
    plain = lanes.plain * fast_exp(lanes.max - base) if FORM.plain else lanes.plain
    scaled = lanes.scaled * fast_exp(scale * (lanes.max - base)) if FORM.scaled else lanes.scaled
    for i in tl.static_range(len(others)):
        exponents = tl.reshape(others[i], SHAPE) - base[:, :, None]
        if FORM.plain:
            plain += tl.sum(fast_exp(exponents), axis=2)
        if FORM.scaled:
            scaled += tl.sum(fast_exp(scale * exponents), axis=2)
    return Summary(m, plain, scaled)


@triton.jit
def load_summaries(summaries_ptr, rows, n_rows, n_parts, BLOCK_PARTS: tl.constexpr):
    """The summaries that summarise_kernel has stored, of each part of each row."""
    parts = tl.arange(0, BLOCK_PARTS)
    ptrs = tile_ptrs(ptrs_of(rows, summaries_ptr, 0, n_parts), parts, 1)
    stride_field = n_rows * n_parts
    exists = tile_mask(rows.exists, parts, n_parts)
    return Summary(
        (tl.load(ptrs, mask=exists, other=-float("inf")),),
        (tl.load(ptrs + stride_field, mask=exists, other=0.0),),
        (tl.load(ptrs + 2 * stride_field, mask=exists, other=0.0),),
    )


@triton.jit
def store_summary(summaries_ptr, summary, part, rows, n_rows, n_parts):
    """One part's summary of each row, where load_summaries looks for it."""
    ptrs = ptrs_of(rows, summaries_ptr, 0, n_parts) + part
    stride_field = n_rows * n_parts
    tl.store(ptrs, summary.max, mask=rows.exists)
    tl.store(ptrs + stride_field, summary.plain, mask=rows.exists)
    tl.store(ptrs + 2 * stride_field, summary.scaled, mask=rows.exists)


@triton.jit
def combine(parts, scale, FORM: tl.constexpr):
    """The summary of each row from those of its parts: tiles of single classes, of lanes, or of programs' parts."""
    m = parts.max[0]
    for i in tl.static_range(1, len(parts.max)):
        m = tl.maximum(m, parts.max[i])
    m = tl.max(m, axis=1)
    base = origin(m)[:, None]
    zero = tl.zeros(m.shape, m.dtype)
    plain = tl.sum(sum_over_tiles(parts.plain, parts.max, base, 1.0), axis=1) if FORM.plain else zero
    scaled = tl.sum(sum_over_tiles(parts.scaled, parts.max, base, scale), axis=1) if FORM.scaled else zero
    return Summary(m, plain, scaled)


@triton.jit
def sum_over_tiles(sums, maxima, base, scale):
    """Sums of exponentials, each relative to a maximum, added up lane by lane relative to one base."""
    total = sums[0] * fast_exp(scale * (maxima[0] - base))
    for i in tl.static_range(1, len(maxima)):
        total += sums[i] * fast_exp(scale * (maxima[i] - base))
    return total


@triton.jit
def of_kept(summary, kept):
    """The same summary, but that of no others where a single row takes no part; in several rows they are -inf."""
    if kept.shape[0] > 1:
        return summary
    else:
        m = tl.where(kept, summary.max, -float("inf"))
        return Summary(m, tl.where(kept, summary.plain, 0.0), tl.where(kept, summary.scaled, 0.0))


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
    summary, x_y, margins_ptr, rows, weight, shares, alpha, beta, gamma, scale, FORM: tl.constexpr
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
        focal_slope = tl.where(active, beta * (shares.focal * slope), 0.0)
    if FORM.has_ldam:
        if margins_ptr is not None:
            gap += tl.load(margins_ptr + rows.target, mask=rows.kept, other=0.0).to(gap.dtype)
        v = scale * gap + tl.log(scaled_sum) if FORM.scaled else gap + tl.log(plain_sum)
        value, slope = ldam_term(v)
        ldam = tl.where(active, alpha * (weight * value), 0.0)
        ldam_slope = tl.where(active, alpha * (shares.ldam * slope), 0.0)
    return Terms(ldam, ldam_slope, focal, focal_slope)


@triton.jit
def load_denominators(totals_ptr, weight, kept, N_TOTALS: tl.constexpr, RULE: tl.constexpr):
    """What the loss and gradient of each term are divided by, see reduction.py: 1 unless they are means.

    From the totals given, or totals_kernel's partial sums; without either, from the rows of this program, which then
    has them all.
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
    if RULE.totals_given:  # whatever they are, the loss of rows of which none takes part is 0
        some_kept = tl.max(kept.to(tl.int32)) > 0
        weight_total = tl.where(some_kept, weight_total, 1.0)
        count = tl.where(some_kept, count, 1.0)
    return Denominators(weight_total, count if RULE.focal_by_count else weight_total)


@triton.jit
def denominators_of_samples(n_samples, dtype: tl.constexpr, RULE: tl.constexpr):
    """The same where every sample takes part and none has a weight of its own."""
    count = tl.full([], 1.0, dtype)
    if RULE.is_mean:
        count *= n_samples
    return Denominators(count, count)


@triton.jit
def shares_of(weight_ptr, weight, kept, denominators):
    """What a mean makes of each row's weight, for both terms: weight / denominator."""
    if weight_ptr is None:  # one division for all rows
        ldam, focal = 1.0 / denominators.ldam, 1.0 / denominators.focal
        return Denominators(tl.where(kept, ldam, 0.0), tl.where(kept, focal, 0.0))
    else:
        return Denominators(weight / denominators.ldam, weight / denominators.focal)


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
def store_gradient(
    row_ptrs, first_class, stride_class, rows, n_classes, others, coefs, scale, FORM: tl.constexpr,
    WHOLE_TILES: tl.constexpr, VECTOR: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """The gradient of a block, rounded to the dtype in which it is kept; 0 in a row that takes no part."""
    TILE: tl.constexpr = others[0].shape[1]
    dtype: tl.constexpr = row_ptrs.dtype.element_ty
    for i in tl.static_range(len(others)):
        offs_c = first_class + i * TILE + tl.arange(0, TILE)
        ptrs = tile_ptrs(row_ptrs, offs_c, stride_class)
        mask = tile_mask(rows.exists, offs_c, None if i < WHOLE_TILES else n_classes)
        # A branch, as one row is selected as a whole. Of several rows those that take no part have coefficients of 0.
        if takes_no_part(rows):
            tl.store(ptrs, tl.zeros([rows.exists.shape[0], TILE], dtype), mask=mask, eviction_policy=EVICTION)
        else:
            grad = gradient(others[i], rows, first_class + i * TILE, coefs, scale, FORM, VECTOR)
            tl.store(ptrs, grad.to(dtype), mask=mask, eviction_policy=EVICTION)


@triton.jit
def takes_no_part(rows):
    """Whether this is one row, and its gradient is 0 whatever its logits."""
    if rows.exists.shape[0] > 1:
        return False
    else:
        return scalar((rows.kept | rows.out_of_range).to(tl.int32)) == 0


@triton.jit
def gradient(others, rows, first_class, coefs, scale, FORM: tl.constexpr, VECTOR: tl.constexpr):
    """A tile of the gradient. Where the tile's exponentials are at hand already, the compiler reuses them."""
    exponents = others - coefs.max[:, None]
    grad = tl.zeros(exponents.shape, exponents.dtype)
    if FORM.plain:
        grad += coefs.plain[:, None] * fast_exp(exponents)
    if FORM.scaled:
        grad += coefs.scaled[:, None] * fast_exp(scale * exponents)
    return at_target(grad, rows, first_class, -coefs.slope[:, None], VECTOR)
