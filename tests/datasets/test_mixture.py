"""Demonstrations of several suites as one: whose statistics normalise what, and which task is which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchrl_vla.datasets import DemonstrationIndex, DemonstrationMixture, Episode, write_episode
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.openvla.jpeg import encode_jpeg

GOAL = {0: "open the drawer", 2: "put the bowl on the plate"}
TEN = {1: "put the bowl on the plate", 4: "turn on the stove"}


def make_dataset(folder: Path, suite: str, instructions: dict[int, str], *, scale: float, action_dim: int = 7) -> Path:
    """One episode per task, whose states and actions are as large as `scale`."""
    index = DemonstrationIndex(suite, instructions)
    for task_id, instruction in instructions.items():
        generator = torch.Generator().manual_seed(task_id)
        action = scale * (torch.rand(4, action_dim, generator=generator) * 2 - 1)
        action[:, -1] = action[:, -1].sign()
        state = scale * torch.rand(4, 8, generator=generator)
        frames = torch.randint(0, 255, (4, 28, 28, 3), generator=generator, dtype=torch.uint8).numpy()
        images = {"image": [encode_jpeg(frame) for frame in frames]}
        name = index.episode_name(task_id, 0)
        write_episode(folder / "episodes" / name, Episode(state, action, action, images, task_id, 0, instruction, 0))
        index.outcomes[name] = "success"
    index.save(folder)
    DemonstrationMixture([folder]).datasets[suite].update_statistics()
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two suites, the second with actions ten times smaller; one task has the same instruction in both."""
    return [
        make_dataset(tmp_path / "goal", "libero_goal", GOAL, scale=1.0),
        make_dataset(tmp_path / "ten", "libero_10", TEN, scale=0.1),
    ]


def test_each_suite_is_normalised_by_its_own_statistics(folders: list[Path]):
    mixture = DemonstrationMixture(folders)
    train, held_out = mixture.split()
    assert train == {"libero_goal": ["000000", "020000"], "libero_10": ["010000", "040000"]} and held_out == {}
    samples = mixture.samples(train, n_bins=256, image_size=28, chunk_size=2)
    assert samples.batch_size == (16,)
    for suite, rows in (("libero_goal", slice(0, 8)), ("libero_10", slice(8, 16))):
        dataset = mixture.datasets[suite]
        actions = ActionTokenizer(dataset.statistics)
        episodes = [dataset.episodes[name] for name in train[suite]]
        state = torch.cat([episode["state"] for episode in episodes])
        assert torch.equal(samples["observation", "state"][rows], actions.normalize_proprio(state))
        first = actions.from_env(torch.cat([episode["action"] for episode in episodes]))
        assert torch.equal(samples["vla_action", "chunk"][rows, 0], first)
        assert torch.equal(samples["vla_action", "tokens"][rows, 0], actions.encode(first))
    # A tenth of an action is as far from the middle of its suite's range as a whole one is in the other suite.
    spread = samples["vla_action", "chunk"][..., :6].abs().view(2, -1).mean(1)
    assert spread[1] == pytest.approx(float(spread[0]), rel=0.2)


def test_a_task_is_known_by_its_instruction(folders: list[Path]):
    mixture = DemonstrationMixture(folders)
    assert mixture.instructions == ("open the drawer", "put the bowl on the plate", "turn on the stove")
    samples = mixture.samples(mixture.split()[0], n_bins=256, image_size=28)
    assert samples["instruction_id"].tolist() == [0] * 4 + [1] * 4 + [1] * 4 + [2] * 4


def test_what_cannot_be_mixed_is_refused(folders: list[Path], tmp_path: Path):
    again = make_dataset(tmp_path / "again", "libero_goal", GOAL, scale=1.0)
    with pytest.raises(ValueError, match="both of libero_goal.*one data set of each suite"):
        DemonstrationMixture([*folders, again])
    wide = make_dataset(tmp_path / "wide", "libero_object", {0: "wave"}, scale=1.0, action_dim=8)
    with pytest.raises(ValueError, match="same number of dimensions: .*goal has 7, .*wide has 8"):
        DemonstrationMixture([folders[0], wide])
