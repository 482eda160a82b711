"""Every option of every command: typed, validated, documented once; the command line is made from these classes."""

from torchrl_vla.config.actor import OpenVLAActorConfig
from torchrl_vla.config.environment import EnvironmentConfig
from torchrl_vla.config.evaluate import EvaluateConfig
from torchrl_vla.config.finetune import FinetuneConfig
from torchrl_vla.config.ppo import PPOConfig
from torchrl_vla.config.train import TrainConfig

__all__ = [
    "EnvironmentConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "OpenVLAActorConfig",
    "PPOConfig",
    "TrainConfig",
]
