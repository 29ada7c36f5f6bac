"""Losses on a named problem, checked, timed and tabulated: what ``speed``, ``gpu`` and ``test_speed`` share."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks import measure
from benchmarks.contenders import Contender, Run
from benchmarks.problems import Problem

Row = dict[str, Any]  # a line of a result file


class Comparison:
    """Contenders on one problem. Those that run and agree with float64 are ``sound``, and are timed."""

    def __init__(self, problem: Problem, contenders: Iterable[Contender], device: torch.device) -> None:
        torch.compiler.reset()  # compile for this shape alone, as one would to train with it
        self.problem, self.device = problem, device
        self.batch = problem.make(device)
        self.runs = {c.name: Run(c, self.batch) for c in contenders if c.takes(problem)}
        self.failures = {name: run.failure() for name, run in self.runs.items()}
        self.sound = {name: run for name, run in self.runs.items() if not self.failures[name]}

    def calls(self, what: str) -> dict[str, measure.Call]:
        """This method of each sound run."""
        return {name: getattr(run, what) for name, run in self.sound.items()}

    def rows(self, facts: Row, seconds: Mapping[str, Mapping[str, float]], also: Sequence[str] = ()) -> list[Row]:
        """A row for each contender: its times in microseconds and peak memory, or why there are none.

        ``facts`` are of the problem, beside its name, shape and dtype. ``seconds`` are the times by column, then by
        contender; the column's name ends in ``_us``. ``also`` was timed, but is no contender.
        """
        peaks = {name: measure.peak_bytes(run.forward_backward, self.device) for name, run in self.sound.items()}
        problem = {
            "problem": self.problem.name,
            "shape": "x".join(map(str, self.problem.shape)),
            "dtype": dtype_name(self.problem.dtype),
        }
        return [
            {
                **problem,
                **facts,
                "contender": name,
                **{column: _rounded(times.get(name), 1e6) for column, times in seconds.items()},
                "peak_mib": _rounded(peaks.get(name), 2**-20),
                "failure": self.failures.get(name, ""),
            }
            for name in (*also, *self.runs)
        ]


def dtype_name(dtype: torch.dtype) -> str:
    """As result files have it."""
    return str(dtype).removeprefix("torch.")


def _rounded(value: float | None, factor: float) -> float | None:
    return None if value is None else float(f"{value * factor:.4g}")


def format_rows(rows: Sequence[Row], times: Mapping[str, str], yardstick: str, compared: Collection[str]) -> str:
    """The rows as a table, and under it why some have no figures.

    ``times`` are the columns to show, with their headings. Those in ``compared`` are shown also as multiples of the
    yardstick's time on the same problem.
    """
    base = {row["problem"]: row for row in rows if row["contender"] == yardstick}
    header = ["problem", "loss"]
    for column, heading in times.items():
        header += [heading, f"× {yardstick}"] if column in compared else [heading]
    lines = []
    for row in rows:
        cells = [f"{row['problem']} {row['shape']} {row['dtype']}", row["contender"]]
        for column in times:
            cells.append(_cell(row[column]))
            if column in compared:
                time, base_time = row[column], base.get(row["problem"], {}).get(column)
                cells.append(f"{time / base_time:.2f}" if time and base_time else "-")
        lines.append([*cells, _cell(row["peak_mib"])])
    notes = [f"{row['problem']}, {row['contender']}: {row['failure']}" for row in rows if row["failure"]]
    return "\n".join([measure.format_table([*header, "peak MiB"], lines), "", *notes])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.10g}"  # all digits of what is rounded already
