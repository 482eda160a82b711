"""Several processes that train one policy: started by torchrun, joined by torch.distributed."""

from torchrl_vla.distributed.buffer import SharedBuffer
from torchrl_vla.distributed.collector import SharedCollector
from torchrl_vla.distributed.ranks import ALONE, OneProcess, Ranks, join_ranks

__all__ = ["ALONE", "OneProcess", "Ranks", "SharedBuffer", "SharedCollector", "join_ranks"]
