"""Signals as an exception, where Python itself would lose it."""

import os
import signal
import time

import pytest

from jax_unlearn.app.stopping import Interrupted, stop_signals


class Noisy:
    """Python lets no exception out of a destructor."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # Where the handler runs.


def signalled_in_a_destructor(seconds):
    with stop_signals("stopped"):
        noisy = Noisy()
        del noisy
        time.sleep(seconds)


# At 0 seconds the block ends before the signal can come again.
@pytest.mark.parametrize("seconds", [10, 0])
def test_a_signal_in_a_destructor_is_not_lost(seconds):
    with pytest.raises(Interrupted) as raised:
        signalled_in_a_destructor(seconds)
    assert raised.value.signal == signal.SIGTERM


def test_handlers_and_hook_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals("stopped"):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
