"""Promise: every launch of the named problems compiles for four GPU targets, without float64 arithmetic, and moves
logits once and 16 bytes at a time. With the compilers that are recorded here it does not spill either.

Compilation does not work in a process whose kernels are interpreted, so it has one of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.problems import PROBLEMS

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow

# Compiles each different configuration once: what a kernel's loops turn to, and the number of programs, make no other.
COMPILE = """
import json, multiprocessing, os, re, sys
import torch
from benchmarks.compiled import DEVICES, LMF, PROBLEMS, TARGETS, compile_launch, recorded_launches, report

def launches():
    for case in json.load(sys.stdin):
        name, dtype, target, recompute, scale = case
        options = LMF._replace(scale=scale)
        launches = recorded_launches(
            PROBLEMS[name], options, dtype=getattr(torch, dtype), recompute=recompute, device=DEVICES[target]
        )
        for launch in launches:
            yield case, launch

def configuration(case, launch):
    loops = {name: min(launch.arguments.get(name, 1), 2) for name in ("CLASS_BLOCKS", "STEPS", "N_TOTALS")}
    constants = {name: value for name, value in launch.arguments.items() if name.isupper()} | loops
    aligned = [value % 16 for name, value in launch.arguments.items() if "stride" in name]
    dtypes = [value.dtype for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    return str((case[2], launch.kernel, constants, aligned, dtypes, launch.options))

def compile_one(item):
    case, launch = item
    compiled = compile_launch(launch, TARGETS[case[2]])
    # Values and types of the constants in Triton's own code.
    code = compiled.asm["ttir"]
    constants = re.findall(r"arith.constant (?:dense<)?([-+.e0-9]+)>? : (?:tensor<[0-9x]*)?(f32|f64)", code)
    return (vars(report(compiled)) if case[2] != "gfx942" else {}) | {"constants": constants}

if __name__ == "__main__":
    items = list(launches())
    different = {configuration(*item): item for item in reversed(items)}
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        reports = dict(zip(different, pool.imap(compile_one, different.values())))
    for case, launch in items:
        arguments = {name: value for name, value in launch.arguments.items() if isinstance(value, int | float)}
        facts = {"case": case, "kernel": launch.kernel, "num_warps": launch.num_warps, "arguments": arguments}
        facts["num_ctas"] = launch.options.get("num_ctas", 1)
        print(json.dumps(facts | reports[configuration(case, launch)]))
"""

NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), "gfx942"
DTYPES = ("bfloat16", "float16", "float32")
# As the package would choose: float16 computes its gradient in backward. The kernel of class probabilities is large:
# not every dtype of it for every target.
CASES = [
    (problem, dtype, target, dtype == "float16", 1.0)
    for problem in PROBLEMS
    for dtype in DTYPES
    for target in (*NVIDIA, AMD)
    if not problem.startswith("soft") or dtype == "bfloat16" or target == "sm_90"
]
# The other choice, two exponentials an element, and float64: problems of each kind.
KINDS = ["tiny", "large_1k_bf16", "large_32k_bf16", "large_64k_bf16", "few_256k_bf16", "short_7", "short_256"]
KINDS += ["dense_19"]
SOFT_KINDS = ["soft_8", "soft_1k_bf16", "soft_128k_bf16", "soft_dense_19"]
CASES += [
    *((problem, "bfloat16", "sm_90", True, 1.0) for problem in KINDS),
    *((problem, "bfloat16", "sm_90", False, 30.0) for problem in [*KINDS, *SOFT_KINDS]),
    *((problem, "float16", "sm_90", False, 1.0) for problem in KINDS),
    # Clusters with two exponentials an element, and in float64; and its loop, where there are none.
    *(("large_128k_bf16", "bfloat16", target, False, 30.0) for target in NVIDIA),
    *(("large_64k_bf16", "float64", target, False, 1.0) for target in NVIDIA),
    *(("large_32k_bf16", "float64", target, False, 30.0) for target in NVIDIA),
    ("large_32k_bf16", "bfloat16", "sm_100", False, 30.0),
    ("large_1k_bf16", "float64", "sm_90", False, 0.7),
    ("dense_19", "float64", "sm_90", True, 30.0),
    *((problem, "float64", "sm_90", False, 1.0) for problem in SOFT_KINDS if problem != "soft_128k_bf16"),
]


# How a compiler allots registers and reuses values is its own affair, and another with each version. So what it made of
# the kernels is asserted for these versions of Triton and reported for others. Here are the bytes of stack of a thread,
# where it spilled registers, by kernel, tile, dtype and target. All that is not in the table spills nothing.
RECORDED_SPILLS: dict[str, dict[str, int]] = {
    "3.6.0": {
        "backward 1x4096 float16 sm_80": 16,
    },
    "3.7.1": {
        "backward 1x4096 float16 sm_80": 16,
        "forward 1x32768 float32 sm_100": 48,
    },
    "3.8.0": {
        "forward 1x4096 float64 sm_80": 16,
        "forward 1x4096 float64 sm_90": 16,
        "forward 1x8192 float32 sm_100": 8,
    },
    "3.9.0": {
        "expectation 128x19 bfloat16 sm_100": 8,
    },
}


def run_compiler(code: str, given: str = "") -> str:
    """What the code prints in a process whose kernels are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=given,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    return [json.loads(line) for line in run_compiler(COMPILE, json.dumps(CASES)).splitlines()]


def of_nvidia(reports: list[dict], kernel: str = "") -> list[dict]:
    return [r for r in reports if r["case"][2] != AMD and r["kernel"].startswith(kernel)]


def find(reports: list[dict], *case, kernel: str = "forward_kernel") -> dict:
    (found,) = [r for r in reports if r["case"] == list(case) and r["kernel"] == kernel]
    return found


def count(report: dict, *prefixes: str, containing: str = "") -> int:
    return sum(n for name, n in report["instructions"].items() if name.startswith(prefixes) and containing in name)


def test_every_launch_compiles_for_every_target(reports):
    assert len({tuple(r["case"]) for r in reports}) == len(CASES)
    assert {r["kernel"] for r in reports} == {
        *("totals_kernel", "summarise_kernel", "forward_kernel", "backward_kernel", "upstream_kernel"),
        "expectation_kernel",
    }


# Besides these, the sum of the programs' parts of a loss is one of PyTorch's kernels, where there are several.
@pytest.mark.parametrize(
    ("problem", "dtype", "kernels"),
    [
        ("tiny", "float32", ["forward", "upstream"]),
        ("large_1k_bf16", "bfloat16", ["totals", "forward", "upstream"]),
        ("large_256k_bf16", "bfloat16", ["totals", "forward", "upstream"]),
        ("dense_19", "float32", ["totals", "forward", "upstream"]),
        ("large_1k_bf16", "float16", ["totals", "forward", "backward"]),
        ("few_256k_bf16", "bfloat16", ["summarise", "forward", "backward", "upstream"]),
        ("soft_1k_bf16", "bfloat16", ["expectation", "upstream"]),
    ],
)
def test_number_of_launches(reports, problem, dtype, kernels):
    """At most three in forward, its sum included; one in backward."""
    case = [problem, dtype, "sm_80", dtype == "float16", 1.0]
    assert [r["kernel"] for r in reports if r["case"] == case] == [f"{kernel}_kernel" for kernel in kernels]


def unexpected_spills(reports: list[dict], recorded: dict[str, int]) -> dict[str, int]:
    """Bytes of spill of the launches that spill more than was recorded, under the table's keys."""
    spills = {}
    for r in reports:
        _, dtype, target, *_ = r["case"]
        tile = "x".join(str(r["arguments"][name]) for name in ("BLOCK_ROWS", "BLOCK_CLASSES") if name in r["arguments"])
        key = f"{r['kernel'].removesuffix('_kernel')} {tile} {dtype} {target}"
        if r["stack"] > recorded.get(key, 0):
            spills[key] = max(r["stack"], spills.get(key, 0))
    return spills


def assert_or_report(holds: bool, found: object) -> None:
    """Assert what was recorded of this compiler; of another, say what was found."""
    if triton.__version__ not in RECORDED_SPILLS:
        pytest.skip(f"triton {triton.__version__} is not recorded ({', '.join(RECORDED_SPILLS)}); found: {found}")
    assert holds, found


def test_nothing_spills(reports):
    """Beyond what is recorded."""
    spills = unexpected_spills(of_nvidia(reports), RECORDED_SPILLS.get(triton.__version__, {}))
    assert_or_report(not spills, spills or "no spills")


def test_a_new_spill_is_seen():
    """Also a larger one where a smaller one is recorded, and in a kernel, a tile or a target of which none is."""
    recorded = {"forward 1x32768 bfloat16 sm_90": 40}
    known = {
        "case": ["vocabulary", "bfloat16", "sm_90", False, 1.0],
        "kernel": "forward_kernel",
        "arguments": {"BLOCK_ROWS": 1, "BLOCK_CLASSES": 32768},
        "stack": 40,
    }
    assert unexpected_spills([known], recorded) == {}
    for change in (
        {"stack": 48},
        {"kernel": "backward_kernel"},
        {"arguments": {"BLOCK_ROWS": 1, "BLOCK_CLASSES": 16384}},
        {"case": ["vocabulary", "bfloat16", "sm_100", False, 1.0]},
    ):
        (bytes_spilled,) = unexpected_spills([known, known | change], recorded).values()
        assert bytes_spilled == change.get("stack", 40)


def test_no_float64_arithmetic_for_smaller_logits(reports):
    """A Python float that reaches a kernel as float64 costs 27 times the time (Liger #1362)."""
    for r in of_nvidia(reports):
        if r["case"][1] != "float64":
            assert count(r, "DADD", "DMUL", "DFMA", "DSETP", "F2F.F64", "F2F.F32.F64", "I2F.F64") == 0


NORMALIZED = """
from benchmarks.compiled import DEVICES, LMF, PROBLEMS, TARGETS, compile_launch, recorded_launches, report

for name in "tiny", "large_1k_bf16", "few_256k_bf16":  # a program with all rows, several, rows shared by programs
    for target in TARGETS:
        launches = recorded_launches(PROBLEMS[name], LMF, normalized=True, device=DEVICES[target])
        (forward,) = [launch for launch in launches if launch.kernel == "forward_kernel"]
        compiled = compile_launch(forward, TARGETS[target])
        if target != "gfx942":
            found = report(compiled)
            assert found.stack == 0 and found.count("DADD", "DMUL", "DFMA", "DSETP") == 0, (name, target)
        print(name, target, *(launch.kernel for launch in launches))
"""


def test_launches_with_a_normalizer_compile():
    """And none of them adds up the totals."""
    lines = run_compiler(NORMALIZED).splitlines()
    assert len(lines) == 3 * len((*NVIDIA, AMD))
    assert not any("totals_kernel" in line for line in lines)


SHARES = """
from benchmarks.compiled import DEVICES, LMF, PROBLEMS, TARGETS, compile_launch, recorded_launches, report

# A row in a tile, on a cluster or in a loop, classes strided; probabilities and indices; with all that is per class.
for name in "soft_1k_bf16", "soft_128k_bf16", "soft_dense_19", "large_1k_bf16", "large_128k_bf16", "dense_19":
    for scale in 1.0, 30.0:
        options = LMF._replace(label_smoothing=0.1, scale=scale)
        for target in ["sm_90", *(["gfx942"] if scale == 1 and name.startswith("soft") else [])]:
            launches = recorded_launches(PROBLEMS[name], options, per_class=True, device=DEVICES[target])
            (forward,) = [launch for launch in launches if launch.kernel == "expectation_kernel"]
            compiled = compile_launch(forward, TARGETS[target])
            if target != "gfx942":
                assert report(compiled).count("DADD", "DMUL", "DFMA", "DSETP") == 0, (name, target)
            print(name, scale, target, *(launch.kernel for launch in launches))
"""


def test_launches_with_shares_of_classes_compile():
    """Only with indices does a pass over the targets go first."""
    lines = run_compiler(SHARES).splitlines()
    assert len(lines) == 6 * 2 + 3
    assert all(("totals_kernel" in line) == (not line.startswith("soft")) for line in lines)


ADJUSTED = """
from benchmarks.compiled import LMF, PROBLEMS, TARGETS, compile_launch, recorded_launches

for name in "large_1k_bf16", "few_256k_bf16", "dense_19":
    for options in LMF, LMF._replace(beta=0.0, scale=30.0):
        launches = recorded_launches(PROBLEMS[name], options, recompute=True, per_class=True)
        for launch in launches:
            compile_launch(launch, TARGETS["sm_90"])
        print(*(launch.kernel for launch in launches))
"""


def test_launches_with_adjusted_indices_compile():
    """By the kernels for indices, where there is one softmax."""
    assert "expectation_kernel" not in run_compiler(ADJUSTED)


def test_options_of_float64_logits_are_not_rounded_to_float32(reports):
    """They are constants of the kernel then, and 0.7 is another number in float32."""
    r = find(reports, "large_1k_bf16", "float64", "sm_90", False, 0.7)
    scales = {float(value) for value, _ in r["constants"] if abs(float(value) - 0.7) < 1e-6}
    assert scales == {0.7}


def itemsize(r: dict) -> int:
    return {"float64": 8, "float32": 4}.get(r["case"][1], 2)


def wide_accesses(r: dict) -> int:
    """How many 16-byte accesses of each thread one reading of the block takes."""
    block = r["arguments"]["BLOCK_ROWS"] * r["arguments"]["BLOCK_CLASSES"]
    return block * itemsize(r) // (16 * 32 * r["num_warps"] * r["num_ctas"])


def stores_once(r: dict) -> bool:
    """Whether the code has a gradient's 16-byte stores once; or, for one row, a second time, or what is left of that.

    A row that takes no part has a branch of its own, which stores zeros.
    """
    n_branches = 2 if r["arguments"]["BLOCK_ROWS"] == 1 else 1
    return wide_accesses(r) <= count(r, "STG", containing=".128") <= n_branches * wide_accesses(r)


def is_aligned(r: dict) -> bool:
    """Whether 16-byte accesses of the logits are possible: along the classes, or along the rows where these touch."""
    arguments = r["arguments"]
    if arguments["logits_stride_class"] == 1:
        return arguments["ALIGN"] * itemsize(r) >= 16
    return arguments["ALIGN"] * arguments["logits_stride_row"] == 1 and arguments["logits_stride_class"] % 16 == 0


def is_unrolled(r: dict) -> bool:
    """Whether each of a few classes is a tile of its own: a thread then has few rows of it, in less than 16 bytes."""
    return r["arguments"]["CLASS_TILES"] == r["arguments"]["BLOCK_CLASSES"] > 1


def test_wide_loads_and_stores_in_exactly_one_pass(reports):
    """In a tile, as many 16-byte accesses as one reading and one writing of it take; in a loop, two readings."""
    checked = set()
    for r in of_nvidia(reports, "forward_kernel"):
        accesses = wide_accesses(r)
        is_shared = r["case"][0].startswith("few") and r["num_ctas"] == 1
        if not is_aligned(r) or accesses == 0 or is_unrolled(r) or is_shared:
            continue
        writes_grad = not r["case"][3]
        is_loop = r["arguments"]["CLASS_BLOCKS"] > 1
        readings = 2 if is_loop and writes_grad else 1
        assert stores_once(r) if writes_grad else count(r, "STG", containing=".128") == 0, r["case"]
        # A thread with neighbouring rows reads their targets, and its part of the denominators, 16 bytes at a time too.
        others = 16 // itemsize(r)
        assert readings * accesses <= count(r, "LDG", containing=".128") <= readings * accesses + others, r["case"]
        checked.add((r["case"][0], r["case"][1]))
    assert len(checked) >= 3 * 15  # nearly all problems; not C = 7, nor tiles smaller than that


def test_elementwise_kernels_move_16_bytes_at_a_time(reports):
    for problem in "large_1k_bf16", "large_64k_bf16", "imagenet":
        for dtype, kernel in ("bfloat16", "upstream_kernel"), ("float16", "backward_kernel"):
            r = find(reports, problem, dtype, "sm_90", dtype == "float16", 1.0, kernel=kernel)
            assert stores_once(r)
            # The coefficients of a row are 16 bytes as well.
            rows = r["arguments"]["BLOCK_ROWS"]
            assert wide_accesses(r) <= count(r, "LDG", containing=".128") <= wide_accesses(r) + rows


def test_the_exponentials_of_the_sum_serve_the_gradient_again(reports):
    """One exponential an element: the tile is not computed twice. 32 elements a thread, and a few of the row."""
    for scale, per_element in ((1.0, 1), (30.0, 2)):
        r = find(reports, "large_1k_bf16", "bfloat16", "sm_90", False, scale)
        n_exponentials = count(r, "MUFU.EX2")
        holds = 32 * per_element <= n_exponentials <= 32 * per_element + 6
        assert_or_report(holds, f"{n_exponentials} exponentials a thread of 32 elements, scale {scale}")


def test_the_loss_of_a_row_is_computed_once(reports):
    """Not in every lane that has a part of the row: a logarithm for each of a thread's rows, four of 512 here."""
    r = find(reports, "short_8", "float32", "sm_90", False, 1.0)
    n_slow = count(r, "MUFU.LG2") + count(r, "MUFU.RCP")
    assert_or_report(n_slow <= 4 * 4 + 2, f"{n_slow} logarithms and reciprocals a thread of four rows")


def test_eviction_hints_of_a_loop(reports):
    """The first reading stays in cache for the second, which with the gradient's writing goes first."""
    r = find(reports, "large_64k_bf16", "bfloat16", "sm_80", False, 1.0)
    assert count(r, "LDG", containing=".EL") == count(r, "LDG", containing=".EF") == wide_accesses(r)
    assert stores_once(r) and count(r, "STG", containing=".EF") >= wide_accesses(r)


def test_logits_and_probabilities_are_read_once_and_16_bytes_at_a_time(reports):
    """In a tile or on a cluster; in a loop the logits three times and the probabilities twice."""
    checked = set()
    for r in of_nvidia(reports, "expectation_kernel"):
        if not is_aligned(r) or r["case"][3] or r["case"][4] != 1 or r["arguments"]["target_stride_class"] != 1:
            continue
        elements = r["arguments"]["BLOCK_ROWS"] * r["arguments"]["BLOCK_CLASSES"]
        of_targets = elements * (2 if r["case"][0].endswith("k_bf16") and r["case"][0] != "soft_1k_bf16" else 4)
        of_targets //= 16 * 32 * r["num_warps"] * r["num_ctas"]
        is_loop = r["arguments"]["CLASS_BLOCKS"] > 1
        expected = 3 * wide_accesses(r) + 2 * of_targets if is_loop else wide_accesses(r) + of_targets
        per_class = elements // r["arguments"]["BLOCK_ROWS"] * 4 // 16  # margins, for each thread at most
        assert expected <= count(r, "LDG", containing=".128") <= (3 if is_loop else 1) * (expected + per_class), r[
            "case"
        ]
        checked.add((r["case"][0], r["case"][1], is_loop))
    assert len(checked) >= 6


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("problem", ["large_32k_bf16", "large_64k_bf16", "large_128k_bf16", "large_256k_bf16"])
def test_long_rows_are_read_once_by_a_cluster(reports, target, problem):
    """Where this Triton has clusters; elsewhere a loop reads them twice, or one multiprocessor holds the row."""
    for dtype in "bfloat16", "float32":
        r = find(reports, problem, dtype, target, False, 1.0)
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
            assert r["num_ctas"] > 1 and r["arguments"]["CLASS_BLOCKS"] == 1
            # Other CTAs' shared memory is written or read between barriers of the cluster.
            assert count(r, "UCGABAR_ARV", "UCGABAR_WAIT") >= 2
        else:
            assert r["num_ctas"] == 1
            assert (r["arguments"]["CLASS_BLOCKS"] > 1) == (problem != "large_32k_bf16")
    assert find(reports, problem, "bfloat16", "sm_80", False, 1.0)["num_ctas"] == 1
