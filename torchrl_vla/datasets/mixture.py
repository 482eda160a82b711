"""Data sets of demonstrations of several suites, to be learned from as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from torchrl_vla.datasets.demonstrations import DemonstrationDataset
from torchrl_vla.errors import UserError
from torchrl_vla.modules.action_tokenizer import ActionTokenizer

__all__ = ["DemonstrationMixture"]


class DemonstrationMixture:
    """One data set of demonstrations or several, each of another suite.

    Actions and states are normalised by the statistics of the suite they come from, as upstream does with its mixtures,
    and a task is known by its instruction: the same number stands for another task in every suite.

    Args:
        folders: of the data sets.

    Raises:
        ValueError: a folder has no usable data set, there is none, two are of one suite, or their actions have not the
            same number of dimensions.

    Examples:
        >>> mixture = DemonstrationMixture([Path("demos/libero_goal"), Path("demos/libero_10")])  # doctest: +SKIP
        >>> train, held_out = mixture.split()  # doctest: +SKIP
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.datasets: dict[str, DemonstrationDataset] = {}
        for folder in folders:
            dataset = DemonstrationDataset(folder)
            other = self.datasets.setdefault(dataset.task_suite, dataset)
            if other is not dataset:
                raise UserError(
                    f"{other.folder} and {dataset.folder} are both of {dataset.task_suite}, and a policy has one entry "
                    "of statistics per suite: give one data set of each suite, and collect more episodes into it."
                )
        sizes = {str(dataset.folder): dataset.action_dim for dataset in self.datasets.values()}
        if len(set(sizes.values())) != 1:
            found = ", ".join(f"{folder} has {size}" for folder, size in sizes.items()) or "none was given"
            raise UserError(f"The data sets must have actions of the same number of dimensions: {found}.")

    @property
    def folders(self) -> str:
        """The folders, for messages."""
        return ", ".join(str(dataset.folder) for dataset in self.datasets.values())

    @property
    def action_dim(self) -> int:
        """Numbers per action."""
        return next(iter(self.datasets.values())).action_dim

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Action and state statistics by suite, the content of OpenVLA's ``dataset_statistics.json``.

        Raises:
            ValueError: a data set has none.
        """
        return {suite: dataset.statistics for suite, dataset in self.datasets.items()}

    @property
    def instructions(self) -> tuple[str, ...]:
        """What the policy is told, every instruction once."""
        return tuple(dict.fromkeys(text for each in self.datasets.values() for text in each.instructions.values()))

    def split(
        self, *, per_task: int | None = None, held_out: int = 1
    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Choose the episodes to learn from and others to judge by, as :meth:`DemonstrationDataset.split` does.

        Args:
            per_task: episodes of each task to learn from; None: all that are not held out.
            held_out: the last episodes of each task, to judge by.

        Returns:
            The names of the training and of the held-out episodes, by suite; suites without any are left out.
        """
        train, validation = {}, {}
        for suite, dataset in self.datasets.items():
            train[suite], rest = dataset.split(per_task=per_task, held_out=held_out)
            if rest:
                validation[suite] = rest
        return train, validation

    def samples(
        self,
        episodes: Mapping[str, Sequence[str]],
        *,
        n_bins: int,
        image_size: int,
        chunk_size: int = 8,
        image_keys: Sequence[str] = ("image",),
        device: torch.device | str = "cpu",
        storage_device: torch.device | str | None = None,
    ) -> TensorDict:
        """Every control step of the episodes as one sample.

        Args:
            episodes: names of the episodes, by suite.
            n_bins: action tokens per dimension.
            image_size: as for :meth:`DemonstrationDataset.samples`, and so are the others.
            chunk_size: control steps per decision.
            image_keys: cameras, by their key under ``"observation"``.
            device: where the images are resized.
            storage_device: where the samples are kept; None: ``device``.

        Returns:
            TensorDict [N]: the images, ``("vla_action", "tokens")`` and ``"mask"`` of
            :meth:`DemonstrationDataset.samples`; normalised by the suite's statistics ``("observation", "state")``
            float32 [N, 8] and ``("vla_action", "chunk")`` [N, K, 7]; and ``"instruction_id"`` int64 [N], which counts
            in :attr:`instructions`.
        """
        rows = {text: row for row, text in enumerate(self.instructions)}
        parts = []
        for suite, names in episodes.items():
            dataset = self.datasets[suite]
            actions = ActionTokenizer(dataset.statistics, n_bins=n_bins)
            part = dataset.samples(
                actions,
                image_size=image_size,
                chunk_size=chunk_size,
                episodes=names,
                image_keys=image_keys,
                device=device,
                storage_device=storage_device,
            )
            actions.to(part.device)
            part["observation", "state"] = actions.normalize_proprio(part["observation", "state"]).float()
            part["vla_action", "chunk"] = actions.from_env(part.pop("action"))
            row_of_task = torch.zeros(max(dataset.instructions) + 1, dtype=torch.int64, device=part.device)
            for task_id, text in dataset.instructions.items():
                row_of_task[task_id] = rows[text]
            part["instruction_id"] = row_of_task[part.pop("task_id").squeeze(-1)]
            parts.append(part)
        return parts[0] if len(parts) == 1 else TensorDict.cat(parts)
