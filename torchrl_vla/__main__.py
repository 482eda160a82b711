"""`python -m torchrl_vla`: the same as `torchrl-vla`."""

from torchrl_vla.cli import main

if __name__ == "__main__":
    main()
