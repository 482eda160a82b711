"""Every option of every command: typed, validated, documented once; the command line is made from these classes."""

from torchrl_vla.config.train import EnvironmentConfig, OpenVLAActorConfig, PPOConfig, TrainConfig

__all__ = ["EnvironmentConfig", "OpenVLAActorConfig", "PPOConfig", "TrainConfig"]
