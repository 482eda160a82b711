"""A worker of :class:`~torchrl_vla.envs.watchdog.WatchedParallelEnv`: its life, and the pipes to it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from torchrl.envs.batched_envs import _run_worker_pipe_shared_mem

__all__ = ["Channel", "serve"]


class Channel:
    """The pipes to a worker, which may be dead: that is noticed while its answer is waited for, not when it is told."""

    def __init__(self, connection: Connection, done: Connection) -> None:
        self.connection = connection
        #: Where the worker says that a command is done.
        self.done = done
        #: The last command to the environment, and whether its end is still to be heard of.
        self.command: tuple[str, Any] | None = None
        self.busy = False
        #: What the worker said when it ended: whether it was a ValueError, the message, the traceback.
        self.error: tuple[bool, str, str] | None = None

    def send(self, command: tuple[str, Any]) -> None:
        """Send a command; a worker that has ended does not get it."""
        if command[0] in ("reset", "step"):
            while self.take_done():  # for a command that nobody waited for in this way
                pass
            self.command, self.busy = command, True
        with contextlib.suppress(OSError):
            self.connection.send(command)

    def receive(self) -> Any:
        """Return the next message; None at the end of the pipe."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(message, _WorkerError):
            self.error = message.content
        return message

    def recv(self) -> Any:
        """Return the next message, for TorchRL, which takes it apart.

        Raises:
            RuntimeError: the worker has ended; the message holds its own words.
        """
        message = self.receive()
        if message is None or isinstance(message, _WorkerError):
            words = f":\n{self.error[2]}" if self.error else "."
            raise RuntimeError(f"An environment worker ended before it answered{words}")
        return message

    def poll(self, seconds: float = 0.0) -> bool:
        """Return whether a message can be received, waiting for it as long as given."""
        try:
            return self.connection.poll(seconds)
        except OSError:
            return False

    def take_done(self) -> bool:
        """Whether the worker has done something; says so once."""
        try:
            done = self.done.poll() and bool(self.done.recv_bytes())
        except (EOFError, OSError):
            return False
        self.busy = self.busy and not done
        return done

    def close(self) -> None:
        """Close both pipes."""
        self.connection.close()
        self.done.close()


class _DoneFlags:
    """Takes the place of TorchRL's shared flags, for which one can only look again and again."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __setitem__(self, index: int, done: int) -> None:
        with contextlib.suppress(OSError):
            self._connection.send_bytes(b"done")


class _WorkerError:
    """How a worker ended."""

    def __init__(self, error: Exception) -> None:
        # Not the error itself, which need not survive the way through the pipe.
        self.content = (isinstance(error, ValueError), str(error), "".join(traceback.format_exception(error)))


def serve(connection: Connection, done: Connection, **options: Any) -> None:
    """Run TorchRL's loop in a worker, and report the error if it ends in one.

    Args:
        connection: brings commands, takes answers.
        done: says that a command is done.
        options: of TorchRL's loop.
    """
    # What asks a run to end often reaches all its processes, from a terminal's Ctrl-C to a scheduler's notice: the
    # parent closes its workers when it is ready, and they end by themselves where it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        _run_worker_pipe_shared_mem(child_pipe=connection, shm_done_flags=_DoneFlags(done), **options)
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(_WorkerError(error))
        sys.stderr.flush()
        # At once: a driver or a thread that hangs at the end of a process would keep the words from being heard.
        os._exit(1)
