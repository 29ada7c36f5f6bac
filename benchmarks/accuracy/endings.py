"""How a command ends before its time: with one message and an exit status, and never in the middle of a file.

==========  ==========================================================================================
status      what happened
==========  ==========================================================================================
0           all is done
2           something that the user can put right: the message says what
3           all is done, but a training diverged
128 + n     signal n: 130 after Ctrl-C, 143 after ``kill``, 129 where the terminal was closed; and 141 where
            nobody reads the output any more, as with ``| head``
==========  ==========================================================================================
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import torch

USER_FAULT, DIVERGED = 2, 3
CLOSED_PIPE = 141
OF_SIGNAL = 128
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two


class Interrupted(KeyboardInterrupt):
    """A signal to end, and from where it is known what it leaves, a message."""

    def __init__(self, number: int = signal.SIGINT, message: str = "Interrupted.") -> None:
        super().__init__(message)
        self.number = number


def run(main: Callable[[], int | None], user_errors: tuple[type[BaseException], ...]) -> None:
    """Call a command; what its user can put right, and an end from outside, is said without a traceback."""
    _show_whatever_the_encoding()
    with _interrupted_by_signals():
        try:
            status = main()
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _drop_what_cannot_be_written()
            sys.exit(CLOSED_PIPE)
        except user_errors as error:
            _end(str(error), USER_FAULT)
        except KeyboardInterrupt as interrupt:
            _ignore_signals()
            number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
            _end(str(interrupt) or "Interrupted.", OF_SIGNAL + number)
        except (MemoryError, torch.OutOfMemoryError) as error:
            _end(f"Not enough memory: {str(error).splitlines()[0] if str(error) else 'no more is left'}", USER_FAULT)
        except OSError as error:
            if error.filename is None:
                raise
            _end(f"{os.fsdecode(error.filename)}: {error.strerror}", USER_FAULT)
        if status:
            sys.exit(status)


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait until what is being written is written."""
    if threading.current_thread() is not threading.main_thread():  # which alone has them
        yield
        return
    came: list[int] = []
    former = {number: signal.getsignal(number) for number in SIGNALS}
    former = {number: handler for number, handler in former.items() if handler not in (None, signal.SIG_IGN)}
    for number in former:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """End by each of ``SIGNALS`` as by Ctrl-C, where it is not ignored, as ``nohup`` ignores one."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [n for n, handler in former.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, former[number])


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


def _ignore_signals() -> None:
    """For the last words: a second Ctrl-C has nothing left to end."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def _end(message: str, status: int) -> NoReturn:
    if sys.stderr is not None:
        behind_a_bar = status > OF_SIGNAL and sys.stderr.isatty()
        with suppress(BrokenPipeError):
            print("\n" * behind_a_bar + message, file=sys.stderr, flush=True)
    _drop_what_cannot_be_written()
    sys.exit(status)


def _show_whatever_the_encoding() -> None:
    """What a terminal cannot show is replaced: no table is lost to a letter, after hours of training."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_what_cannot_be_written() -> None:
    """What cannot be written, Python would try to write once more at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
