"""OpenVLA as a TorchRL policy and value operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor, SafeProbabilisticModule, ValueOperator
from torchrl.modules.tensordict_module.probabilistic import SafeProbabilisticTensorDictSequential

from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.distributions import SEED_KEY, TokenCategorical, check_temperature
from torchrl_vla.modules.openvla.model import OpenVLA, OpenVLAOutput
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor, ProcessorOutput

IMAGE_KEYS: tuple[NestedKey, ...] = (("observation", "image"), ("observation", "wrist_image"))
STATE_KEY: NestedKey = ("observation", "state")
INSTRUCTION_KEY: NestedKey = "language_instruction"
TOKENS_KEY: NestedKey = ("vla_action", "tokens")
LOG_PROBS_KEY: NestedKey = ("vla_action", "log_probs")
LOGITS_KEY: NestedKey = ("vla_action", "logits")
HIDDEN_KEY: NestedKey = ("vla_action", "hidden")
ACTION_KEY: NestedKey = "action"
TASK_KEY: NestedKey = "task_id"
#: What the network reads, as :class:`ProcessorOutput` names it, where it was made before the forward.
NETWORK_KEY: NestedKey = "network"

LogProbLevel = Literal["token", "action", "chunk"]


class OpenVLABackbone(TensorDictModuleBase):
    """Observations to token logits and the pooled hidden state; one forward for rollout, update and value.

    Reads ``("observation", "image")`` uint8 ``[*B, 3, H, W]``, the wrist image and the state where the model takes
    them, and ``"language_instruction"`` (or ``"task_id"`` int64 ``[*B, 1]``). Writes ``("vla_action", "logits")``
    float32 ``[*B, K, 7, 256]`` and ``("vla_action", "hidden")`` float32 ``[*B, D]``, the mean over the action rows
    after the final norm.

    Args:
        model: the network.
        processor: makes its inputs.
        instructions: instruction of each task id, if task ids are to be read and not strings.

    Raises:
        ValueError: if the processor's image size or tokenizer do not fit the model; when called, if a task id has no
            instruction.
    """

    def __init__(
        self, model: OpenVLA, processor: OpenVLAProcessor, instructions: Mapping[int, str] | None = None
    ) -> None:
        super().__init__()
        config = model.config
        if processor.images.image_size != config.image_size:
            raise ValueError(
                f"The processor makes images of {processor.images.image_size} pixels, the model takes "
                f"{config.image_size}; build the processor with image_size={config.image_size}."
            )
        if processor.empty_token_id != config.empty_token_id:
            raise ValueError(
                f"The tokenizer ends prompts with token {processor.empty_token_id}, the model expects "
                f"{config.empty_token_id} there; use the tokenizer of the model's checkpoint."
            )
        if config.num_images > len(IMAGE_KEYS):
            raise ValueError(
                f"The model takes {config.num_images} images, observations have {len(IMAGE_KEYS)} at most."
            )
        self.model = model
        self.processor = processor
        self.instructions = instructions
        self.image_keys = list(IMAGE_KEYS[: config.num_images])
        task_key = INSTRUCTION_KEY if instructions is None else TASK_KEY
        self.in_keys = [*self.image_keys, *([STATE_KEY] if config.use_proprio else []), task_key]
        self.out_keys = [LOGITS_KEY, HIDDEN_KEY]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network on every element of the batch."""
        batch_size, output = tensordict.batch_size, self._run_model(tensordict)
        logits, hidden = output.action_logits, output.hidden_states.float().mean(dim=1)
        tensordict.set(LOGITS_KEY, logits.view(*batch_size, *logits.shape[1:]))
        return tensordict.set(HIDDEN_KEY, hidden.view(*batch_size, *hidden.shape[1:]))

    def _run_model(self, tensordict: TensorDictBase) -> OpenVLAOutput:
        """The network's output, the batch's dimensions flattened to one."""
        prepared = tensordict.get(NETWORK_KEY, None)
        if prepared is None:
            return self.model(*self._read(tensordict))
        network = prepared.reshape(-1)
        return self.model(*(network.get(name, None) for name in ProcessorOutput._fields))

    def prepare(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Do ahead whatever of a forward needs the host: the rest of it can be recorded and replayed.

        Args:
            tensordict: what :meth:`forward` reads, and anything else.

        Returns:
            A batch on the network's device that :meth:`forward` takes, the network's inputs in place of what they were
            made of.
        """
        self.model.refresh_adapters()
        batch_size, inputs = tensordict.batch_size, self._read(tensordict)
        prepared = tensordict.exclude(*self.in_keys).to(self.model.device, non_blocking=True)
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        network = {name: value.view(*batch_size, *value.shape[1:]) for name, value in given.items()}
        return prepared.set(NETWORK_KEY, TensorDict(network, batch_size))

    def _read(self, tensordict: TensorDictBase) -> ProcessorOutput:
        """The network's inputs."""
        inputs = tensordict.select(*self.in_keys).reshape(-1)
        return self.processor(
            [inputs.get(key) for key in self.image_keys],
            self._read_instructions(inputs),
            inputs.get(STATE_KEY) if self.model.config.use_proprio else None,
            device=self.model.device,
        )

    def _read_instructions(self, inputs: TensorDictBase) -> list[str]:
        if self.instructions is None:
            text = inputs[INSTRUCTION_KEY]
            return [text] * len(inputs) if isinstance(text, str) else list(text)
        task_ids = inputs[TASK_KEY].flatten().tolist()
        unknown = sorted(set(task_ids) - set(self.instructions))
        if unknown:
            raise ValueError(f"task_id {unknown} have no instruction; instructions has {sorted(self.instructions)}.")
        return [self.instructions[task_id] for task_id in task_ids]


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
            raise ValueError(
                "this model has no L1 head to act by: load a checkpoint with action_head--N_checkpoint.pt and "
                "load_l1_action_head=True, or act by its tokens (make_actor)."
            )
        self.action_tokenizer = processor.action_tokenizer
        self.out_keys = [ACTION_KEY]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Decide: forward, regress, to the env's units."""
        normalized = self.model.predict_l1(self._run_model(tensordict).hidden_states).float()
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
    """

    def __init__(
        self, action_tokenizer: ActionTokenizer, *, chunk_size: int, temperature: float, log_prob_level: LogProbLevel
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
            place of ``"language_instruction"``: cheaper between processes, and what TorchRL's GAE can work with.

    Raises:
        ValueError: if the temperature is negative, the level unknown, or processor, tokenizer and model do not fit
            each other.

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
        raise ValueError(f"log_prob_level must be one of {', '.join(get_args(LogProbLevel))}, got {log_prob_level!r}.")
    tokenizer = processor.action_tokenizer if tokenizer is None else tokenizer
    if tokenizer.n_bins != model.config.n_action_bins:
        raise ValueError(
            f"The action tokenizer has {tokenizer.n_bins} bins, the model {model.config.n_action_bins} action tokens."
        )
    sampler = ActionTokenSampler(
        tokenizer, chunk_size=model.config.chunk_size, temperature=temperature, log_prob_level=log_prob_level
    )
    return OpenVLAActor(OpenVLABackbone(model, processor, instructions), sampler)


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
    ``GAE`` needs ``deactivate_vmap=True`` and an actor that reads task ids: strings it cannot handle.

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
