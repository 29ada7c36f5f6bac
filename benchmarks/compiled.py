"""What the compiler makes of every launch that lmf_triton would do for a problem: needs no GPU.

    python -m benchmarks.compiled [--target sm_90] [--problems large_1k_bf16 dense_19] [--dtype bfloat16]

``recorded_launches`` runs the package on meta tensors and writes down each kernel launch instead of doing it, so what
is compiled here is what a GPU would be given, with the specialisation that Triton would choose.
"""

import argparse
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
from lmf_triton import gpu, kernels
from lmf_triton.options import LossOptions

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNELS = ("totals_kernel", "statistics_kernel", "forward_kernel", "backward_kernel", "upstream_kernel")
LMF = LossOptions(alpha=1.0, beta=1.0, gamma=1.5, scale=1.0, ignore_index=-100, reduction="mean")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its programs, its arguments in the kernel's order, and the compiler's options."""

    kernel: str
    n_programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def __str__(self) -> str:
        blocks = [self.arguments[f"BLOCK_{axis}"] for axis in ("ROWS", "CLASSES") if f"BLOCK_{axis}" in self.arguments]
        warps = self.options.get("num_warps", 4)
        return f"{self.kernel.removesuffix('_kernel')} {'x'.join(map(str, blocks))}/{warps}w"


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes and does, from cuobjdump."""

    registers: int  # a thread
    stack: int  # bytes a thread; above 0 is a spill
    shared: int  # bytes a program
    instructions: Counter  # by SASS mnemonic, with its modifiers

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


def recorded_launches(
    problem: Problem, options: LossOptions = LMF, *, dtype: torch.dtype | None = None, recompute: bool = False
) -> list[Launch]:
    """The launches of one forward and backward, in order, recorded on meta tensors."""
    dtype = dtype or problem.dtype
    n_classes = problem.shape[1]
    logits = torch.empty(problem.shape, dtype=dtype, device="meta")
    target = torch.empty(problem.shape[:1] + problem.shape[2:], dtype=problem.target_dtype, device="meta")
    margins = torch.empty(n_classes, device="meta")
    launches: list[Launch] = []

    def recorder(name: str):
        kernel = getattr(kernels, name)

        class Recorder:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                    options = {key: arguments.pop(key) for key in kwargs if key not in kernel.arg_names}
                    launches.append(Launch(name, grid[0], arguments, options))

                return launch

        return kernel, Recorder()

    originals = {}
    try:
        for name in KERNELS:
            originals[name], stand_in = recorder(name)
            setattr(kernels, name, stand_in)
        loss, grad, saved = gpu.forward(
            logits, target, margins, None, options, with_grad=not recompute, with_saved=recompute
        )
        if recompute:
            gpu.backward(saved, torch.empty_like(loss), options)
        else:
            gpu.apply_upstream(grad, torch.empty_like(loss), in_place=True)
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)
    return launches


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compile a recorded launch for a target, specialised as Triton's own launcher does it."""
    kernel = getattr(kernels, launch.kernel)
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
    registers, stack, shared = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "SHARED"))
    return Report(registers, stack, shared, Counter(mnemonics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--target", choices=[name for name in TARGETS if name != "gfx942"], default="sm_90")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32", "float64"], help="instead of its own")
    parser.add_argument("--recompute", action="store_true", help="grad_in_forward=False")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    header = ("problem", "launch: rows x classes / warps", "programs", "registers", "spill bytes", "shared bytes")
    header += ("instructions", "loads of 16 bytes", "other", "stores of 16 bytes", "other", "special functions")
    lines = []
    for name in arguments.problems:
        for launch in recorded_launches(PROBLEMS[name], dtype=dtype, recompute=arguments.recompute):
            r = report(compile_launch(launch, TARGETS[arguments.target]))
            loads, stores = r.count("LDG.E.128"), r.count("STG.E.128")
            cells = [name, launch, launch.n_programs, r.registers, r.stack, r.shared, r.instructions.total()]
            cells += [loads, r.count("LDG") - loads, stores, r.count("STG") - stores, r.count("MUFU")]
            lines.append([str(cell) for cell in cells])
    print(format_table(header, lines))
    print(f"\ntriton {triton.__version__} for {arguments.target}; instructions as they stand in the code of a thread")


if __name__ == "__main__":
    main()
