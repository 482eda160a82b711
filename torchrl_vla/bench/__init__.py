"""Measurements of `torchrl-vla bench`: ours and what it replaces, alternating in one run."""
