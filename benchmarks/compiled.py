"""What the compiler makes of every launch that lmf_triton would do for a problem: needs no GPU.

    python -m benchmarks.compiled [--target sm_90] [--problems large_1k_bf16 dense_19] [--dtype bfloat16]

``recorded_launches`` runs the package on meta tensors and writes down each kernel launch instead of doing it, so what
is compiled here is what a GPU would be given, with the specialisation that Triton would choose.

Times are estimates for an H100, not measurements: of the bytes that a launch moves if caches hold nothing; and of its
special functions and its instructions if each in the code were executed, in a kernel with a loop as often as the loop
turns. The longest of the three is what to look at first; waiting for memory is in none of them.
"""

import argparse
import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.measure import format_table
from benchmarks.problems import PROBLEMS, Problem
from lmf_triton import reduction
from lmf_triton.fused import backend
from lmf_triton.fused.kernels import elementwise, index, probabilities
from lmf_triton.fused.launch import Device
from lmf_triton.options import Inputs, LossOptions

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# A device of each target, for which launches are chosen: A100, H100, B200 and MI300X.
DEVICES = {
    "sm_80": Device(108, (8, 0), backend.TRITON_VERSION),
    "sm_90": backend.H100,
    "sm_100": Device(148, (10, 0), backend.TRITON_VERSION),
    "gfx942": Device(304, None, backend.TRITON_VERSION),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Of the targets, for estimated occupancy: 32-bit registers, threads, and bytes of shared memory of a multiprocessor.
# All three allot registers by 256 to a warp and 1 KiB of shared memory to the system for each program.
REGISTERS, WARPS, PROGRAMS, REGISTER_UNIT, SYSTEM_SHARED = 65536, 64, 32, 256, 1024
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}

# An H100 SXM: bytes a second of a copy as published by its users; clock, and what each of its multiprocessors starts
# per clock: instructions of a warp, and special functions of a thread.
H100_COPY, H100_HERTZ, WARP_INSTRUCTIONS, SPECIAL_FUNCTIONS = 3.0e12, 1.755e9, 4, 16
H100_CLOCKS = backend.H100.n_multiprocessors * H100_HERTZ  # a second, of all of them

# SASS mnemonics by what they use. What is left is control flow, predicates and moves.
INSTRUCTION_MIX = {
    "memory": ("LDG", "STG", "LDS", "STS", "LDC", "ULDC"),
    "special": ("MUFU",),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSEL", "FCHK", "HADD", "HMUL", "HFMA", "DADD", "DMUL", "DFMA"),
    "integer": ("IADD", "IMAD", "IMNMX", "ISETP", "LEA", "LOP", "SHF.", "PRMT", "SEL", "VIADD", "UIADD", "UIMAD"),
    "convert": ("F2F", "I2F", "F2I", "I2FP", "F2FP"),
    "exchange": ("SHFL", "BAR", "REDUX", "MATCH", "VOTE"),
}

# The module of each kernel.
KERNELS = {
    name: module for module in (index, probabilities, elementwise) for name in vars(module) if name.endswith("_kernel")
}
LMF = LossOptions(alpha=1.0, beta=1.0, gamma=1.5, scale=1.0, ignore_index=-100, reduction="mean")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its programs, its arguments in the kernel's order, and the compiler's options."""

    kernel: str
    n_programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def num_warps(self) -> int:
        return self.options.get("num_warps", 4)

    @property
    def n_ctas(self) -> int:
        """Thread blocks: several for each program that spans a cluster."""
        return self.n_programs * self.options.get("num_ctas", 1)

    @property
    def turns(self) -> int:
        """How often the kernel's loop turns, 1 without one."""
        return math.prod(self.arguments.get(name, 1) for name in ("CLASS_BLOCKS", "STEPS"))

    @property
    def bytes_moved(self) -> int:
        """Bytes of its tensors read and written, where the upstream gradient is 1 and caches hold nothing."""
        if self.kernel == "upstream_kernel":
            return 0
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        if self.arguments.get("summaries_ptr") is not None and self.kernel == "forward_kernel":
            del tensors["logits_ptr"]  # but for x_y
        passes = 2 if self.turns > 1 and "grad_ptr" in tensors else 1  # over the logits
        return sum(
            tensor.numel() * tensor.element_size() * (passes if name == "logits_ptr" else 1)
            for name, tensor in tensors.items()
        )

    def __str__(self) -> str:
        blocks = [self.arguments[f"BLOCK_{axis}"] for axis in ("ROWS", "CLASSES") if f"BLOCK_{axis}" in self.arguments]
        name = f"{self.kernel.removesuffix('_kernel')} {'x'.join(map(str, blocks))}/{self.num_warps}w"
        return name if self.n_ctas == self.n_programs else f"{name} on {self.n_ctas // self.n_programs}"


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes and does, from cuobjdump."""

    registers: int  # a thread
    stack: int  # bytes a thread; above 0 is a spill
    shared: int  # bytes a program
    instructions: Counter  # by SASS mnemonic, with its modifiers

    def count(self, *prefixes: str, wide: bool = False) -> int:
        """Instructions that start so; with ``wide``, those of them that move 16 bytes a thread."""
        return sum(
            n for name, n in self.instructions.items() if name.startswith(prefixes) and (not wide or ".128" in name)
        )

    @property
    def mix(self) -> dict[str, int]:
        """Instructions by what they use."""
        counts = {kind: self.count(*prefixes) for kind, prefixes in INSTRUCTION_MIX.items()}
        return counts | {"other": self.instructions.total() - sum(counts.values())}

    def occupancy(self, num_warps: int, target: str) -> float:
        """Share of a multiprocessor's warps that can be resident at once."""
        registers_a_warp = REGISTER_UNIT * triton.cdiv(self.registers * 32, REGISTER_UNIT)
        programs = min(
            REGISTERS // registers_a_warp // num_warps,
            WARPS // num_warps,
            PROGRAMS,
            SHARED[target] // (self.shared + SYSTEM_SHARED),
        )
        return programs * num_warps / WARPS


def recorded_launches(
    problem: Problem,
    options: LossOptions = LMF,
    *,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
    normalized: bool = False,
    per_class: bool = False,
    device: Device = backend.H100,
) -> list[Launch]:
    """The launches of one forward and backward, in order, recorded on meta tensors.

    With ``normalized`` there is a normalizer, with ``per_class`` there are class weights and a logit adjustment.
    """
    dtype = dtype or problem.dtype
    n_classes = problem.shape[1]
    logits = torch.empty(problem.shape, dtype=dtype, device="meta")
    target = torch.empty(problem.target_shape, dtype=problem.target_dtype, device="meta")
    margins = torch.empty(n_classes, device="meta")
    normalizer = reduction.given_totals(1.0, logits) if normalized else None
    launches: list[Launch] = []

    def recorder(name: str):
        kernel = getattr(KERNELS[name], name)

        class Recorder:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                    options = {key: arguments.pop(key) for key in kwargs if key not in kernel.arg_names}
                    launches.append(Launch(name, grid[0], arguments, options))

                return launch

        return kernel, Recorder()

    originals = {}
    launch_device = backend._launch_device
    try:
        backend._launch_device = lambda _: device
        for name in KERNELS:
            originals[name], stand_in = recorder(name)
            setattr(KERNELS[name], name, stand_in)
        keep = "coefs" if recompute else "gradient"
        more = {"weight": margins, "logit_adjustment": margins} if per_class else {}
        inputs = Inputs(logits, target, margins, normalizer=normalizer, **more)
        loss, kept = backend.forward(inputs, options, keep=keep)
        if recompute:
            backend.backward(kept, torch.empty_like(loss), options)
        else:
            backend.apply_upstream(*kept, torch.empty_like(loss), in_place=True)
    finally:
        backend._launch_device = launch_device
        for name, kernel in originals.items():
            setattr(KERNELS[name], name, kernel)
    return launches


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compile a recorded launch for a target, specialised as Triton's own launcher does it."""
    kernel = getattr(KERNELS[launch.kernel], launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, detail = "constexpr", value
        else:
            kind, detail = native_specialize_impl(BaseBackend, value, False, True, True)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = getattr(detail, "value", detail)
        elif detail:
            attributes[(i,)] = BaseBackend.parse_attr(detail)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def report(compiled: CompiledKernel) -> Report:
    """Registers, stack, shared memory and instructions of a kernel that was compiled for an NVIDIA target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    # A line of SASS is "/*0a10*/  @!P0 LDG.E.128 R4, ... ;": address, maybe a predicate, mnemonic, operands.
    mnemonics = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Report(registers, stack, compiled.metadata.shared, Counter(mnemonics))


def h100_seconds(launch: Launch, report: Report) -> dict[str, float]:
    """Estimates of a launch's time on an H100: of its bytes, its special functions, and all its instructions."""
    if launch.kernel == "upstream_kernel":  # with an upstream gradient of 1, only the check is done
        return {"bytes": 0.0, "special": 0.0, "instructions": 0.0}
    warps = launch.n_ctas * launch.num_warps * launch.turns
    return {
        "bytes": launch.bytes_moved / H100_COPY,
        "special": warps * 32 * report.count("MUFU") / (SPECIAL_FUNCTIONS * H100_CLOCKS),
        "instructions": warps * report.instructions.total() / (WARP_INSTRUCTIONS * H100_CLOCKS),
    }


def table_row(problem: Problem, launch: Launch, report: Report, target: str) -> list[str]:
    """The cells of one launch, under ``HEADER``."""
    n_rows = math.prod(problem.shape) // problem.shape[1]
    wide_loads, wide_stores = report.count("LDG", wide=True), report.count("STG", wide=True)
    seconds = h100_seconds(launch, report)
    cells = (
        problem.name,
        launch,
        launch.n_programs,
        report.registers,
        report.stack,
        report.shared,
        f"{report.occupancy(launch.num_warps, target):.0%}",
        f"{wide_loads} + {report.count('LDG') - wide_loads}",
        f"{wide_stores} + {report.count('STG') - wide_stores}",
        "/".join(map(str, report.mix.values())),
        f"{launch.bytes_moved / n_rows:.5g}",
        *(f"{1e6 * value:.3g}" for value in seconds.values()),
        max(seconds, key=seconds.get),
    )
    return [str(cell) for cell in cells]


HEADER = (
    "problem",
    "launch: rows x classes / warps on CTAs",
    "programs",
    "registers",
    "spill bytes",
    "shared bytes",
    "occupancy",
    "loads: of 16 bytes + other",
    "stores",
    "instructions: " + "/".join([*INSTRUCTION_MIX, "other"]),
    "bytes a row",
    "H100 µs: bytes",
    "special functions",
    "instructions",
    "longest",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", choices=[name for name in TARGETS if name != "gfx942"], default="sm_90")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="instead of its own")
    parser.add_argument("--recompute", action="store_true", help="grad_in_forward=False")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    lines = []
    for problem in map(PROBLEMS.get, arguments.problems):
        for launch in recorded_launches(
            problem, dtype=dtype, recompute=arguments.recompute, device=DEVICES[arguments.target]
        ):
            compiled = compile_launch(launch, TARGETS[arguments.target])
            lines.append(table_row(problem, launch, report(compiled), arguments.target))
    print(format_table(HEADER, lines))
    print(f"\ntriton {triton.__version__} for {arguments.target}; instructions as they stand in the code of a thread")


if __name__ == "__main__":
    main()
