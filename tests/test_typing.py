"""Promise: a type checker knows every public name, and finds no fault with the package or with those who use it."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import mypy
import pyright
import pytest

import lmf_triton

ROOT = Path(__file__).parents[1]
USER_CODE = ROOT / "tests" / "typed_user_code.py"

SETUP = """\
import torch
from lmf_triton import DeferredReweighting, FocalLoss, LDAMLoss, LMFLoss, ldam_margins, lmf_loss

counts, logits, target = [3, 2, 1], torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
criterion = LMFLoss(counts)
"""
WRONG_LINES = [
    'criterion.gamma = "1"',
    "criterion.weight = counts",
    "criterion.max_margin = 0.9",
    "FocalLoss().alpha = 0.25",
    "LDAMLoss(counts).beta = 1.0",
    "FocalLoss(alpha=0.25)",
    'LDAMLoss(counts, scale="30")',
    "LMFLoss(counts, 1.0)",
    "gamma: int = FocalLoss().gamma",
    "loss: float = criterion(logits, target)",
    "lmf_loss(logits, target, reduction=3)",
    "lmf_loss(logits, target, gama=2.0)",
    "lmf_loss(logits, target, weight=counts)",
    "lmf_loss(logits, target, normalizer=counts)",
    "criterion.forward(logits, target, normalizer=counts)",
    "criterion.normalizer = 3",
    "criterion.check_target = counts",
    'ldam_margins({"cat": 3, "dog": 2})',
    "DeferredReweighting(criterion, counts)",
    "DeferredReweighting(criterion, counts, start_epoch=1, start_step=1)",
    "DeferredReweighting(lmf_loss, counts, start_epoch=1)",
]


class Error(NamedTuple):
    file: Path
    line: int
    message: str


def mypy_errors(paths: list[Path]) -> list[Error]:
    found = map(json.loads, run(mypy, "--output=json", *map(str, paths)).splitlines())
    return [Error(ROOT / e["file"], e["line"], e["message"]) for e in found if e["severity"] == "error"]


def pyright_errors(paths: list[Path]) -> list[Error]:
    found = json.loads(run(pyright, "--outputjson", "--pythonpath", sys.executable, *map(str, paths)))
    return [
        Error(ROOT / e["file"], e["range"]["start"]["line"] + 1, e["message"])
        for e in found["generalDiagnostics"]
        if e["severity"] == "error"
    ]


def run(tool: ModuleType, *arguments: str) -> str:
    """What a checker prints, with the settings of pyproject.toml."""
    command = [sys.executable, "-m", tool.__name__, *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode in (0, 1), process.stdout + process.stderr  # 1: it found errors; more: it failed
    return process.stdout


@pytest.fixture(scope="module", params=[mypy_errors, pyright_errors], ids=["mypy", "pyright"])
def errors(request, tmp_path_factory) -> list[Error]:
    """Of the package, the user's code and the wrong code; in one run, since most of it goes into reading PyTorch."""
    wrong = tmp_path_factory.mktemp("typing") / "wrong.py"
    wrong.write_text(SETUP + "\n".join(WRONG_LINES) + "\n")
    return request.param([ROOT / "lmf_triton", USER_CODE, wrong])


@pytest.mark.slow
def test_the_package_and_code_that_uses_it_are_clean(errors):
    found = [f"{e.file}:{e.line}: {e.message}" for e in errors if e.file.name != "wrong.py"]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_wrong_code_is_reported(errors):
    """Each line, and no line of those before them."""
    lines = [*SETUP.splitlines(), *WRONG_LINES]
    reported = {e.line for e in errors if e.file.name == "wrong.py"}
    assert [lines[line - 1] for line in sorted(reported)] == WRONG_LINES


def test_the_user_code_uses_every_public_name():
    used = {node.id for node in ast.walk(ast.parse(USER_CODE.read_text())) if isinstance(node, ast.Name)}
    assert set(lmf_triton.__all__) <= used


def test_the_user_code_runs(capsys):
    runpy.run_path(str(USER_CODE), run_name="__main__")
    assert "LMFLoss(n_classes=3" in capsys.readouterr().out
