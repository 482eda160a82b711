"""Starts several processes that train together, as torchrun would, and collects what each returns."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def _enter(rank: int, size: int, port: int, work: Callable[..., Any], out: Path, arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.save(work(*arguments), out / f"{rank}.pt")


def run(size: int, work: Callable[..., Any], out: Path, *arguments: Any) -> list[Any]:
    """Run a function of a module in so many processes, and return what each of them returned.

    Args:
        size: processes; 1 runs it without any of torch.distributed's variables.
        work: what they run.
        out: an empty folder.
        arguments: of the function.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, (size, port, work, out, arguments), nprocs=size, join=True)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(size)]
