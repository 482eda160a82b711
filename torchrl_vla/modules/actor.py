"""OpenVLA as a TorchRL policy and value operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor, SafeProbabilisticModule, ValueOperator
from torchrl.modules.tensordict_module.probabilistic import SafeProbabilisticTensorDictSequential

from torchrl_vla.errors import UserError
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.backbone import (
    ACTION_KEY,
    HIDDEN_KEY,
    LOG_PROBS_KEY,
    LOGITS_KEY,
    TOKENS_KEY,
    OpenVLABackbone,
)
from torchrl_vla.modules.distributions import SEED_KEY, TokenCategorical, check_temperature
from torchrl_vla.modules.openvla.model import OpenVLA
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor

LogProbLevel = Literal["token", "action", "chunk"]


class OpenVLAL1Actor(OpenVLABackbone):
    """A policy that acts by the L1 head: deterministic, with no probabilities, so for evaluation and comparison alone.

    Reads what :class:`OpenVLABackbone` reads, writes ``"action"`` float32 ``[*B, K, 7]`` (``[*B, 7]`` when K is 1) in
    the env's units. Made by :func:`make_l1_actor`.

    Args:
        model: a network with an L1 head.
        processor: makes its inputs and holds the action statistics.
        instructions: instruction of each task id, if task ids are to be read and not strings.

    Raises:
        ValueError: if the model has no L1 head, or processor and model do not fit each other.
    """

    def __init__(
        self, model: OpenVLA, processor: OpenVLAProcessor, instructions: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(model, processor, instructions)
        if model.action_head is None:
            raise UserError(
                "this model has no L1 head to act by: load a checkpoint with action_head--N_checkpoint.pt and "
                "load_l1_action_head=True, or act by its tokens (make_actor)."
            )
        self.action_tokenizer = processor.action_tokenizer
        self.out_keys = [ACTION_KEY]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Decide: forward, regress, to the env's units."""
        normalized = self.model.predict_l1(self.run_model(tensordict).hidden_states).float()
        self.check_decision(tensordict, normalized.view(*tensordict.batch_size, *normalized.shape[1:]), "actions")
        action = self.action_tokenizer.to_env(normalized)
        action = action.view(*tensordict.batch_size, *action.shape[1:])
        return tensordict.set(ACTION_KEY, action.squeeze(-2) if self.model.config.chunk_size == 1 else action)


class ActionTokenSampler(SafeProbabilisticModule):
    """Draws action tokens from their logits and decodes them to the env's action.

    Decoding is part of the probabilistic module, not a stage behind it: so the actor's last module stays the one that
    ``get_dist`` and the losses ask for the distribution.

    Args:
        action_tokenizer: decodes the bins.
        chunk_size: control steps ``K`` of an action; with 1 the action is ``[*B, 7]``.
        temperature: of the sampling; 0 is greedy.
        log_prob_level: what one log-probability covers.
        check: is shown a batch [*B], the logits and their name, and refuses what is not finite, as
            :meth:`~torchrl_vla.modules.backbone.OpenVLABackbone.check_decision` does; None leaves that out.
    """

    def __init__(
        self,
        action_tokenizer: ActionTokenizer,
        *,
        chunk_size: int,
        temperature: float,
        log_prob_level: LogProbLevel,
        check: Callable[[TensorDictBase, Tensor, str], None] | None = None,
    ) -> None:
        super().__init__(
            in_keys=[LOGITS_KEY],
            out_keys=[TOKENS_KEY],
            distribution_class=TokenCategorical,
            distribution_kwargs={
                "temperature": temperature,
                "event_dims": get_args(LogProbLevel).index(log_prob_level),
            },
            default_interaction_type=ExplorationType.RANDOM,
            return_log_prob=True,
            log_prob_key=LOG_PROBS_KEY,
        )
        self.action_tokenizer = action_tokenizer
        self.chunk_size = chunk_size
        self.check = check

    @property
    def out_keys(self) -> list[NestedKey]:
        """Tokens, their log-probabilities and the action."""
        return [*super().out_keys, ACTION_KEY]

    def get_dist(self, tensordict: TensorDictBase) -> TokenCategorical:
        """Build the distribution of the tokens; it samples with the decisions' own seeds where there are any."""
        dist = super().get_dist(tensordict)
        dist.seed = tensordict.get(SEED_KEY, None)
        return dist

    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, _requires_sample: bool = True
    ) -> TensorDictBase:
        """Sample, score and decode."""
        logits = tensordict.get(LOGITS_KEY)
        if self.check is not None:
            self.check(tensordict, logits, "logits")
        if logits.is_cuda:
            # The check has not answered yet, and a draw from NaN is an index out of bounds, which ends the process.
            tensordict.set(LOGITS_KEY, logits.nan_to_num())
        tensordict_out = super().forward(tensordict, tensordict_out, _requires_sample=_requires_sample)
        action = self.action_tokenizer.bins_to_env(tensordict_out.get(TOKENS_KEY))
        return tensordict_out.set(ACTION_KEY, action.squeeze(-2) if self.chunk_size == 1 else action)


class OpenVLAActor(ProbabilisticActor):
    """A policy that keeps tokens, log-probabilities and action of a decision, and nothing larger.

    Logits and hidden state stay within a call; losses that call :meth:`get_dist` on their own (shallow) copy of a
    batch find both there. Made by :func:`make_actor`.

    Args:
        backbone: observations to logits.
        sampler: logits to tokens and action.
    """

    def __init__(self, backbone: OpenVLABackbone, sampler: ActionTokenSampler) -> None:
        # ProbabilisticActor's own constructor would make a sampler that does not decode.
        SafeProbabilisticTensorDictSequential.__init__(self, backbone, sampler)
        self.select_out_keys(ACTION_KEY, TOKENS_KEY, LOG_PROBS_KEY)

    def forward(
        self, tensordict: TensorDictBase, tensordict_out: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        """Decide: forward, sample, decode."""
        # Selecting a nested key lets its siblings through (tensordict 0.14), so the large ones are taken out here.
        return super().forward(tensordict, tensordict_out, **kwargs).exclude(LOGITS_KEY, HIDDEN_KEY, inplace=True)

    @property
    def backbone(self) -> OpenVLABackbone:
        """The module that holds the network."""
        return self[0]

    @property
    def temperature(self) -> float:
        """Sampling temperature, of the rollout and of the losses built on this actor."""
        return self[-1].distribution_kwargs["temperature"]

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_temperature(value)
        self[-1].distribution_kwargs["temperature"] = value


def make_actor(
    model: OpenVLA,
    processor: OpenVLAProcessor,
    tokenizer: ActionTokenizer | None = None,
    *,
    temperature: float = 1.6,
    log_prob_level: LogProbLevel = "token",
    instructions: Mapping[int, str] | None = None,
) -> OpenVLAActor:
    """Make a TorchRL policy of an OpenVLA.

    It reads the backbone's observations (see :class:`OpenVLABackbone`) in any batch shape ``[*B]`` and writes
    ``("vla_action", "tokens")`` int64 ``[*B, K, 7]`` (bins in token-id order), ``("vla_action", "log_probs")`` float32
    ``[*B, K, 7]`` and ``"action"`` float32 ``[*B, K, 7]`` (``[*B, 7]`` when K is 1) in the env's units. It samples by
    default and takes the most likely tokens under ``set_exploration_type(ExplorationType.DETERMINISTIC)``.

    Args:
        model: the network; the actor shares it, it does not copy it.
        processor: makes the network's inputs.
        tokenizer: decodes tokens to actions; the processor's by default.
        temperature: of the sampling, in rollout and ``get_dist`` alike. 0 is greedy, and gives no gradients.
        log_prob_level: what one log-probability covers: a ``"token"``, the 7 tokens of an ``"action"`` (``[*B, K]``)
            or the whole ``"chunk"`` (``[*B]``, as stock losses without a notion of tokens want it: A2C, REINFORCE).
        instructions: instruction of each task id. Given these, the actor reads ``"task_id"`` int64 ``[*B, 1]`` in
            place of ``"language_instruction"``: cheaper between processes, and what TorchRL's GAE can work with. Give
            those of the tasks that are run and no others: all prompts are padded to the longest.

    Raises:
        ValueError: if the temperature is negative, the level unknown, two instructions have one prompt, or processor,
            tokenizer and model do not fit each other; when called, if a task id has no instruction.
        NonFiniteError: when called, if a state or the network's logits are NaN or infinite; on a GPU by the next call,
            or by ``actor.backbone.raise_errors()``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_vla.modules import OpenVLAConfig, build_tokenizer
        >>> model = OpenVLA(OpenVLAConfig.tiny())
        >>> processor = OpenVLAProcessor(build_tokenizer(["open the drawer"]), ActionTokenizer(), image_size=126)
        >>> actor = make_actor(model, processor, temperature=1.0)
        >>> observation = TensorDict(image=torch.zeros(3, 256, 256, dtype=torch.uint8), state=torch.zeros(8))
        >>> decision = actor(TensorDict(observation=observation, language_instruction="open the drawer"))
        >>> decision["action"].shape
        torch.Size([8, 7])
    """
    check_temperature(temperature)
    if log_prob_level not in get_args(LogProbLevel):
        raise UserError(f"log_prob_level must be one of {', '.join(get_args(LogProbLevel))}, got {log_prob_level!r}.")
    tokenizer = processor.action_tokenizer if tokenizer is None else tokenizer
    if tokenizer.n_bins != model.config.n_action_bins:
        raise UserError(
            f"The action tokenizer has {tokenizer.n_bins} bins, the model {model.config.n_action_bins} action tokens."
        )
    backbone = OpenVLABackbone(model, processor, instructions)
    sampler = ActionTokenSampler(
        tokenizer,
        chunk_size=model.config.chunk_size,
        temperature=temperature,
        log_prob_level=log_prob_level,
        check=backbone.check_decision,
    )
    return OpenVLAActor(backbone, sampler)


def make_l1_actor(
    model: OpenVLA, processor: OpenVLAProcessor, *, instructions: Mapping[int, str] | None = None
) -> OpenVLAL1Actor:
    """Make a policy that acts by an OpenVLA's L1 head; beside :func:`make_actor` on one model, to compare both.

    Args:
        model: a network with an L1 head; the actor shares it.
        processor: makes the network's inputs.
        instructions: instruction of each task id, as for :func:`make_actor`.

    Raises:
        ValueError: if the model has no L1 head, or processor and model do not fit each other.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_vla.modules import OpenVLAConfig, build_tokenizer
        >>> model = OpenVLA(OpenVLAConfig.tiny(), use_l1_head=True)
        >>> processor = OpenVLAProcessor(build_tokenizer(["open the drawer"]), ActionTokenizer(), image_size=126)
        >>> observation = TensorDict(image=torch.zeros(3, 256, 256, dtype=torch.uint8), state=torch.zeros(8))
        >>> decision = TensorDict(observation=observation, language_instruction="open the drawer")
        >>> make_l1_actor(model, processor)(decision)["action"].shape
        torch.Size([8, 7])
    """
    return OpenVLAL1Actor(model, processor, instructions)


def make_value_operator(actor: OpenVLAActor, value_head: nn.Module) -> TensorDictSequential:
    """Make a state-value operator on an actor's network, for TorchRL's advantage estimators.

    It runs the network and the head, and writes ``"state_value"`` float32 ``[*B, 1]``. Its last element reads the
    hidden state alone, which ``ClipPPOLoss`` and ``ReinforceLoss`` have after ``get_dist``: pass ``operator`` to
    ``GAE`` and ``operator[-1]`` to the loss, and the update runs the network once (``A2CLoss`` wants ``operator``).
    ``GAE`` needs an actor that reads task ids (``instructions`` of :func:`make_actor`): strings it cannot handle.
    ``deactivate_vmap=True`` gives the same values faster where the model is accelerated, which ``vmap`` cannot use.

    Args:
        actor: the policy whose network to share.
        value_head: hidden state ``[*B, D]`` to value ``[*B, 1]``, e.g. :class:`ValueHead`.

    Examples:
        >>> from torchrl_vla.modules import OpenVLAConfig, ValueHead, build_tokenizer
        >>> model = OpenVLA(OpenVLAConfig.tiny())
        >>> processor = OpenVLAProcessor(build_tokenizer(["open the drawer"]), ActionTokenizer(), image_size=126)
        >>> operator = make_value_operator(make_actor(model, processor), ValueHead(model.config.hidden_size))
        >>> operator[-1].in_keys, operator.out_keys
        ([('vla_action', 'hidden')], ['state_value'])
    """
    head = ValueOperator(value_head, in_keys=[HIDDEN_KEY])
    return TensorDictSequential(actor.backbone, head).select_out_keys(*head.out_keys)
