"""Promise: the launch layer is pure arithmetic that covers every sample once, with tiles the hardware can hold."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmf_triton.fused import launch
from lmf_triton.fused.layout import RowLayout, axes, contiguous_strides, row_layout


def offsets(layout: RowLayout, tensor: int) -> list[int]:
    """Where each sample of a tensor is, in the order in which the kernels count samples."""
    stride_group, stride_row = layout.strides[tensor]
    return [
        start[tensor] + group * stride_group + row * stride_row
        for start in layout.offsets
        for group in range(layout.n_groups)
        for row in range(layout.n_rows)
    ]


@st.composite
def strided_tensors(draw):
    """A shape, and two tensors of that shape with their dimensions permuted, padded, or expanded."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    tensors = []
    for _ in range(2):
        order = draw(st.permutations(range(len(shape))))
        padding = [draw(st.integers(0, 1)) for _ in shape]
        buffer = torch.arange(1000000)
        strides, step = [0] * len(shape), 1
        for dim in reversed(order):
            strides[dim] = step if draw(st.integers(0, 5)) else 0
            step *= shape[dim] + padding[dim]
        tensors.append(buffer.as_strided(shape, strides))
    return shape, tensors


@given(strided_tensors())
def test_rows_visit_each_sample_once_in_all_tensors_alike(drawn):
    shape, (first, second) = drawn
    layout = row_layout(shape, first.stride(), second.stride())
    visited = list(zip(offsets(layout, 0), offsets(layout, 1), strict=True))
    samples = list(zip(first.reshape(-1).tolist(), second.reshape(-1).tolist(), strict=True))
    assert sorted(visited) == sorted(samples)


@pytest.mark.parametrize(
    ("shape", "strides", "groups", "rows"),
    [
        ((), (), 1, 1),  # (C,)
        ((32,), (7,), 1, 32),  # (N, C)
        ((8, 512, 1024), (19 * 512 * 1024, 1024, 1), 8, 512 * 1024),  # (N, C, H, W): a group is an image
        ((8, 512, 1024), (512 * 1024 * 19, 1024 * 19, 19), 1, 8 * 512 * 1024),  # channels_last: all one group
    ],
)
def test_common_layouts_take_one_launch(shape, strides, groups, rows):
    layout = row_layout(shape, strides, contiguous_strides(shape))
    assert (layout.n_groups, layout.n_rows, len(layout.offsets)) == (groups, rows, 1)


def test_dimensions_merge_in_the_order_of_memory():
    """A batch that is innermost in memory, in logits and target alike, is one group all the same."""
    layout = row_layout((3, 4, 5), (1, 15, 3), (1, 15, 3))
    assert (layout.n_groups, layout.n_rows, layout.strides) == (1, 60, ((0, 1), (0, 1)))


def test_other_layouts_take_the_fewest_launches():
    """Three dimensions that do not merge: the shortest of the outer ones is launched index by index."""
    layout = row_layout((6, 2, 5), (1000, 100, 3))
    assert (layout.n_groups, layout.n_rows, len(layout.offsets)) == (6, 5, 2)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 1, 5)])
def test_contiguous_strides(shape):
    assert contiguous_strides(shape) == torch.empty(shape).stride()


SIZES = [1, 2, 7, 8, 19, 150, 256, 257, 1000, 1024, 8192, 8193, 32768, 32769, 262144, 1_000_000]


A100, H100 = launch.Device(108, (8, 0), (3, 9)), launch.Device(132, (9, 0), (3, 9))


def is_power_of_2(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("class_contiguous", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_forward_blocks(itemsize, class_contiguous, aligned, two, device):
    for n_rows, n_classes, n_groups in itertools.product([1, 5, 32, 4096, 2**22], SIZES, [1, 8]):
        config = launch.forward_config(
            *(n_groups, n_rows, n_classes, itemsize, device),
            class_contiguous=class_contiguous, aligned=aligned, two_exponentials=two,
        )  # fmt: skip
        tile, rest = divmod(config.block_classes, config.class_tiles)
        assert rest == 0
        assert all(map(is_power_of_2, (config.block_rows, tile, config.num_warps, config.num_ctas)))
        assert 1 <= config.num_warps <= launch.MAX_WARPS
        assert config.num_ctas == 1 or (config.num_ctas <= device.max_ctas and class_contiguous)
        # No thread holds more than 64 values of 4 bytes, beyond which registers spill.
        n_threads = 32 * config.num_warps * config.num_ctas
        assert config.block_rows * config.block_classes * itemsize <= n_threads * 64 * 4
        assert config.n_programs(n_groups, n_rows) * config.block_rows >= n_groups * n_rows
        if class_contiguous and n_classes <= launch.MAX_CTA_CLASSES[itemsize] // (1 + two) * device.max_ctas:
            assert config.block_classes >= n_classes  # one pass over the logits
            assert config.block_classes - tile < n_classes  # no tile of padding


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("class_contiguous", [True, False])
@pytest.mark.parametrize("n_softmaxes", [1, 2])
@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
def test_expectation_blocks(itemsize, class_contiguous, n_softmaxes, device):
    size = n_softmaxes * launch.EXPECTATION_SIZE[itemsize]
    for n_rows, n_classes, n_groups in itertools.product([1, 5, 32, 4096, 2**22], SIZES, [1, 8]):
        config = launch.expectation_config(
            *(n_groups, n_rows, n_classes, itemsize, device),
            class_contiguous=class_contiguous, n_softmaxes=n_softmaxes,
        )  # fmt: skip
        tile, rest = divmod(config.block_classes, config.class_tiles)
        assert rest == 0
        assert all(map(is_power_of_2, (config.block_rows, tile, config.num_warps, config.num_ctas)))
        assert 1 <= config.num_warps <= launch.MAX_WARPS
        assert config.num_ctas == 1 or (config.num_ctas <= device.max_ctas and class_contiguous)
        assert config.class_parts == 1
        # A thread has at most 32 elements of one softmax in float32, half of what forward_kernel's has.
        n_threads = 32 * config.num_warps * config.num_ctas
        assert config.block_rows * config.block_classes * size <= n_threads * 32
        assert config.n_programs(n_groups, n_rows) * config.block_rows >= n_groups * n_rows
        if class_contiguous and n_classes <= launch.MAX_CTA_CLASSES[4] // 4 // size * device.max_ctas:
            assert config.block_classes >= n_classes  # one pass over the logits
        if class_contiguous and config.block_classes >= n_classes:
            assert config.block_classes - tile < n_classes  # no tile of padding


@pytest.mark.parametrize(
    ("n_classes", "n_softmaxes", "num_ctas"),
    [
        (1000, 1, 1),
        (4096, 1, 1),
        (4097, 1, 2),  # half of the registers of two multiprocessors
        (32769, 1, 8),
        (65536, 1, 8),
        (65537, 1, 1),  # looped over
        (32768, 2, 8),
        (32769, 2, 1),
    ],
)
def test_clusters_hold_long_rows_of_shares(n_classes, n_softmaxes, num_ctas):
    for n_rows in 1, 16, 4096:
        config = launch.expectation_config(1, n_rows, n_classes, 4, H100, n_softmaxes=n_softmaxes)
        assert config.num_ctas == num_ctas
        assert (config.block_classes < n_classes) == (num_ctas == 1 and n_classes > 4096)


@pytest.mark.parametrize(
    ("capability", "triton_version", "max_ctas"),
    [
        ((9, 0), (3, 9), 8),
        ((9, 0), (3, 10), 8),
        ((9, 0), (4, 0), 8),
        ((10, 3), (3, 9), 8),
        ((9, 0), (3, 8), 1),  # this Triton leaves a barrier out
        ((8, 0), (3, 9), 1),
        ((8, 9), (3, 9), 1),
        ((12, 0), (3, 9), 1),  # not tried
        (None, (3, 9), 1),  # AMD
    ],
)
def test_which_devices_have_clusters(capability, triton_version, max_ctas):
    assert launch.Device(132, capability, triton_version).max_ctas == max_ctas


@pytest.mark.parametrize(
    ("n_classes", "two", "num_ctas"),
    [
        (16384, False, 1),
        (16385, False, 2),  # half of the registers of two multiprocessors, not all of one's
        (32769, False, 4),
        (65537, False, 8),
        (131073, False, 8),
        (262144, False, 8),
        (262145, False, 1),  # looped over
        (131072, True, 8),
        (131073, True, 1),
    ],
)
def test_clusters_hold_long_rows(n_classes, two, num_ctas):
    """As many multiprocessors as hold the row in half of their registers, or else in all of eight's."""
    for n_rows in 1, 16, 4096:
        config = launch.forward_config(1, n_rows, n_classes, 4, H100, two_exponentials=two)
        assert config.num_ctas == num_ctas
        if num_ctas > 1:
            assert config.class_parts == 1  # a cluster a row: few rows need no second kernel
            assert config.num_warps == (8 if n_classes * (1 + two) <= 131072 else 16)


@pytest.mark.parametrize(("n_rows", "n_classes"), [(32, 7), (32, 8), (256, 8), (1, 1000), (128, 10)])
def test_tiny_batches_are_one_program(n_rows, n_classes):
    assert launch.forward_config(1, n_rows, n_classes, 4, H100).n_programs(1, n_rows) == 1


def test_short_rows_share_a_program_and_long_rows_do_not():
    assert launch.forward_config(1, 2**22, 7, 4, H100).block_rows > 1
    assert launch.forward_config(1, 4096, 16384, 4, H100).block_rows == 1


@pytest.mark.parametrize("n_classes", [8, 32, 128, 512])
def test_short_rows_fill_the_device_first(n_classes):
    """A program has fewer rows than it could, down to a quarter, where multiprocessors would have none."""
    most = launch.SHORT_ROWS_ELEMENTS // n_classes
    for n_rows in 300, 3000, 30000, 300000:
        config = launch.forward_config(1, n_rows, n_classes, 4, H100)
        assert most // 4 <= config.block_rows <= most
        fills = config.n_programs(1, n_rows) >= H100.n_multiprocessors // 2
        assert config.block_rows == most if n_rows == 300000 else fills or config.block_rows == most // 4


@pytest.mark.parametrize(("n_classes", "n_rows"), [(2, 512), (19, 256), (21, 128), (32, 128)])
def test_few_strided_classes_are_not_padded(n_classes, n_rows):
    config = launch.forward_config(8, 2**18, n_classes, 4, H100, class_contiguous=False)
    assert (config.block_rows, config.block_classes, config.class_tiles) == (n_rows, n_classes, n_classes)


@pytest.mark.parametrize(
    ("sizes", "expected"), [((7, 7), 1), ((1000, 1000, 1000), 8), ((8, 0, 24), 8), ((1024, 4096), 16), ((19, 1), 1)]
)
def test_alignment(sizes, expected):
    assert launch.alignment(*sizes) == expected


@pytest.mark.parametrize("along_rows", [True, False])
@pytest.mark.parametrize("n_multiprocessors", [8, 132])
def test_every_part_of_a_row_has_classes(along_rows, n_multiprocessors):
    """As many parts as are wanted, or fewer: but each has a block of classes at least, and together they have all."""
    device = launch.Device(n_multiprocessors, (8, 0), (3, 9))
    n_shared = 0
    for n_rows, n_classes in itertools.product([1, 3, 8, 33, 64], [*SIZES, 40000, 50257]):
        logits = axes((n_rows, n_classes), (1, n_rows) if along_rows else (n_classes, 1))
        forward, summarise = launch.plan_forward(
            logits, (1,), None, 4, out_per_row=False, two_exponentials=False, device=device
        )
        if summarise is None:
            continue
        n_shared += 1
        n_parts, part_classes = summarise.n_items, summarise.meta["CLASS_BLOCKS"] * summarise.meta["BLOCK_CLASSES"]
        assert n_parts > 1
        assert (n_parts - 1) * part_classes < n_classes <= n_parts * part_classes
        assert summarise.n_programs == n_parts * launch.cdiv(n_rows, summarise.meta["BLOCK_ROWS"])
        # They are combined in one tile, whose size is a power of two: few kernels compile.
        assert forward.n_items == n_parts
        assert n_parts <= forward.meta["BLOCK_CLASSES"] < 2 * n_parts
    assert n_shared > 0


@pytest.mark.parametrize("n_samples", [1, 1024, 1025, 10**6, 2**22, 10**9])
def test_totals_grid_covers_all_samples(n_samples):
    grid = launch.totals_grid(n_samples)
    assert grid.n_programs * grid.steps * grid.block_rows >= n_samples
    assert grid.n_programs <= launch.MAX_TOTALS_PROGRAMS
    assert grid.n_programs & (grid.n_programs - 1) == grid.steps & (grid.steps - 1) == 0
    assert grid.block_rows <= 16 * 32 * grid.num_warps


@pytest.mark.parametrize("n_tiles", [1, 2048, 2049, 5000, 10**6])
def test_upstream_grid_covers_all_tiles(n_tiles):
    n_programs, steps = launch.upstream_grid(n_tiles)
    assert n_programs * steps >= n_tiles
    assert n_programs <= launch.MAX_UPSTREAM_PROGRAMS
    assert steps & (steps - 1) == 0


def stored(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


# Nothing but strides. Sizes divide nothing, or everything; classes are few, and more than fit a tile.
ELEMENTWISE_LAYOUTS = {
    "contiguous": stored(301, 1001),
    "contiguous, short rows": stored(4001, 7),
    "every second class": stored(301, 2002)[:, ::2],
    "one row for all": stored(1, 1001).expand(301, 1001),
    "transposed": stored(1001, 301).t(),
    "transposed, aligned": stored(1024, 256).t(),
    "transposed, short rows": stored(7, 4001).t(),
    "transposed, few rows": stored(40001, 5).t(),
    "columns of a wider transposed matrix": stored(1001, 333)[:, 10:311].t(),  # the gradient is contiguous
    "every second row of a transposed matrix": stored(301, 602)[:, ::2].t(),
    "images": stored(2, 301, 28, 28),
    "images of odd size": stored(3, 1001, 7, 7),
    "crops of images": stored(2, 301, 20, 100)[..., 3:93],
    "channels_last": stored(2, 301, 28, 28).to(memory_format=torch.channels_last),
}


def sectors(plan: launch.Plan, tensor: int) -> tuple[float, int]:
    """Sectors of 32 bytes that a tensor of 2-byte elements takes, and how many the tiles touch, each for itself.

    Elements that are one and the same count as often as they are read.
    """
    align, block_rows, block_classes = (plan.meta.get(name, 1) for name in ("ALIGN", "BLOCK_ROWS", "BLOCK_CLASSES"))
    group, row, class_ = (stride * unit for stride, unit in zip(plan.strides[tensor], (align, align, 1), strict=True))
    rows = torch.arange(plan.n_rows).split(block_rows)
    classes = torch.arange(plan.n_classes * align).split(block_classes)
    n_groups = (plan.n_items or plan.n_programs) // (len(rows) * len(classes))
    tiles = [
        (2 * (start[tensor] + i * group + r[:, None] * row + c * class_) // 32).unique()
        for start, i, r, c in itertools.product(plan.offsets, range(n_groups), rows, classes)
    ]
    n_elements = len(plan.offsets) * n_groups * plan.n_rows * plan.n_classes * align
    return max(len(torch.cat(tiles).unique()), 2 * n_elements / 32), sum(map(len, tiles))


@pytest.mark.parametrize("layout", ELEMENTWISE_LAYOUTS)
def test_tiles_of_the_elementwise_kernels_are_whole_sectors(layout):
    """What a tile takes of a sector is not left for many others to read again: nothing is moved more than twice."""
    logits = ELEMENTWISE_LAYOUTS[layout]
    of_logits, of_grad = (axes(t.shape, t.stride()) for t in (logits, torch.empty_like(logits)))
    per_row = contiguous_strides(of_logits.row_shape)
    coefs = tuple(4 * stride for stride in per_row)
    backward = launch.plan_backward(of_logits, per_row, coefs, per_row, of_grad, 4)
    upstream = launch.plan_upstream(of_grad, per_row, 4)
    for plan, tensor in (backward, 0), (backward, 4), (upstream, 0):
        n_sectors, touched = sectors(plan, tensor)
        assert touched <= 2 * n_sectors


def test_every_plan_says_what_divides_classes_and_strides():
    """Triton would load single elements where it is 8, of rows of 1000 as of the 45000 elements of a dense gradient."""
    rows, dense = axes((300, 1000), (1000, 1)), axes((45000,), (1,))
    plans = [
        launch.plan_forward(rows, (1,), rows, 4, out_per_row=False, two_exponentials=False, device=A100).forward,
        launch.plan_backward(rows, (1,), (4,), (0,), rows, 4),
        launch.plan_upstream(rows, (1,), 4),
        launch.plan_upstream(dense, (), 4),
    ]
    assert [(plan.meta["ALIGN"], plan.n_classes) for plan in plans] == [(8, 125)] * 3 + [(8, 5625)]
    assert all(plan.strides[0][1] == 125 for plan in plans[:3])


def test_numbers_beyond_32_bits_are_seen_as_such():
    """In units of ALIGN, 2^31 elements of a dense gradient would fit 32 bits; times ALIGN they would not."""
    for n_elements in 2**31, 2**32 + 2**20:
        plan = launch.plan_upstream(axes((n_elements,), (1,)), (), 4)
        assert (plan.meta["ALIGN"], plan.n_classes) == (1, n_elements)


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("along_rows", [True, False])
def test_elementwise_tiles(itemsize, along_rows):
    for n_rows, n_classes in itertools.product([1, 5, 32, 4096, 2**22], SIZES):
        config = launch.elementwise_config(n_rows, n_classes, itemsize, along_rows=along_rows)
        n_elements = config.block_rows * config.block_classes
        assert n_elements <= launch.ELEMENTWISE_TILE
        # It is no smaller than that where there is more, and no program has nothing to do.
        assert n_elements == launch.ELEMENTWISE_TILE or (
            config.block_rows >= n_rows and config.block_classes >= n_classes
        )
        assert config.block_rows < 2 * n_rows and config.block_classes < 2 * n_classes


def test_configurations_are_frozen():
    config = launch.elementwise_config(32, 7, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_warps = 3
