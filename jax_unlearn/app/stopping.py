"""SIGINT and SIGTERM as an exception, at once or when a step is done."""

import _thread
import atexit
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["Interrupted", "StopSignals", "stop_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A command was asked to stop.

    Attributes:
      signal: the number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """What was received; raises `Interrupted` unless held.

    Attributes:
      received: numbers of the signals so far.
    """

    def __init__(self, message: str) -> None:
        self.received: list[int] = []
        self._message, self._held = message, False

    def __call__(self, number: int, frame: object) -> None:
        """The handler. A second signal is never held: somebody is in a hurry."""
        self.received.append(number)
        if not self._held or len(self.received) > 1:
            raise Interrupted(self._message, number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Only collects the first signal inside the block, which looks at `received` itself."""
        self._held = True
        try:
            yield
        finally:
            self._held = False


@contextlib.contextmanager
def stop_signals(message: str) -> Iterator[StopSignals]:
    """Handles SIGINT and SIGTERM inside the block; elsewhere than in the main thread nothing.

    Args:
      message: of the `Interrupted` that is raised.
    """
    signals = StopSignals(message)
    try:
        previous = [signal.signal(number, signals) for number in _SIGNALS]
    except ValueError:  # Not the main thread: signals are somebody else's business.
        yield signals
        return
    _ignore_at_exit()
    before, timers = sys.unraisablehook, []

    def hook(unraisable: Any) -> None:
        # Raised where Python lets nothing through, in a destructor or a callback of the garbage
        # collector: the signal comes once more.
        if isinstance(unraisable.exc_value, Interrupted):
            timer = threading.Timer(0.05, _thread.interrupt_main, (unraisable.exc_value.signal,))
            timer.daemon = True
            timers.append(timer)
            timer.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield signals
        if any(timer.is_alive() for timer in timers):
            raise Interrupted(message, signals.received[-1])
    finally:
        for timer in timers:
            timer.cancel()
        if sys.unraisablehook is hook:
            sys.unraisablehook = before
        for number, handler in zip(_SIGNALS, previous, strict=True):
            signal.signal(number, handler)


@functools.cache
def _ignore_at_exit() -> None:
    """What a command has done stands: a signal while Python ends changes no exit status."""

    def ignore() -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    atexit.register(ignore)
