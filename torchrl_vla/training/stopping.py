"""Ending well when told to: a signal lets the work at hand finish, so that a checkpoint can be written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

from torchrl_vla.distributed.ranks import ALONE, OneProcess

__all__ = ["StopRequest", "Stopped"]

#: What a terminal, a scheduler and a closed connection send; SIGUSR1 is what schedulers can send before a time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(SystemExit):
    """The work was told to stop; the exit code is 128 + the signal's number, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopRequest:
    """Takes note of signals that ask a process to end, for :meth:`check` to raise where the work may stop.

    A second signal ends the process at once: files are whole, as everything is written beside its place first. Outside
    the main thread, where Python handles no signals, nothing is changed.

    Args:
        what: what will be finished first, for the message.
        ranks: the processes that work together; :meth:`agree` asks them all.

    Examples:
        >>> with StopRequest("the decision at hand") as stop:
        ...     stop.check()
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     try:
        ...         stop.check()
        ...     except Stopped as stopped:
        ...         print(stopped.code)
        143
    """

    def __init__(self, what: str, ranks: OneProcess = ALONE) -> None:
        self.what = what
        self.ranks = ranks
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            Stopped: a signal has come.
        """
        if self.received is not None:
            raise Stopped(self.received)

    def agree(self) -> None:
        """Stop here if any of the processes was asked to; all must call it at the same point.

        Raises:
            Stopped: a signal has come to one of them.
        """
        numbers = [number for number in self.ranks.gather(self.received) if number is not None]
        if numbers:
            raise Stopped(numbers[0])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            os.write(2, f"\n{name} again: leaving at once.\n".encode())
            for process in multiprocessing.active_children():
                process.kill()
            os._exit(128 + number)
        self.received = number
        sys.stderr.flush()
        os.write(2, f"\n{name}: finishing {self.what}, then ending; once more ends at once.\n".encode())
