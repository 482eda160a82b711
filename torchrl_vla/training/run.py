"""A run while it is open: its folder, its logs, and whether it was told to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torchrl_vla.config import TrainConfig
from torchrl_vla.distributed.ranks import OneProcess
from torchrl_vla.training.health import Health
from torchrl_vla.training.logging import RunLogger, SilentLogger, described
from torchrl_vla.training.run_folder import log_to, open_run_folder
from torchrl_vla.training.run_lock import lock_run
from torchrl_vla.training.stopping import StopRequest

__all__ = ["Run", "open_run"]


class Run(NamedTuple):
    """What the parts of a run share.

    Args:
        folder: where everything is written.
        logger: takes figures, films and sentences.
        stop: whether a signal has asked the run to end.
    """

    folder: Path
    logger: RunLogger
    stop: StopRequest


@contextmanager
def open_run(config: TrainConfig, ranks: OneProcess) -> Iterator[Run]:
    """Make a run's folder, or open the one to resume, for this process alone, and close its logs at the end.

    Args:
        config: the run.
        ranks: the processes of the run, of which only the first one writes.

    Raises:
        ValueError: the folder is not free, or the run in it cannot be resumed with these options.
    """
    finishing = StopRequest("the decision or optimizer step at hand, and a checkpoint", ranks)
    if not ranks.is_first:
        config.run_dir = ranks.gather(None)[0]
        assert config.run_dir is not None
        with finishing as stop:
            yield Run(config.run_dir, SilentLogger(config.run_dir), stop)
        return
    folder = ranks.gather(open_run_folder(config))[0]
    with lock_run(folder), log_to(folder / "train.log"), finishing as stop:
        ppo = config.ppo
        logger = RunLogger(
            folder,
            use_wandb=ppo.use_wandb,
            wandb_entity=ppo.wandb_entity,
            config=described(config),
            health=Health(folder, ppo.val_episodes),
        )
        try:
            yield Run(folder, logger, stop)
        finally:
            logger.close()
