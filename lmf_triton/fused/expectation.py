"""Device functions of rows in which several classes have a share: by probabilities, or by label smoothing.

The loss of such a row is a sum over its classes: of each class's share times the loss that the row would have if that
class were its target. So there are two reductions. The first one makes a ``Ranking`` of the classes, from which
follows their ``Softmax``; the second one needs that softmax for each class, and makes ``Sums``.

Numerics: that sum of exponentials which class j leaves to the others is the whole sum less its own exponential. Nothing
cancels where another class is larger: p_j is then at most 1/2. For the one class that is larger than all others (*the
largest*, which is none where two are equal) the others are summed apart, relative to the second largest logit. So its
loss keeps its accuracy however far it leads, as with class indices. All other exponentials are relative to the second
largest logit as well: in a confident row they matter as much as the largest's.

LDAM and focal loss share one softmax at scale 1, and otherwise have one each. Its *logits* are then x + adjustment,
or for LDAM scale * x + adjustment; without an adjustment these are x with the *factor* scale, which is taken of
differences only. Fields of these tuples have one value a row, or one for each lane where rows are looped over.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .math import BIG, fast_exp, focal_term, ldam_term, neg_log1m, softplus_and_ratio
from .rows import Terms, at_target, load_per_class, origin, tile_mask, tile_ptrs


class Ranking(NamedTuple):
    """The largest logits of some classes, and what the rest comes to. Of no classes it is (-inf, -inf, 0)."""

    largest: tl.tensor
    second: tl.tensor  # the same where two classes share it
    others: tl.tensor  # sum of exp(factor * (x_j - second)) over all classes but one of the largest


class Softmax(NamedTuple):
    """The probabilities of a row's classes."""

    largest: tl.tensor  # its logit
    leader: tl.tensor  # the same, but NaN where another class has it too
    second: tl.tensor  # finite
    others: tl.tensor  # as in Ranking
    per_exp: tl.tensor  # the probability of a class, if not the largest, over its exp(factor * (x_j - second))
    p_largest: tl.tensor
    log_total: tl.tensor  # log of the sum of exp(factor * (x_j - largest))
    gap: tl.tensor  # from the largest logit to the logsumexp of the others


class Source(NamedTuple):
    """Where the classes of rows are loaded from."""

    logits: tl.tensor  # pointer to each row
    logits_stride: tl.tensor  # of classes, as the other
    target: tl.tensor  # pointer to each row's probabilities, or its index
    target_stride: tl.tensor
    margins: tl.tensor  # pointer, or None; as the others
    weight: tl.tensor
    adjustment: tl.tensor


class Block(NamedTuple):
    """Some classes of rows: tuples of tiles."""

    logits: tuple  # one tuple for each softmax; -inf outside the tensor
    shares: tuple  # of the classes in the row's loss, weights included; 0 outside the tensor
    margins: tuple  # times scale


class Sums(NamedTuple):
    """The second reduction: over all classes but the largest, and what the largest's own loss is computed from."""

    ldam: tl.tensor
    focal: tl.tensor
    slopes: tl.tensor
    share: tl.tensor  # the largest's
    margin: tl.tensor


class Coefs(NamedTuple):
    """From which the gradient of a row follows: for the largest class, and for each other beside its own slope."""

    largest: tl.tensor
    per_exp: tl.tensor  # times exp(factor * (x_j - second))


# The softmaxes that a loss of this Form needs, counted from 0: of x, and of scale * x. It is taken apart by places,
# since in Triton 3.6 it arrives without its names.


@triton.constexpr_function
def n_softmaxes(form):
    """How many there are."""
    _, _, plain, scaled = form
    return int(plain) + int(scaled)


@triton.constexpr_function
def is_scaled(form, i):
    """Whether the logits of softmax i are scaled."""
    _, _, plain, scaled = form
    return bool(scaled and i == int(plain))


@triton.constexpr_function
def is_of_ldam(form, i):
    """Whether LDAM is of softmax i."""
    has_ldam, _, plain, scaled = form
    return bool(has_ldam and (scaled and i == int(plain)) == scaled)


@triton.constexpr_function
def is_of_focal(form, i):
    """Whether focal loss is of softmax i."""
    _, has_focal, plain, scaled = form
    return bool(has_focal and not (scaled and i == int(plain)))


# Of tuples in a tuple Triton 3.6 forgets the names.


@triton.jit
def ranking_at(rankings, INDEX: tl.constexpr):
    """The ranking of one softmax."""
    r = rankings[INDEX]
    return Ranking(r[0], r[1], r[2])


@triton.jit
def softmax_at(softmaxes, INDEX: tl.constexpr):
    """One softmax."""
    s = softmaxes[INDEX]
    return Softmax(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7])


@triton.jit
def sums_at(all_sums, INDEX: tl.constexpr):
    """The sums of one softmax."""
    s = all_sums[INDEX]
    return Sums(s[0], s[1], s[2], s[3], s[4])


@triton.jit
def load_classes(
    source, rows, first_class, n_classes, scale, kept, spread, dtype: tl.constexpr, FORM: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr, CLASS_TILES: tl.constexpr, WHOLE_TILES: tl.constexpr, VECTOR: tl.constexpr,
    EVICTION: tl.constexpr
):  # fmt: skip
    """A block of classes. Of a target, ``kept`` stays with its classes, and every class gets ``spread``."""
    TILE: tl.constexpr = BLOCK_CLASSES // CLASS_TILES
    HAS_PROBABILITIES: tl.constexpr = source.target.dtype.element_ty.is_floating()
    x, probabilities = (), ()
    for i in tl.static_range(CLASS_TILES):  # all of them are under way before the first is needed
        offs_c = first_class + i * TILE + tl.arange(0, TILE)
        mask = tile_mask(rows.exists, offs_c, None if i < WHOLE_TILES else n_classes)
        ptrs = tile_ptrs(source.logits, offs_c, source.logits_stride)
        x = x + (tl.load(ptrs, mask=mask, other=-float("inf"), eviction_policy=EVICTION),)
        if HAS_PROBABILITIES:
            ptrs = tile_ptrs(source.target, offs_c, source.target_stride)
            probabilities = probabilities + (tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICTION),)
    shares, margins = (), ()
    for i in tl.static_range(CLASS_TILES):
        offs_c = first_class + i * TILE + tl.arange(0, TILE)
        if HAS_PROBABILITIES:
            share = spread + kept * probabilities[i].to(dtype)
        else:
            share = tl.full(x[i].shape, spread, dtype)
            share = at_target(share, rows, first_class + i * TILE, spread + kept, VECTOR)
        share *= load_per_class(source.weight, offs_c, n_classes, 1.0, dtype)
        share = tl.where((offs_c < n_classes)[None, :] & rows.kept[:, None], share, 0.0)
        shares = shares + (tl.where(rows.out_of_range[:, None], float("nan"), share),)
        margins = margins + (scale * load_per_class(source.margins, offs_c, n_classes, 0.0, dtype),)
    logits = ()
    for index in tl.static_range(n_softmaxes(FORM)):
        tiles = ()
        for i in tl.static_range(CLASS_TILES):
            tile = x[i].to(dtype)
            if source.adjustment is not None:
                offs_c = first_class + i * TILE + tl.arange(0, TILE)
                b = load_per_class(source.adjustment, offs_c, n_classes, 0.0, dtype)
                if is_scaled(FORM, index):
                    # One instruction, so that a class has the same logit to the last bit wherever it is computed.
                    tile = tl.fma(tile, tl.full(tile.shape, scale, dtype), tl.broadcast_to(b, tile.shape))
                else:
                    tile += b
            tiles = tiles + (tile,)
        logits = logits + (tiles,)
    return Block(logits, shares, margins)


@triton.jit
def factor_of(source, scale, dtype: tl.constexpr, FORM: tl.constexpr, INDEX: tl.constexpr):
    """What the differences of a softmax's logits are multiplied by."""
    if is_scaled(FORM, INDEX) and source.adjustment is None:
        return tl.full([], scale, dtype)
    else:
        return tl.full([], 1.0, dtype)


# The first reduction.


@triton.jit
def exps_of(logits, second, factor):
    """Exponentials relative to the second largest logit, 1 at most: the largest's has no use. NaN stays NaN."""
    return fast_exp(factor * tl.minimum(logits - second, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def rank_block(logits, factor):
    """The ranking of each row's classes, all of which are in this block."""
    largest = tl.max(logits[0], axis=1)
    for i in tl.static_range(1, len(logits)):
        largest = tl.maximum(largest, tl.max(logits[i], axis=1))
    n_largest = tl.zeros(largest.shape, largest.dtype)
    below = n_largest - float("inf")
    for i in tl.static_range(len(logits)):
        is_largest = logits[i] == largest[:, None]
        n_largest += tl.sum(is_largest.to(largest.dtype), axis=1)
        below = tl.maximum(below, tl.max(tl.where(is_largest, -float("inf"), logits[i]), axis=1))
    second = tl.where(n_largest > 1, largest, below)
    others = n_largest - 1
    base = origin(second)[:, None]
    for i in tl.static_range(len(logits)):
        exps = exps_of(logits[i], base, factor)
        others += tl.sum(tl.where(logits[i] == largest[:, None], 0.0, exps), axis=1)
    return Ranking(largest, second, others)


@triton.jit
def no_lanes(FORM: tl.constexpr, SHAPE: tl.constexpr, dtype: tl.constexpr):
    """The rankings of lanes through which nothing has passed, one for each softmax."""
    zeros = tl.zeros(SHAPE, dtype)
    lanes = ()
    for _ in tl.static_range(n_softmaxes(FORM)):
        lanes = lanes + (Ranking(zeros - float("inf"), zeros - float("inf"), zeros),)
    return lanes


@triton.jit
def add_block(lanes, source, block, scale, dtype: tl.constexpr, FORM: tl.constexpr):
    """The rankings of each lane with one class more from each tile of a block."""
    added = ()
    for index in tl.static_range(n_softmaxes(FORM)):
        factor = factor_of(source, scale, dtype, FORM, index)
        ranking = ranking_at(lanes, index)
        for i in tl.static_range(len(block.shares)):
            ranking = add_class(ranking, block.logits[index][i], factor)
        added = added + (ranking,)
    return added


@triton.jit
def add_class(lanes, logits, factor):
    """The ranking of each lane with one class more."""
    # A NaN shall be seen in the sum, and may not hide in a maximum.
    lower = tl.minimum(lanes.largest, logits, propagate_nan=tl.PropagateNan.ALL)
    # One of two exponentials, of the sum so far and of what joins it, is 1. Where either is nothing, t has no say.
    t = fast_exp(-factor * tl.abs(origin(lower) - origin(lanes.second)))
    is_next = lower > lanes.second
    others = tl.where(is_next, lanes.others * t + 1.0, lanes.others + t)
    return Ranking(
        tl.maximum(lanes.largest, logits),
        tl.where(is_next, lower, lanes.second),
        tl.where(lower == -float("inf"), lanes.others, others),
    )


@triton.jit
def combine_lanes(lanes, factor):
    """The ranking of each row from those of its lanes."""
    largest = tl.max(lanes.largest, axis=1)
    is_largest = lanes.largest == largest[:, None]
    n_largest = tl.sum(is_largest.to(largest.dtype), axis=1)
    below = tl.max(tl.where(is_largest, lanes.second, lanes.largest), axis=1)
    second = tl.where(n_largest > 1, largest, below)
    base = origin(second)[:, None]
    others = lanes.others * fast_exp(factor * (lanes.second - base))
    others += tl.where(is_largest, 0.0, exps_of(lanes.largest, base, factor))
    return Ranking(largest, second, tl.sum(others, axis=1) + (n_largest - 1))


@triton.jit
def softmax_of(ranking, factor):
    """The probabilities that follow. They are NaN where a logit is NaN or +inf, or where all are -inf."""
    largest = tl.where(tl.abs(ranking.largest) == float("inf"), float("nan"), ranking.largest)
    lead = factor * (largest - ranking.second)
    second_exp = fast_exp(-lead)  # relative to the largest
    total = 1.0 + ranking.others * second_exp
    no_others = ranking.others == 0
    gap = tl.where(no_others, -float("inf"), tl.log(tl.where(no_others, 1.0, ranking.others)) - lead)
    second = origin(ranking.second)
    leader = tl.where(largest > ranking.second, largest, float("nan"))
    return Softmax(largest, leader, second, ranking.others, second_exp / total, 1.0 / total, tl.log(total), gap)


# The second reduction.


@triton.jit
def is_largest(logits, softmax):
    """Where in a tile the class is that is larger than all others."""
    return logits == softmax.leader[:, None]


@triton.jit
def of_others(
    logits, shares, margins, softmax, ldam_share, focal_share, gamma, factor, FORM: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """LDAM, focal loss and slope of each class in a tile, times its share; 0 for the largest.

    A slope is the derivative in the class's own gap, divided by 1 - p_j; ldam_share and focal_share are factors of the
    slopes alone. The gradient of the loss of class j is slope_j * p_k for another class k, and slope_j * (p_j - 1) for
    its own.
    """
    shares = tl.where(is_largest(logits, softmax), 0.0, shares)
    # A class without a share counts for nothing, though its loss be infinite.
    p = tl.where(shares == 0, 0.0, exps_of(logits, softmax.second[:, None], factor) * softmax.per_exp[:, None])
    nll = softmax.log_total[:, None] + factor * (softmax.largest[:, None] - logits)
    nll = tl.where(shares == 0, 0.0, nll)
    q = 1.0 - p
    neg_log_q = neg_log1m(p)
    ldam = tl.zeros(p.shape, p.dtype)
    focal, slope, denominator = ldam, ldam, q
    if is_of_focal(FORM, INDEX):
        power = fast_exp(-gamma * neg_log_q)  # (1 - p)^gamma
        focal = shares * (power * nll)
        slope += focal_share * (power * (gamma * (p * tl.where(nll > BIG, BIG, nll)) + q))
    if is_of_ldam(FORM, INDEX):
        value, ldam_slope, ratio = softplus_and_ratio(nll - neg_log_q + margins)
        ldam = shares * value
        slope = slope * ratio + ldam_share * ldam_slope
        denominator *= ratio  # one division for both
    return ldam, focal, shares * (slope / denominator)


@triton.jit
def sums_of_block(
    block, softmaxes, source, ldam_share, focal_share, gamma, scale, dtype: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """For each softmax the sums of a block, lane by lane, and the slopes of its classes."""
    all_sums, all_slopes = (), ()
    for index in tl.static_range(n_softmaxes(FORM)):
        factor = factor_of(source, scale, dtype, FORM, index)
        softmax = softmax_at(softmaxes, index)
        ldam = tl.zeros(block.shares[0].shape, dtype)
        focal, slope_sum, largest_share, largest_margin = ldam, ldam, ldam, ldam
        slopes = ()
        for i in tl.static_range(len(block.shares)):
            logits, share, margin = block.logits[index][i], block.shares[i], block.margins[i]
            of_ldam, of_focal, slope = of_others(
                logits, share, margin, softmax, ldam_share, focal_share, gamma, factor, FORM, index
            )
            ldam += of_ldam
            focal += of_focal
            slope_sum += slope
            slopes = slopes + (slope,)
            here = is_largest(logits, softmax)
            largest_share += tl.where(here, share, 0.0)
            largest_margin += tl.where(here, margin, 0.0)
        all_sums = all_sums + (Sums(ldam, focal, slope_sum, largest_share, largest_margin),)
        all_slopes = all_slopes + (slopes,)
    return all_sums, all_slopes


@triton.jit
def no_sums(FORM: tl.constexpr, SHAPE: tl.constexpr, dtype: tl.constexpr):
    """The sums of lanes through which nothing has passed, one for each softmax."""
    zeros = tl.zeros(SHAPE, dtype)
    sums = ()
    for _ in tl.static_range(n_softmaxes(FORM)):
        sums = sums + (Sums(zeros, zeros, zeros, zeros, zeros),)
    return sums


@triton.jit
def add_sums(a, b):
    """The sums of two parts of a row, for each softmax."""
    sums = ()
    for i in tl.static_range(len(a)):
        x, y = sums_at(a, i), sums_at(b, i)
        sums = sums + (
            Sums(x.ldam + y.ldam, x.focal + y.focal, x.slopes + y.slopes, x.share + y.share, x.margin + y.margin),
        )
    return sums


# Loss and gradient.


@triton.jit
def terms_and_coefs(
    sums, softmaxes, rows, alpha, beta, ldam_share, focal_share, gamma, dtype: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Both terms of each row, and the coefficients of the gradient of each softmax."""
    ldam = tl.zeros([rows.exists.shape[0]], dtype)
    focal = ldam
    coefs = ()
    for index in tl.static_range(n_softmaxes(FORM)):
        softmax = softmax_at(softmaxes, index)
        lanes = sums_at(sums, index)
        share = tl.sum(lanes.share, axis=1)
        slope = tl.zeros(share.shape, dtype)
        if is_of_focal(FORM, index):
            value, focal_slope = focal_term(softmax.gap, gamma)
            focal += tl.sum(lanes.focal, axis=1) + tl.where(share == 0, 0.0, share * value)
            slope += focal_share * focal_slope
        if is_of_ldam(FORM, index):
            value, ldam_slope = ldam_term(softmax.gap + tl.sum(lanes.margin, axis=1))
            ldam += tl.sum(lanes.ldam, axis=1) + tl.where(share == 0, 0.0, share * value)
            slope += ldam_share * ldam_slope
        coefs = coefs + (coefs_of(tl.sum(lanes.slopes, axis=1), tl.where(share == 0, 0.0, share * slope), softmax),)
    zero = tl.zeros(ldam.shape, dtype)
    return Terms(alpha * ldam, zero, beta * focal, zero), coefs


@triton.jit
def coefs_of(slopes, largest_slope, softmax):
    """The coefficients of each row: 0 stays 0, whatever the logits are."""
    per_exp = tl.where(slopes == 0, 0.0, slopes * softmax.per_exp)
    per_exp += tl.where(largest_slope == 0, 0.0, largest_slope / softmax.others)  # 0 where there are no others
    return Coefs(tl.where(slopes == 0, 0.0, slopes * softmax.p_largest) - largest_slope, per_exp)


@triton.jit
def store_gradient(
    row_ptrs, first_class, stride_class, rows, n_classes, block, slopes, softmaxes, coefs, upstream, source, scale,
    dtype: tl.constexpr, FORM: tl.constexpr, WHOLE_TILES: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """The gradient of a block, times an upstream gradient if there is one, rounded to the dtype in which it is kept."""
    TILE: tl.constexpr = block.shares[0].shape[1]
    for i in tl.static_range(len(block.shares)):
        grad = tl.zeros(block.shares[0].shape, dtype)
        for index in tl.static_range(n_softmaxes(FORM)):
            factor = factor_of(source, scale, dtype, FORM, index)
            of_softmax = Coefs(coefs[index][0], coefs[index][1])
            grad += gradient(
                block.logits[index][i], slopes[index][i], softmax_at(softmaxes, index), of_softmax, factor
            )  # fmt: skip
        if upstream is not None:
            grad = tl.where(grad == 0, 0.0, upstream[:, None] * grad)  # 0 stays 0, as in upstream_kernel
        offs_c = first_class + i * TILE + tl.arange(0, TILE)
        mask = tile_mask(rows.exists, offs_c, None if i < WHOLE_TILES else n_classes)
        ptrs = tile_ptrs(row_ptrs, offs_c, stride_class)
        tl.store(ptrs, grad.to(row_ptrs.dtype.element_ty), mask=mask, eviction_policy=EVICTION)


@triton.jit
def gradient(logits, slopes, softmax, coefs, factor):
    """A tile of the gradient in the logits of a softmax."""
    per_exp = coefs.per_exp[:, None]
    of_other = tl.where(per_exp == 0, 0.0, per_exp * exps_of(logits, softmax.second[:, None], factor)) - slopes
    return tl.where(is_largest(logits, softmax), coefs.largest[:, None], of_other)
