"""SIGINT and SIGTERM during a fit: noted, acted on between two steps, handlers given back."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Which signal asks the run to stop.

    Args:
        alone: whether no other rank has to know before this one stops.

    Attributes:
        came: the first that came to this process; None as long as none did.
        signal: the one to act on: where there are other ranks, one that all of them know of.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self.came: int | None = None
        self.signal: int | None = None

    def note(self, number: int) -> None:
        """A signal has come to this process."""
        self.came = number
        if self._alone:
            self.signal = number

    def flags(self) -> list[float]:
        """What to tell the other ranks: for each of `NUMBERS` 1 where it came to this process, else 0."""
        return [float(self.came == number) for number in NUMBERS]

    def heed(self, flags: list[float]) -> None:
        """Act on what the flags of all ranks say together."""
        for number, flag in zip(NUMBERS, flags, strict=True):
            if flag > 0.0 and self.signal is None:
                self.signal = number

    def leave(self) -> None:
        """Leave as the signal would have: `KeyboardInterrupt`, or `SystemExit` with the shell's code for it."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextmanager
def noted(*, active: bool, alone: bool = True, reply: str = "") -> Iterator[Stop]:
    """Note the first SIGINT or SIGTERM; a second one acts at once. Nothing is caught outside of the main thread.

    Args:
        active: False leaves signals alone.
        alone: see `Stop`.
        reply: printed to stderr at the first one, where the next step may take long.
    """
    stop = Stop(alone=alone)
    if not active or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}

    def note(number: int, frame: FrameType | None) -> None:
        if stop.came is not None:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        stop.note(number)
        if reply:
            print(f"\n{reply}", file=sys.stderr)

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
