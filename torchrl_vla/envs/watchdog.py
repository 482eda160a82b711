"""Environments in processes that are watched: one that dies or hangs is replaced, and its episodes are given up."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data.utils import CloudpickleWrapper
from torchrl.envs import EnvBase, EnvCreator, ParallelEnv
from torchrl.envs.utils import clear_mpi_env_vars

from torchrl_vla.envs.processes import make_process
from torchrl_vla.envs.worker import Channel, serve
from torchrl_vla.errors import UserError

__all__ = ["WatchedParallelEnv"]

logger = logging.getLogger(__name__)

#: A worker may fail so often, with fewer commands than `_CALM` done in between, before the environment gives up.
_MAX_FAILURES = 3
_CALM = 2000  # more than any episode has, or one that ends its worker each time would be tried for ever
#: A start or a reset may take so many times as long as a step: libraries are loaded and models compiled.
_START_PATIENCE = 5


class WatchedParallelEnv(ParallelEnv):
    """TorchRL's ``ParallelEnv``, in which a worker that dies or does not answer in time is replaced by a new one.

    The new worker starts the episodes of the old one from their beginning. A reset thus simply succeeds. A step cannot
    go on with them: it reports them as truncated, with the reward 0 and their first observation, and
    :attr:`lost_workers` names their workers, so that a collector can drop what it has of them and run them again. The
    other workers' episodes are not touched. A ``ValueError`` of an environment is raised here as it is: asking again
    would not help.

    Args:
        num_workers: number of processes.
        create_env_fn: makes a worker's environment, or one such function per worker.

    Keyword Args:
        worker_timeout: seconds after which a step counts as hanging; five times as long for starts and resets.
        worker_variables: environment variables that each worker sets before it makes its environment.
        options: further arguments of ``ParallelEnv``, except those that turn its shared buffers off.

    Raises:
        ValueError: the timeout is not positive, or there are more or fewer variables than workers.
        RuntimeError: a worker failed three times in a row; the message says how.

    Examples:
        >>> make = functools.partial(LiberoEnv, "libero_spatial", num_envs=4)  # doctest: +SKIP
        >>> env = WatchedParallelEnv(4, make, worker_timeout=60.0)  # doctest: +SKIP
    """

    def __init__(
        self,
        num_workers: int,
        create_env_fn: Callable[[], EnvBase] | Sequence[Callable[[], EnvBase]],
        *,
        worker_timeout: float = 120.0,
        worker_variables: Sequence[Mapping[str, str]] | None = None,
        **options: Any,
    ) -> None:
        if not worker_timeout > 0:
            raise UserError(f"worker_timeout must be positive, got {worker_timeout}: it is in seconds.")
        if worker_variables is not None and len(worker_variables) != num_workers:
            raise UserError(f"worker_variables must be one per worker, got {len(worker_variables)} for {num_workers}.")
        # Daemons, so that a program that ends without closing this does not wait for them for ever.
        super().__init__(num_workers, create_env_fn, use_buffers=True, **{"daemon": True, **options})
        self.worker_timeout = worker_timeout
        self._variables = worker_variables or [{}] * num_workers
        #: Workers that were replaced during the last step, so that their episodes are lost.
        self.lost_workers: frozenset[int] = frozenset()
        self._stepping = False
        self._gave_up = False
        self._static_seed = False
        self._lost: set[int] = set()

    def __getitem__(self, item: Any) -> EnvBase:
        raise TypeError(
            "A WatchedParallelEnv cannot be indexed: a view of some workers would not know which of them were "
            "replaced. Step a part of it through the '_step' mask, or index a ParallelEnv."
        )

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seed all workers, those that take the place of dead ones too."""
        self._replace_the_dead()
        self._static_seed = static_seed
        return super().set_seed(seed, static_seed)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close all workers."""
        # Whoever closes it after it gave up, and closed itself, should see that error and no other.
        super().close(raise_if_closed=raise_if_closed and not self._gave_up)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        self._replace_the_dead()
        state = super()._reset(tensordict, **kwargs)
        mask = None if tensordict is None else tensordict.get("_reset", None)
        # Nothing is lost where all episodes of a worker start anew.
        self._lost = {index for index in self._lost if mask is not None and not mask[index].all()}
        return state

    def _reset_proc_data(self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase) -> TensorDictBase:
        if tensordict is None:
            return super()._reset_proc_data(tensordict, tensordict_reset)
        # Workers were given what the tensordict holds, and have chosen between it and what they reset. TorchRL chooses
        # once more, by a mask over all pixels of all slots.
        chosen = [key for key in tensordict_reset.keys(True, True) if key not in self.reset_keys]
        tensors = tensordict_reset.select(*chosen)
        rest = tensordict.exclude(*chosen, inplace=True)
        return super()._reset_proc_data(rest, tensordict_reset.exclude(*chosen)).update(tensors)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._replace_the_dead()
        self.lost_workers = frozenset()
        self._stepping = True
        try:
            return super()._step(tensordict)
        finally:
            self._stepping = False

    #: A step and then a reset: TorchRL's single command for both could not tell which of them a worker died in.
    step_and_maybe_reset = EnvBase.step_and_maybe_reset

    def _start_workers(self) -> None:
        """Start all workers; ``close`` makes up for the change of the number of threads."""
        torch.set_num_threads(self.num_threads or max(1, torch.get_num_threads() - self.num_workers))
        self._context = multiprocessing.get_context(self._mp_start_method)
        self.event = None
        self._timeout = _START_PATIENCE * self.worker_timeout
        everyone = range(self.num_workers)
        self._workers: list[Any] = [None for _ in everyone]
        self._events: list[Any] = [None for _ in everyone]
        self.parent_channels: list[Any] = [None for _ in everyone]
        self._starting: set[int] = set()
        self._lost = set()
        self._failures = [0 for _ in everyone]
        self._commands_done = [0 for _ in everyone]
        # What a new worker does first: a reset to the episodes of the old one.
        self._first_commands: list[Any] = [None for _ in everyone]
        for index in everyone:
            self._launch(index)
        self.is_closed = self._gave_up = False
        self._wait_for_workers(everyone)
        self.set_spec_lock_()

    def _launch(self, index: int) -> None:
        connection, worker_connection = self._context.Pipe()
        done, worker_done = self._context.Pipe(duplex=False)
        self._events[index] = self._context.Event()
        make = self.create_env_fn[index]
        options = {
            "parent_pipe": connection,
            "env_fun": make if isinstance(make, (EnvCreator, CloudpickleWrapper)) else CloudpickleWrapper(make),
            "env_fun_kwargs": self.create_env_kwargs[index],
            "mp_event": self._events[index],
            "shared_tensordict": self.shared_tensordicts[index],
            "_selected_input_keys": self._selected_input_keys,
            "_selected_reset_keys": self._selected_reset_keys,
            "_selected_step_keys": self._selected_step_keys,
            "_non_tensor_keys": self._non_tensor_keys,
            "non_blocking": self.non_blocking,
            "num_threads": self.num_sub_threads,
            "filter_warnings": self._filter_warnings_subprocess(),
            "worker_idx": index,
        }
        process = make_process(
            serve,
            worker_connection,
            worker_done,
            method=self._mp_start_method,
            variables=self._variables[index],
            **options,
        )
        process.daemon = self.daemon
        with clear_mpi_env_vars():
            process.start()
        worker_connection.close()
        worker_done.close()
        self._workers[index] = process
        self.parent_channels[index] = Channel(connection, done)
        self._starting.add(index)

    def _wait_for_workers(self, workers_range: Iterable[int]) -> None:
        """Wait until workers have done what they were told, replacing those that do not."""
        indices = list(workers_range)
        start_patience = _START_PATIENCE * self.worker_timeout
        patience = dict.fromkeys(indices, self.worker_timeout if self._stepping else start_patience)
        asked = dict.fromkeys(indices, time.monotonic())
        while asked:
            deadline = min(asked[index] + patience[index] for index in asked)
            heard = {source: index for index in asked for source in self._sources(index)}
            ready = {heard[source] for source in wait(list(heard), max(0.0, deadline - time.monotonic()))}
            for index in [index for index in ready if self._is_done(index)]:
                del asked[index]
            for index in list(asked):
                failure = self._failure(index) if index in ready else None
                if failure is None and time.monotonic() > asked[index] + patience[index]:
                    failure = f"did not answer within {patience[index]:g} s"
                if failure is not None:
                    self._replace(index, failure)
                    patience[index], asked[index] = start_patience, time.monotonic()
        if self._stepping:
            self.lost_workers = frozenset(self._lost.intersection(indices))
            self._lost -= self.lost_workers
            for index in self.lost_workers:
                self._truncate(index)

    def _sources(self, index: int) -> tuple[Any, ...]:
        """Return what becomes ready when a worker has something to say, or has ended."""
        # It says that it is done before it sends what is not a tensor.
        speaks = index in self._starting or self._non_tensor_keys
        channel = self.parent_channels[index]
        return channel.connection if speaks else channel.done, self._workers[index].sentinel

    def _is_done(self, index: int) -> bool:
        """Whether a worker has nothing left to do; tells one that has just started what to do."""
        if index in self._starting:
            return self._welcome(index)
        channel = self.parent_channels[index]
        if (self._non_tensor_keys and not channel.poll()) or not channel.take_done():
            return False
        self._commands_done[index] += 1
        if self._commands_done[index] >= _CALM:
            self._failures[index] = 0
        return True

    def _welcome(self, index: int) -> bool:
        channel = self.parent_channels[index]
        if not channel.poll() or channel.receive() != "started":
            return False
        self._starting.remove(index)
        channel.send(("init", None))
        if self._seeds is not None:
            channel.send(("seed", (self._seeds[index], self._static_seed)))
            if channel.poll(self.worker_timeout):
                channel.receive()
        if self._first_commands[index] is None:
            return True
        channel.send(self._first_commands[index])
        return False

    def _failure(self, index: int) -> str | None:
        """How a worker ended, in words that follow its name; None while it lives.

        Raises:
            ValueError: its environment raised one.
        """
        process, channel = self._workers[index], self.parent_channels[index]
        if process.is_alive():
            return None
        while channel.error is None and channel.poll():
            if channel.receive() is None:
                break
        if channel.error is None:
            if process.exitcode is not None and process.exitcode < 0:
                return f"was ended by {signal.Signals(-process.exitcode).name}"
            return f"ended with exit code {process.exitcode}"
        is_value_error, message, text = channel.error
        if is_value_error:
            self._give_up()
            raise UserError(message) from RuntimeError(f"in worker {index}:\n{text}")
        return f"raised an error:\n{text}"

    def _replace(self, index: int, failure: str) -> None:
        """Start a new worker in the place of another one.

        Raises:
            RuntimeError: that does not help.
        """
        self._failures[index] += 1
        self._commands_done[index] = 0
        if self._failures[index] >= _MAX_FAILURES:
            self._give_up()
            raise RuntimeError(
                f"Environment worker {index} failed {_MAX_FAILURES} times in a row. The last time it {failure}. EGL "
                "drivers can deadlock: MUJOCO_GL=osmesa renders on the CPU instead. SIGKILL mostly means that memory "
                f"ran out: run fewer environments or workers. A slow machine needs a worker_timeout above "
                f"{self.worker_timeout:g} s."
            )
        logger.warning("Environment worker %d %s. It is replaced, and its episodes start again.", index, failure)
        channel = self.parent_channels[index]
        self._workers[index].kill()  # ends a stopped process too
        self._workers[index].join()
        channel.close()
        if channel.command is not None:
            self._first_commands[index] = self._restart(channel.command)
        self._lost.add(index)
        self._launch(index)

    def _give_up(self) -> None:
        self._gave_up = True
        for process in self._workers:
            process.kill()
        self.close()

    def _restart(self, command: tuple[str, Any]) -> tuple[str, Any]:
        """Return the reset that brings a new worker to the start of the episodes that it was told to run.

        The workers' shared memory still holds what they were, in the entries of the state.
        """
        name, data = command
        if name != "reset":
            return "reset", (list(self.state_spec.keys(True, True)), {})
        keys, arguments = data
        return "reset", (keys and [key for key in keys if key != "_reset"], arguments)

    def _truncate(self, index: int) -> None:
        """Report a worker's episodes as truncated, at the observation that its reset gave."""
        shared = self.shared_tensordicts[index]
        following = shared.get("next")
        following.update_(shared.exclude("next").select(*following.keys(True, True), strict=False))
        for key in self.done_keys:
            following.get(key).fill_("terminated" not in key)
        for key in self.reward_keys:
            following.get(key).zero_()

    def _replace_the_dead(self) -> None:
        """Replace workers that have ended since the last command."""
        if self.is_closed:
            return
        while dead := {index: failure for index in range(self.num_workers) if (failure := self._failed(index))}:
            for index, failure in dead.items():
                self._replace(index, failure)
            self._wait_for_workers(dead)

    def _failed(self, index: int) -> str | None:
        """As :meth:`_failure`; also where a command was interrupted, whose end would be taken for the next one's."""
        if (self.parent_channels[index].busy or index in self._starting) and self._workers[index].is_alive():
            return "was interrupted in the middle of a command, or of its start"
        return self._failure(index)

    def _shutdown_workers(self) -> None:
        for channel in self.parent_channels:
            channel.send(("close", None))
        deadline = time.monotonic() + self.shutdown_timeout
        # TorchRL closes those that it finds dead.
        self._workers = [process for process in self._workers if not process._closed]
        for process in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
        self._terminate_and_join_workers(self._workers, timeout=2.0)
        for channel in self.parent_channels:
            channel.close()
        del self.shared_tensordicts, self.shared_tensordict_parent, self._workers, self.parent_channels
