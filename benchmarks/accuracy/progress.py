"""How far a command is: a bar on a terminal, and in a log a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 60  # between two lines of a log, whichever loop they are of
_started = time.monotonic()
_last_line = _started

Item = TypeVar("Item")


def bar(
    items: Iterable[Item],
    title: str,
    *,
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    leave: bool = False,
) -> Iterable[Item]:
    """The items, with a word on standard error on how many of them are done.

    Args:
        items: what is looped over.
        title: what is done with them.
        unit: what one of them is.
        total: how many there are in all, where the items do not say.
        initial: how many were done before.
        leave: keep the bar when all is done: that of the outermost loop.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _is_terminal():
        return tqdm(items, title, total=total, initial=initial, unit=unit, leave=leave)
    return _with_lines(items, title, unit, total, initial)


def say(text: str) -> None:
    """Write a line to standard error, above the bars. A log that takes no more, on a full disk, ends no training."""
    if sys.stderr is None:
        return
    try:
        if _is_terminal():
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _with_lines(items: Iterable[Item], title: str, unit: str, total: int | None, initial: int) -> Iterator[Item]:
    global _last_line
    of_total = "" if total is None else f" of {total}"
    for n_done, item in enumerate(items, initial + 1):
        yield item
        now = time.monotonic()
        if now - _last_line >= LINE_SECONDS:
            _last_line = now
            say(f"{title}: {n_done}{of_total} ({unit}), {(now - _started) / 60:.0f} min since the start")
