"""Reinforcement-learning fine-tuning of vision-language-action policies in TorchRL."""

__version__ = "0.1.0"
