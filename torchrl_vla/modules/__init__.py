"""Policies and what they are made of; they know no environment."""

from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.actor import OpenVLAActor, OpenVLAL1Actor, make_actor, make_l1_actor, make_value_operator
from torchrl_vla.modules.autoregressive import OpenVLAAutoregressiveActor, make_autoregressive_actor
from torchrl_vla.modules.deferred import NonFiniteError
from torchrl_vla.modules.distributions import TokenCategorical
from torchrl_vla.modules.heads import L1ActionHead, ProprioProjector, ValueHead
from torchrl_vla.modules.openvla.architecture import OpenVLAConfig
from torchrl_vla.modules.openvla.model import OpenVLA, OpenVLAOutput
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor
from torchrl_vla.modules.openvla.tokenizer import build_tokenizer, load_tokenizer

__all__ = [
    "ActionTokenizer",
    "L1ActionHead",
    "NonFiniteError",
    "OpenVLA",
    "OpenVLAActor",
    "OpenVLAAutoregressiveActor",
    "OpenVLAConfig",
    "OpenVLAL1Actor",
    "OpenVLAOutput",
    "OpenVLAProcessor",
    "ProprioProjector",
    "TokenCategorical",
    "ValueHead",
    "build_tokenizer",
    "load_tokenizer",
    "make_actor",
    "make_autoregressive_actor",
    "make_l1_actor",
    "make_value_operator",
]
