"""Promise: every recipe in the docs runs as it stands there, and what it asserts holds."""

import os
import re
import shlex
import subprocess
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # whole trainings, in processes of their own

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ABORTED = "terminate called without an active exception"
ATTEMPTS = 3
RECIPES = dict(section.split("\n", 1) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])


def is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.parametrize("heading", RECIPES)
def test_recipe(heading, tmp_path, request):
    text, script, _ = re.split("^```(?:python\n)?", RECIPES[heading], flags=re.MULTILINE)
    packages = " ".join(re.findall("`pip install (.+?)`", text)).split()
    (command, *_) = re.findall("`((?:python|torchrun) .+?)`", text)

    absent = [package for package in packages if not is_installed(package)]
    if absent:
        message = f"not installed: {', '.join(absent)}"
        pytest.fail(message) if request.config.getoption("--all-recipes") else pytest.skip(message)

    (tmp_path / "train.py").write_text(script)
    environment = os.environ | {
        "PATH": sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::DeprecationWarning:__main__,error::FutureWarning:__main__",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # so small that more threads only slow them down
    }
    environment.pop("TRITON_INTERPRET", None)  # a user has not set it
    for _ in range(ATTEMPTS):
        process = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        # With gloo, PyTorch 2.11 at times aborts a process that has done its work as it exits, which takes the other
        # down: with F.cross_entropy in the loss's place too. Compare pytorch/pytorch #179291.
        if ABORTED not in process.stderr:
            break
    assert process.returncode == 0, process.stdout + process.stderr
