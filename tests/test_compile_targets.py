"""Promise: typical launches compile for four GPU targets, without spills, and move logits once and 16 bytes at a time.

Compilation does not work in a process whose kernels are interpreted, so it has one of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json
import sys
import torch
from benchmarks.compiled import LMF, PROBLEMS, TARGETS, compile_launch, recorded_launches, report

for name, dtype, target, recompute, scale in json.load(sys.stdin):
    options = LMF._replace(scale=scale)
    for launch in recorded_launches(PROBLEMS[name], options, dtype=getattr(torch, dtype), recompute=recompute):
        compiled = compile_launch(launch, TARGETS[target])
        result = {"case": (name, dtype, target, recompute, scale), "kernel": launch.kernel}
        if target != "gfx942":
            result |= vars(report(compiled))
        print(json.dumps(result))
"""

# One row a program, a row that fills its tile, a loop over classes, C = 1000 (not divisible by 16), aligned short
# rows, unaligned ones, dense.
PROBLEMS = ["large_1k_bf16", "large_32k_bf16", "large_64k_bf16", "imagenet", "short_256", "short_7", "dense_19"]
CASES = [
    *((problem, dtype, "sm_90", 0, 1.0) for problem in PROBLEMS for dtype in ("bfloat16", "float16", "float32")),
    *((problem, "bfloat16", "sm_90", 1, 1.0) for problem in PROBLEMS),
    *((problem, "bfloat16", "sm_90", 0, 30.0) for problem in PROBLEMS),
    *((problem, "bfloat16", target, 0, 1.0) for problem in PROBLEMS for target in ("sm_80", "sm_100", "gfx942")),
    ("large_32k_bf16", "bfloat16", "sm_100", 0, 30.0),
    ("large_1k_bf16", "float64", "sm_90", 0, 30.0),
    ("dense_19", "float64", "sm_90", 1, 30.0),
]


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def of_nvidia(reports: list[dict]) -> list[dict]:
    return [r for r in reports if r["case"][2] != "gfx942"]


def count(report: dict, *prefixes: str) -> int:
    return sum(n for name, n in report["instructions"].items() if name.startswith(prefixes))


def test_every_launch_compiles_for_every_target(reports):
    assert len({tuple(r["case"]) for r in reports}) == len(CASES)
    assert {r["kernel"] for r in reports} == {"totals_kernel", "forward_kernel", "backward_kernel", "upstream_kernel"}


def test_nothing_spills(reports):
    """But for a few bytes in the longest tile, where newer compilers do not fit 64 elements into 128 registers."""
    for r in of_nvidia(reports):
        is_longest = r["case"][0] == "large_32k_bf16" and r["case"][4] == 1.0 and r["kernel"] == "forward_kernel"
        assert r["stack"] <= (64 if is_longest else 0), r


def test_no_float64_arithmetic_for_smaller_logits(reports):
    """A Python float that reaches a kernel as float64 costs 27 times the time (Liger #1362)."""
    for r in of_nvidia(reports):
        if r["case"][1] != "float64":
            assert count(r, "DADD", "DMUL", "DFMA", "DSETP", "F2F.F64", "F2F.F32.F64", "I2F.F64") == 0


# Elements of a tile, over those of a 16-byte access by each thread.
@pytest.mark.parametrize(
    ("problem", "dtype", "accesses"),
    [
        ("large_1k_bf16", "bfloat16", 1024 // 8 // 32),
        ("large_1k_bf16", "float16", 1024 // 8 // 32),
        ("large_1k_bf16", "float32", 1024 // 4 // 32),
        ("large_32k_bf16", "bfloat16", 32768 // 8 // 512),
        ("large_32k_bf16", "float32", 32768 // 4 // 512),
        ("imagenet", "bfloat16", 1024 // 8 // 32),
        ("imagenet", "float32", 1024 // 4 // 32),
        ("short_256", "bfloat16", 4 * 256 // 8 // 128),
        ("dense_19", "bfloat16", 128 * 32 // 8 // 128),
        ("dense_19", "float32", 128 * 32 // 4 // 128),
    ],
)
def test_one_pass_of_wide_loads_and_one_of_wide_stores(reports, problem, dtype, accesses):
    """Exactly as many 128-bit accesses as one reading of the tile and one writing of it take."""
    (r,) = [r for r in reports if r["case"] == [problem, dtype, "sm_90", 0, 1.0] and r["kernel"] == "forward_kernel"]
    assert count(r, "STG.E.128") == accesses
    # The row's own values (x_y, margins, parts of the denominators) are narrow, or few.
    assert accesses <= count(r, "LDG.E.128") <= accesses + 2


def test_the_exponentials_of_the_sum_serve_the_gradient_again(reports):
    """One exponential an element: the tile is not computed twice. 32 elements a thread, and a few of the row."""
    for scale, per_element in ((1.0, 1), (30.0, 2)):
        (r,) = [
            r
            for r in reports
            if r["case"] == ["large_1k_bf16", "bfloat16", "sm_90", 0, scale] and r["kernel"] == "forward_kernel"
        ]
        assert 32 * per_element <= count(r, "MUFU.EX2") <= 32 * per_element + 6
