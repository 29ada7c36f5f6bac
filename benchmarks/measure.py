"""Time, memory and surroundings of a measurement: what all benchmark scripts share. Needs nothing but torch."""

import csv
import ctypes
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import collect_env

ROOT = Path(__file__).parents[1]
WARMUP_ROUNDS = 3
MIN_ROUNDS = 5
FLUSH_BYTES = 2**30  # more than the L2 cache of any GPU; to write and read it takes an H100 about 0.7 ms
FLUSHES = 4  # the host of an H100 took more than 0.7 ms to launch one step of eager LMF, or ours with its sums
CALLS_PER_GRAPH = 20  # so that the host's work for a replay does not count
CALLS_PER_SAMPLE = 100  # of a launch-bound call on the GPU, so that one synchronisation at the end does not count

# Parameters of mallopt in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# The profiler's own log lines would break up the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Call = Callable[[], object]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor instead of returning it to the system, for this process.

    Otherwise page faults are a good part of any large operation on the CPU, and whose they are is decided by what the
    others freed before.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def host_times(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each call by the host's clock: for the CPU, and on a GPU for what the host's work bounds."""
    repeats = 1 if device.type == "cpu" else CALLS_PER_SAMPLE

    def sample(name: str) -> float:
        call = calls[name]
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    return _medians(calls, sample, seconds)


def device_times(
    calls: dict[str, Call], device: torch.device, seconds: float, prepare: dict[str, Call] | None = None
) -> dict[str, float]:
    """Median seconds of each call by CUDA events, with a cold L2 cache.

    What ``prepare`` has for a call runs before each of its samples, untimed, and its result is the call's argument.
    """
    flush = torch.empty(FLUSH_BYTES // 8, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device)

    def sample(name: str) -> float:
        arguments = (prepare[name](),) if prepare else ()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While this runs, the host gets ahead, so that launches do not count. The reading writes back what the writing
        # left in the cache.
        for _ in range(FLUSHES):
            flush.zero_().sum()
        start.record(stream)
        calls[name](*arguments)
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return _medians(calls, sample, seconds)


def graph_times(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each call when many are replayed from one CUDA graph: no host's work, a warm cache."""
    graphs = {name: _capture(call, device) for name, call in calls.items()}
    times = host_times({name: graph.replay for name, graph in graphs.items()}, device, seconds)
    return {name: time / CALLS_PER_GRAPH for name, time in times.items()}


def _capture(call: Call, device: torch.device) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_ROUNDS):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph


def _medians(names: Iterable[str], sample: Callable[[str], float], seconds: float) -> dict[str, float]:
    """Median sample of each call. The calls take turns, so that whatever else the machine does slows all alike."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(WARMUP_ROUNDS):
        for name in samples:
            sample(name)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < deadline:
        for name in samples:
            samples[name].append(sample(name))
        rounds += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU is always ready."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes of tensors alive at once during the call, its results included, above those alive before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Every allocation of PyTorch's CPU allocator: also those inside operators and in compiled code.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # negative where memory is freed
        peak = max(peak, alive)
    return peak


def device_name(device: torch.device) -> str:
    """Model of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = (
        re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8", errors="replace"))
        if cpuinfo.exists()
        else None
    )
    return model[1] if model else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str | int]:
    """What a result depends on besides the code measured: columns of every result file."""
    return {
        "device": device_name(device),
        "driver": (collect_env.get_nvidia_driver_version(collect_env.run) or "") if device.type == "cuda" else "",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def _commit() -> str:
    """The commit of the code, with a plus if files other than results differ from it; "unknown" outside a clone."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=True
            ).stdout.strip()
            for command in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--", ".", ":!benchmarks/results"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changes else head


def results_folder(device: torch.device) -> Path:
    """Where results of this device are kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return ROOT / "benchmarks" / "results" / slug


def write_csv(path: Path, rows: Sequence[dict], environment: dict) -> None:
    """One line a row, each with the columns of the environment, so that files can be joined."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *environment], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **environment} for row in rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = (
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, rule, *rows)
    )
    return "\n".join(lines)
