#!/usr/bin/env python3
"""Collect demonstrations: `python scripts/collect_demos.py --out DIR`. The same as `torchrl-vla demos`."""

import sys

from torchrl_vla.cli import main

if __name__ == "__main__":
    main(["demos", *sys.argv[1:]])
