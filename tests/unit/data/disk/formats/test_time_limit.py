"""A library that tries for ever is interrupted, and what was there before is there after."""

import re
import signal
import threading

import pytest

from data.disk.formats.time_limit import TooLongError, at_most


def test_a_pattern_that_never_ends_is_interrupted() -> None:
    with pytest.raises(TooLongError), at_most(0.2):
        re.fullmatch("(.*.*.*.*.*.*.*.*)*X", "model.layers.0.self_attn.q_proj" * 4)


def test_what_ends_in_time_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with at_most(30):
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_another_thread_has_no_limit_and_no_error() -> None:
    done: list[bool] = []

    def work() -> None:
        with at_most(0.001):
            done.append(sum(range(100_000)) > 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
