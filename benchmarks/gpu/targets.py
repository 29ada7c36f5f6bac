"""The targets: how our time and memory should compare with others', and how far they do."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.contenders import COMPILED, CROSS_ENTROPY, EAGER, LIGER, OURS, QUACK
from benchmarks.gpu.measuring import COPY
from benchmarks.timing import Row

Ratio = Callable[[Row, dict[str, Row]], float | None]  # of our row, given all rows of its problem by contender


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of ours to another contender's time, or of memory, on some problems."""

    what: str
    applies: Callable[[Row], bool]  # to our row
    ratio: Ratio
    limit: float


def n_classes(row: Row) -> int:
    return int(row["shape"].split("x")[1])


def n_samples(row: Row) -> int:
    return math.prod(map(int, row["shape"].split("x"))) // n_classes(row)


def is_large(row: Row) -> bool:
    return row["problem"].startswith("large")


def _is_short_or_dense(row: Row) -> bool:
    return row["problem"].startswith(("short", "dense"))


def _is_large_short_or_dense(row: Row) -> bool:
    return is_large(row) or _is_short_or_dense(row)


def _is_tiny(row: Row) -> bool:
    return row["problem"] == "tiny"


def _over(other: str, column: str = "forward_backward_us") -> Ratio:
    """Our time over the other's."""

    def ratio(ours: Row, rows: dict[str, Row]) -> float | None:
        theirs = rows.get(other, {}).get(column)
        return ours[column] / theirs if ours[column] and theirs else None

    return ratio


def _over_one_read(ours: Row, rows: dict[str, Row]) -> float | None:
    """Our forward pass over half a copy."""
    return ours["forward_us"] / (rows[COPY]["forward_backward_us"] / 2) if ours["forward_us"] else None


def _memory(ours: Row, rows: dict[str, Row]) -> float | None:
    """Our peak memory over one gradient."""
    return ours["peak_mib"] / ours["logits_mib"] if ours["peak_mib"] else None


TARGETS = (
    Target("copy, C = 1K to 32K", lambda r: is_large(r) and n_classes(r) <= 32768, _over(COPY), 1.10),
    Target("copy, C = 64K to 256K", lambda r: is_large(r) and n_classes(r) > 32768, _over(COPY), 1.35),
    Target("copy, short rows and dense", _is_short_or_dense, _over(COPY), 1.25),
    Target("F.cross_entropy, N = 32, C = 7, eager mode", _is_tiny, _over(CROSS_ENTROPY, "eager_us"), 1.0),
    Target("eager LMF, N = 32, C = 7, eager mode", _is_tiny, _over(EAGER, "eager_us"), 0.25),
    Target("eager LMF", _is_large_short_or_dense, _over(EAGER), 1 / 8),
    Target("torch.compile LMF", _is_large_short_or_dense, _over(COMPILED), 1 / 2),
    Target("Liger CE", is_large, _over(LIGER), 1 / 1.5),
    Target("QuACK CE", is_large, _over(QUACK), 1 / 1.2),
    Target("one gradient, peak memory", is_large, _memory, 1.01),
    Target("one read, forward alone", _is_large_short_or_dense, _over_one_read, 1.10),
)
HEADER = ("ours over", "target", "met", "median", "worst")


def target_lines(rows: Sequence[Row]) -> list[list[str]]:
    """For each target: how many of its problems meet it, and the worst."""
    problems: dict[str, dict[str, Row]] = {}
    for row in rows:
        problems.setdefault(row["problem"], {})[row["contender"]] = row
    return [_line(target, problems) for target in TARGETS]


def _line(target: Target, problems: dict[str, dict[str, Row]]) -> list[str]:
    ratios = {}
    for name, of_problem in problems.items():
        if OURS in of_problem and target.applies(of_problem[OURS]):
            ratio = target.ratio(of_problem[OURS], of_problem)
            if ratio is not None:
                ratios[name] = ratio
    if not ratios:
        return [target.what, f"{target.limit:.3g}", "not measured", "-", "-"]
    worst, largest = max(ratios.items(), key=lambda item: item[1])
    met = sum(ratio <= target.limit for ratio in ratios.values())
    median = sorted(ratios.values())[len(ratios) // 2]
    counts = f"{met} of {len(ratios)}"
    return [target.what, f"{target.limit:.3g}", counts, f"{median:.3g}", f"{largest:.3g} ({worst})"]


def markdown(rows: Sequence[Row], environment: dict) -> str:
    """The targets as a page, with what they were measured on."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(line) + " |" for line in target_lines(rows)]
    return "\n".join([*lines, "", ", ".join(f"{name} {value}" for name, value in environment.items()), ""])
