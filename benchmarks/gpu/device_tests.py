"""The repository's tests on the device, within a time."""

import ast
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from benchmarks import measure

GRACE_SECONDS = 15  # for pytest's summary, once it is told to stop
FIRST_TESTS = ("tests/test_gpu.py",)  # so that they are not the ones left out when the time is up
# These run nothing on the device.
OTHER_TESTS = (
    *(f"tests/{path.name}" for path in (measure.ROOT / "tests").glob("test_accuracy_*.py")),  # of benchmarks.accuracy
    "tests/test_benchmarks.py",
    "tests/test_compile_targets.py",
    "tests/test_typing.py",
)


def run_tests(output: Path, seconds: float) -> bool:
    """Run the tests on the device, their output going to a file; whether all of them passed within the time."""
    workers = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    files = [str(path.relative_to(measure.ROOT)) for path in sorted((measure.ROOT / "tests").glob("test_*.py"))]
    without = {file: missing for file in files if (missing := missing_modules(measure.ROOT / file))}
    rest = [file for file in files if file not in {*FIRST_TESTS, *OTHER_TESTS, *without}]
    deadline = time.monotonic() + seconds
    passed = True
    with output.open("w") as file:
        for arguments in FIRST_TESTS, (*workers, *rest):
            try:
                passed &= _run_pytest(arguments, file, max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                passed = False
                file.write(f"\nstopped after {seconds:.0f} s\n")
                file.flush()
        for name, missing in without.items():
            file.write(f"not run, for want of {', '.join(sorted(missing))}: {name}\n")
    words = ("FAILED", "ERROR", "stopped", "not run")
    lines = output.read_text(errors="replace").splitlines()
    print("\n".join(["tests:", *(line for line in lines if re.search(r" in \d", line) or line.startswith(words)), ""]))
    return passed


def missing_modules(path: Path) -> set[str]:
    """Modules that a test file imports and that are not installed."""
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    roots = {name.partition(".")[0] for name in names} - {"oracle"}  # which lies beside the tests
    return {root for root in roots if importlib.util.find_spec(root) is None}


def _run_pytest(arguments: Sequence[str], file: TextIO, seconds: float) -> bool:
    """Whether pytest passed; subprocess.TimeoutExpired if it took longer than it may, when it is stopped."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *arguments]
    # Its own session, so that its workers end with it.
    process = subprocess.Popen(command, cwd=measure.ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(seconds) == 0
    except BaseException:
        _stop(process)
        raise


def _stop(process: subprocess.Popen) -> None:
    """Interrupt pytest, so that it says what failed; if it does not listen, end it and its workers."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
