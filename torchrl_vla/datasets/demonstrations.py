"""A data set of demonstrations: what is in it, and samples to learn from."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from tqdm import tqdm

from torchrl_vla.checkpoints.statistics import STATISTICS_FILE, read_statistics, write_statistics
from torchrl_vla.datasets.episodes import CorruptEpisodeError, read_episode
from torchrl_vla.datasets.statistics import compute_statistics
from torchrl_vla.errors import UserError
from torchrl_vla.files import write_json
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.openvla.image_pipeline import lanczos3_resize
from torchrl_vla.modules.openvla.jpeg import decode_jpeg

__all__ = ["DemonstrationDataset", "DemonstrationIndex"]

_INDEX = "dataset.json"


@dataclass
class DemonstrationIndex:
    """The data set's ``dataset.json``: how it was made and what became of each episode.

    Args:
        task_suite: name of the suite.
        instructions: what the policy is told, by task.
        options: parameters of the collection.
        versions: of the packages that the data depend on.
        outcomes: ``success``, ``failed`` (the task was not solved; not stored) or ``dropped: REASON``, by episode.
    """

    task_suite: str
    instructions: dict[int, str]
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def episode_name(task_id: int, number: int) -> str:
        """Name of a task's episode; more episodes later leave the names of earlier ones as they are.

        Examples:
            >>> DemonstrationIndex.episode_name(4, 12)
            '040012'
        """
        return f"{task_id:02d}{number:04d}"

    def counts(self) -> dict[int, Counter[str]]:
        """Return the number of ``success``, ``failed`` and ``dropped`` episodes by task."""
        counts = {task_id: Counter[str]() for task_id in self.instructions}
        for name, outcome in self.outcomes.items():
            counts[int(name[:-4])][outcome.partition(":")[0]] += 1
        return counts

    def save(self, folder: Path) -> None:
        """Write atomically."""
        tasks = [
            {"task_id": task_id, "instruction": instruction, **self.counts()[task_id]}
            for task_id, instruction in self.instructions.items()
        ]
        content = {"format": 1, "tasks": tasks, **asdict(self)}
        write_json(folder / _INDEX, content, indent=1)

    @classmethod
    def load(cls, folder: Path) -> DemonstrationIndex:
        """Read what `save` wrote.

        Raises:
            ValueError: there is none, or it is of another format.
        """
        path = folder / _INDEX
        if not path.is_file():
            raise UserError(
                f"{folder} is no data set of demonstrations: it has no {_INDEX}. Make one: torchrl-vla demos."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            instructions = {int(task_id): text for task_id, text in content["instructions"].items()}
            return cls(
                content["task_suite"], instructions, content["options"], content["versions"], content["outcomes"]
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} is not in the format that torchrl-vla demos writes ({error!r}).") from error


class DemonstrationDataset:
    """Demonstrations on disk, as ``torchrl-vla demos`` writes them.

    Episodes that are cut short or damaged are named in a warning and left out; the others stay usable.

    Args:
        folder: with ``dataset.json``, ``dataset_statistics.json`` and ``episodes/``.

    Raises:
        ValueError: there is no data set, or it has no usable episode.

    Examples:
        >>> dataset = DemonstrationDataset(Path("demos/libero_spatial"))  # doctest: +SKIP
        >>> samples = dataset.samples(ActionTokenizer(dataset.statistics), image_size=126)  # doctest: +SKIP
        >>> buffer = TensorDictReplayBuffer(  # doctest: +SKIP
        ...     storage=TensorStorage(samples), sampler=SamplerWithoutReplacement(), batch_size=64)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index = DemonstrationIndex.load(self.folder)
        self.episodes: dict[str, TensorDict] = {}
        for path in sorted((self.folder / "episodes").glob("[0-9]*")):
            try:
                self.episodes[path.name] = read_episode(path)
            except CorruptEpisodeError as error:
                warnings.warn(f"A demonstration cannot be used and is left out: {error}", stacklevel=2)
        if not self.episodes:
            tried = len(self.index.outcomes)
            raise UserError(
                f"{self.folder} has no usable demonstration ({tried} episodes were tried, "
                f"{sum(outcome == 'failed' for outcome in self.index.outcomes.values())} of them failed): there is "
                "nothing to learn from. Collect with less noise, other tasks or more episodes."
            )

    @property
    def task_suite(self) -> str:
        """Name of the suite."""
        return self.index.task_suite

    @property
    def instructions(self) -> dict[int, str]:
        """What the policy is told, by task."""
        return self.index.instructions

    @property
    def action_dim(self) -> int:
        """Numbers per action."""
        return next(iter(self.episodes.values()))["action"].shape[-1]

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Action and state statistics, one entry of OpenVLA's ``dataset_statistics.json``.

        Raises:
            ValueError: the data set has none.
        """
        again = "`torchrl-vla demos` writes it last: run it again with the same options, it goes on from what is there."
        try:
            statistics = read_statistics(self.folder)
        except ValueError as error:
            raise UserError(f"{error} {again}") from error
        if not statistics:
            raise UserError(
                f"{self.folder} has no {STATISTICS_FILE}, and actions cannot be normalised without. {again}"
            )
        if self.task_suite not in statistics:
            raise UserError(
                f"{self.folder / STATISTICS_FILE} has statistics of {', '.join(sorted(statistics))}, not of "
                f"{self.task_suite!r}."
            )
        return statistics[self.task_suite]

    def update_statistics(self) -> None:
        """Write ``dataset_statistics.json`` anew from the episodes there are."""
        arrays = [(data["action"].numpy(), data["state"].numpy()) for data in self.episodes.values()]
        statistics = compute_statistics(*map(list, zip(*arrays, strict=True)))
        write_statistics(self.folder, {self.task_suite: statistics})

    def split(self, *, per_task: int | None = None, held_out: int = 1) -> tuple[list[str], list[str]]:
        """Choose the episodes to learn from and, task by task, others to judge by.

        Args:
            per_task: episodes of each task to learn from; None: all that are not held out.
            held_out: the last episodes of each task, to judge by; fewer where a task has not so many to spare, since
                every task keeps one to learn from.

        Returns:
            The names of the training and of the held-out episodes.

        Raises:
            ValueError: a number is out of range.
        """
        if per_task is not None and per_task < 1:
            raise UserError(f"per_task must be at least 1, or None for all episodes, got {per_task}.")
        if held_out < 0:
            raise UserError(f"held_out must not be negative, got {held_out}.")
        by_task: dict[int, list[str]] = {}
        for name, data in self.episodes.items():
            by_task.setdefault(int(data["task_id"]), []).append(name)
        train, validation = [], []
        for names in by_task.values():
            kept = max(len(names) - held_out, 1)
            train += names[:kept][:per_task]
            validation += names[kept:]
        return train, validation

    def samples(
        self,
        tokenizer: ActionTokenizer,
        *,
        image_size: int,
        chunk_size: int = 8,
        episodes: Sequence[str] | None = None,
        image_keys: Sequence[str] = ("image",),
        device: torch.device | str = "cpu",
        storage_device: torch.device | str | None = None,
    ) -> TensorDict:
        """Every control step of the episodes as one sample, images decoded and resized once.

        A chunk that begins near the end of its episode is filled up with the last action, and ``mask`` says which of
        its control steps were recorded.

        Args:
            tokenizer: gives the bins of the actions.
            image_size: side of the square images to learn from, in pixels.
            chunk_size: control steps ``K`` per decision.
            episodes: names of the episodes; None: all.
            image_keys: cameras, by their key under ``"observation"``.
            device: where the images are resized.
            storage_device: where the samples are kept; None: ``device``.

        Returns:
            TensorDict [N]: ``("observation", key)`` uint8 [N, 3, S, S] per camera, ``("observation", "state")``
            float32 [N, 8], ``"action"`` float32 [N, K, 7] (environment's convention), ``("vla_action", "tokens")``
            int64 [N, K, 7], ``"mask"`` bool [N, K] and ``"task_id"`` int64 [N, 1]. Damaged episodes are left out.

        Raises:
            ValueError: the actions have another dimension than the tokenizer's, a camera was not recorded, or no
                episode is left.
        """
        names = list(self.episodes) if episodes is None else list(episodes)
        expected = tokenizer.action_q01.numel()
        for name in names:
            found = self.episodes[name]["action"].shape[-1]
            if found != expected:
                raise UserError(
                    f"Episode {name} has actions of {found} numbers, the policy has {expected}: fine-tune a policy of "
                    "that action dimension, or collect demonstrations for this one."
                )
        storage_device = torch.device(device if storage_device is None else storage_device)
        names, images = self._load_images(names, image_keys, image_size, torch.device(device), storage_device)
        if not names:
            raise UserError(
                f"None of the chosen episodes of {self.folder} can be decoded: there is nothing to learn from."
            )
        parts = [self._targets(self.episodes[name], tokenizer, chunk_size) for name in names]
        data = TensorDict.cat(parts).to(storage_device)
        for key, frames in images.items():
            data["observation", key] = frames
        return data

    @staticmethod
    def _targets(episode: TensorDict, tokenizer: ActionTokenizer, chunk_size: int) -> TensorDict:
        steps = len(episode["action"])
        index = torch.arange(steps)[:, None] + torch.arange(chunk_size)
        action = episode["action"].clone()[index.clamp_max(steps - 1)]
        tokens = tokenizer.encode(tokenizer.from_env(action.to(tokenizer.bin_edges.device))).cpu()
        return TensorDict(
            {
                "observation": {"state": episode["state"].clone()},
                "action": action,
                "vla_action": {"tokens": tokens},
                "mask": index < steps,
                "task_id": episode["task_id"].expand(steps, 1).clone(),
            },
            [steps],
        )

    def _load_images(
        self, names: list[str], keys: Sequence[str], size: int, device: torch.device, storage_device: torch.device
    ) -> tuple[list[str], dict[str, Tensor]]:
        """Resized frames of all cameras, uint8 [N, 3, S, S], and the episodes that could be decoded."""
        for name in names:
            recorded = sorted(self.episodes[name]["images"].keys())
            missing = sorted(set(keys) - set(recorded))
            if missing:
                raise UserError(
                    f"Episode {name} was recorded with {', '.join(recorded)} and not {', '.join(missing)}: collect "
                    "demonstrations with the cameras that the policy looks through."
                )
        total = sum(len(self.episodes[name]["action"]) for name in names)
        frames = {key: torch.empty(total, 3, size, size, dtype=torch.uint8, device=storage_device) for key in keys}
        good: list[str] = []
        filled = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=total, desc="decoding", unit="frame") as bar:
            for name in names:
                cameras = self.episodes[name]["images"]
                try:
                    decoded = {key: _resized(cameras[key], size, device, pool) for key in keys}
                except ValueError as error:
                    warnings.warn(f"Episode {name} cannot be decoded and is left out: {error}", stacklevel=3)
                    continue
                good.append(name)
                steps = len(self.episodes[name]["action"])
                for key in keys:
                    frames[key][filled : filled + steps] = decoded[key]
                filled += steps
                bar.update(steps)
        return good, {key: images[:filled] for key, images in frames.items()}


def _resized(camera: TensorDict, size: int, device: torch.device, pool: ThreadPoolExecutor) -> Tensor:
    """One episode's frames of one camera, uint8 [T, 3, S, S]."""
    blob, offsets = camera["jpeg"].numpy(), camera["offsets"].tolist()
    arrays = pool.map(lambda start, end: decode_jpeg(blob[start:end]), offsets[:-1], offsets[1:])
    frames = torch.from_numpy(np.stack(list(arrays))).to(device).permute(0, 3, 1, 2)
    return lanczos3_resize(frames, size)
