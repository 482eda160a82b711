#!/usr/bin/env python3
"""Train: `python scripts/train.py --task-suite libero_spatial --task-id 0`. The same as `torchrl-vla train`.

The algorithm is torchrl_vla/recipes/grpo.py, its loss torchrl_vla/objectives/clip_ppo.py.
"""

import sys

from torchrl_vla.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
