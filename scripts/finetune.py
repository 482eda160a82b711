#!/usr/bin/env python3
"""Fine-tune: `python scripts/finetune.py --dataset DIR --out DIR`. The same as `torchrl-vla finetune`."""

import sys

from torchrl_vla.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
