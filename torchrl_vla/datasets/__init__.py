"""Demonstrations on disk: episodes as memory-mapped TensorDicts, their statistics, and samples to learn from."""

from torchrl_vla.datasets.demonstrations import DemonstrationDataset, DemonstrationIndex
from torchrl_vla.datasets.episodes import CorruptEpisodeError, Episode, encode_jpeg, read_episode, write_episode
from torchrl_vla.datasets.statistics import compute_statistics

__all__ = [
    "CorruptEpisodeError",
    "DemonstrationDataset",
    "DemonstrationIndex",
    "Episode",
    "compute_statistics",
    "encode_jpeg",
    "read_episode",
    "write_episode",
]
