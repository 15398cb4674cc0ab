"""SIGINT and SIGTERM during a fit: noted, acted on between two steps, handlers given back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Which signal asked the run to stop; None as long as none did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def leave(self) -> None:
        """Leave as the signal would have: `KeyboardInterrupt`, or `SystemExit` with the shell's code for it."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextmanager
def noted(*, active: bool) -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM; a second one acts at once. Nothing is caught outside of the main thread."""
    stop = Stop()
    if not active or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        stop.signal = number

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
