"""Base OpenVLA as a TorchRL policy: the tokens of one control step, one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, exploration_type

from torchrl_vla.errors import UserError
from torchrl_vla.modules.backbone import ACTION_KEY, TOKENS_KEY, OpenVLABackbone
from torchrl_vla.modules.distributions import SEED_KEY, check_temperature, seeded_uniforms
from torchrl_vla.modules.openvla.model import OpenVLA
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor

_GREEDY = (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN)


class OpenVLAAutoregressiveActor(OpenVLABackbone):
    """A policy that decodes one control step as base OpenVLA does; it keeps no probabilities, so it is for evaluation.

    Reads what :class:`~torchrl_vla.modules.backbone.OpenVLABackbone` reads, writes ``("vla_action", "tokens")`` int64
    ``[*B, 1, 7]`` (bins in token-id order) and ``"action"`` float32 ``[*B, 7]`` in the env's units, so for an
    environment with ``chunk_size=1``. Made by :func:`make_autoregressive_actor`.

    Args:
        model: the network.
        processor: makes its inputs and holds the action statistics.
        temperature: of the sampling; 0 is greedy.
        instructions: instruction of each task id, if task ids are to be read and not strings.

    Raises:
        ValueError: if the model reads the robot's state, the temperature is negative, or processor and model do not
            fit each other (tokenizer, vocabulary, image size).
    """

    def __init__(
        self,
        model: OpenVLA,
        processor: OpenVLAProcessor,
        temperature: float,
        instructions: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(model, processor, instructions)
        check_temperature(temperature)
        if model.config.use_proprio:
            raise UserError(
                "this model reads the robot's state, as OpenVLA-OFT does, and base OpenVLA's decoding has no place for "
                "it: decode its tokens in parallel (make_actor; evaluate --action-mode tokens)."
            )
        if processor.action_tokenizer.vocab_size != model.config.tokenizer_vocab_size:
            raise UserError(
                f"The action tokenizer's vocabulary has {processor.action_tokenizer.vocab_size} tokens, the model's "
                f"{model.config.tokenizer_vocab_size}: make it with vocab_size={model.config.tokenizer_vocab_size}."
            )
        self.temperature = temperature
        self.action_tokenizer = processor.action_tokenizer
        self.out_keys = [ACTION_KEY, TOKENS_KEY]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Decide: decode seven tokens, to the env's units."""
        greedy = exploration_type() in _GREEDY
        inputs = self.read_inputs(tensordict)
        seed = tensordict.get(SEED_KEY, None)
        ids, logits = self.model.decode_autoregressively(
            inputs.pixel_values,
            inputs.input_ids,
            inputs.attention_mask,
            temperature=0.0 if greedy else self.temperature,
            uniform=None if seed is None else seeded_uniforms(seed.view(-1, 1), self.model.config.action_dim),
        )
        self.check_decision(tensordict, logits.view(*tensordict.batch_size, *logits.shape[1:]), "logits")
        bins = self.action_tokenizer.ids_to_bins(ids).view(*tensordict.batch_size, 1, -1)
        tensordict.set(TOKENS_KEY, bins)
        return tensordict.set(ACTION_KEY, self.action_tokenizer.bins_to_env(bins).squeeze(-2))


def make_autoregressive_actor(
    model: OpenVLA,
    processor: OpenVLAProcessor,
    *,
    temperature: float = 0.0,
    instructions: Mapping[int, str] | None = None,
) -> OpenVLAAutoregressiveActor:
    """Make a policy that acts as base OpenVLA: seven tokens, one after the other, for one control step.

    Under ``set_exploration_type(ExplorationType.DETERMINISTIC)`` it takes the most likely token of the whole
    vocabulary, as upstream does; one that is no action token becomes the nearest one. Otherwise it draws action tokens
    at its temperature.

    Args:
        model: the network; the actor shares it.
        processor: makes the network's inputs.
        temperature: of the sampling; 0 is greedy.
        instructions: instruction of each task id, as for :func:`~torchrl_vla.modules.make_actor`.

    Raises:
        ValueError: if the model reads the robot's state, the temperature is negative, or processor and model do not
            fit each other (tokenizer, vocabulary, image size).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_vla.modules import ActionTokenizer, OpenVLAConfig, build_tokenizer
        >>> model = OpenVLA(OpenVLAConfig.tiny(use_proprio=False))
        >>> actions = ActionTokenizer(vocab_size=512)
        >>> processor = OpenVLAProcessor(build_tokenizer(["open the drawer"]), actions, image_size=126)
        >>> observation = TensorDict(image=torch.zeros(3, 256, 256, dtype=torch.uint8))
        >>> decision = TensorDict(observation=observation, language_instruction="open the drawer")
        >>> make_autoregressive_actor(model, processor)(decision)["action"].shape
        torch.Size([7])
    """
    return OpenVLAAutoregressiveActor(model, processor, temperature, instructions)
