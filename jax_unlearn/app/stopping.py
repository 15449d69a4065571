"""SIGINT and SIGTERM as an exception, at once or when a step is done."""

import contextlib
import signal
from collections.abc import Iterator

__all__ = ["Interrupted", "StopSignals", "stop_signals"]


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
    signals, numbers = StopSignals(message), (signal.SIGINT, signal.SIGTERM)
    try:
        previous = [signal.signal(number, signals) for number in numbers]
    except ValueError:  # Not the main thread: signals are somebody else's business.
        yield signals
        return
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
