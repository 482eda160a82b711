"""Commands of `torchrl-vla`, one module each."""
