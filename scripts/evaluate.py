#!/usr/bin/env python3
"""Evaluate: `python scripts/evaluate.py --checkpoint DIR`. The same as `torchrl-vla evaluate`."""

import sys

from torchrl_vla.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
