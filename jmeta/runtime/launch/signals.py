"""Ctrl-C and other signals of a launch: one exception, and the moments when none may come.

A launch that is interrupted between two steps still knows what it has created.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupted(BaseException):
    """Ctrl-C, or a signal that asks the launcher to end."""


class _Signals:
    # Signals know no arguments: what to do with one is the state of the process.
    holding = False  # for good: a clean-up must not stop half way
    waiting = 0  # until what is being started can be ended
    pending: int | None = None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put signals off; ``raise_pending`` acts on them as soon as what was started is known."""
    _Signals.waiting += 1
    try:
        yield
    finally:
        _Signals.waiting -= 1


def raise_pending() -> None:
    """Act on a signal that was put off, unless it is still to be.

    Raises:
      Interrupted: there was one.
    """
    if _Signals.waiting == 0 and _Signals.pending is not None:
        number, _Signals.pending = _Signals.pending, None
        raise Interrupted(signal.Signals(number).name)


@contextlib.contextmanager
def interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Turn Ctrl-C, SIGTERM and the loss of the terminal into `Interrupted`.

    Args:
      say: told of a signal that comes while nothing may be interrupted.

    Yields:
      A function after whose call signals are ignored: nothing may stop a clean-up half way.
    """

    def handle(number: int, frame: object) -> None:
        if _Signals.holding:
            say("cleaning up already; this takes a moment")
        elif _Signals.waiting:
            _Signals.pending = number
        else:
            raise Interrupted(signal.Signals(number).name)

    def hold() -> None:
        _Signals.holding = True

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _Signals.holding, _Signals.waiting, _Signals.pending = False, 0, None
    previous = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
        previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield hold
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
