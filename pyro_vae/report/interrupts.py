"""Ctrl-C, noted on its way: `log_evidence` returns what is finished and does not say that it was interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Watch:
    """Whether Ctrl-C came."""

    came = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Ctrl-C ends what is inside, and nothing else."""
        try:
            yield
        except KeyboardInterrupt:
            self.came = True


@contextmanager
def watched() -> Iterator[Watch]:
    """A watch for the time of the block; off the main thread, where no signal arrives, it sees none."""
    watch, before = Watch(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield watch
        return

    def note(number: int, frame: FrameType | None) -> None:
        watch.came = True
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGINT, before)
