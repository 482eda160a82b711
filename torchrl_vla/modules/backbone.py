"""OpenVLA as a TensorDict module: observations to logits, for rollout, update and value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_vla.errors import UserError
from torchrl_vla.modules.deferred import DeferredErrors, NonFiniteError
from torchrl_vla.modules.openvla.model import OpenVLA, OpenVLAOutput
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor, ProcessorOutput
from torchrl_vla.modules.openvla.prompt_table import PromptTable
from torchrl_vla.modules.vmap import call_on_batch, is_transformed

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
        ValueError: if the processor's image size or tokenizer do not fit the model, or two instructions have one
            prompt; when called, if a task id has no instruction.
        NonFiniteError: when called, if a state is NaN or infinite.

    What is wrong with numbers on a GPU is raised by the next call, or by :meth:`raise_errors`: nothing waits for it.
    """

    def __init__(
        self, model: OpenVLA, processor: OpenVLAProcessor, instructions: Mapping[int, str] | None = None
    ) -> None:
        super().__init__()
        config = model.config
        if processor.images.image_size != config.image_size:
            raise UserError(
                f"The processor makes images of {processor.images.image_size} pixels, the model takes "
                f"{config.image_size}; build the processor with image_size={config.image_size}."
            )
        if processor.empty_token_id != config.empty_token_id:
            raise UserError(
                f"The tokenizer ends prompts with token {processor.empty_token_id}, the model expects "
                f"{config.empty_token_id} there; use the tokenizer of the model's checkpoint."
            )
        if config.num_images > len(IMAGE_KEYS):
            raise UserError(f"The model takes {config.num_images} images, observations have {len(IMAGE_KEYS)} at most.")
        self.model = model
        self.processor = processor
        self.prompts = None if instructions is None else PromptTable(processor, instructions)
        self.errors = DeferredErrors()
        self.image_keys = list(IMAGE_KEYS[: config.num_images])
        task_key = INSTRUCTION_KEY if instructions is None else TASK_KEY
        self.in_keys = [*self.image_keys, *([STATE_KEY] if config.use_proprio else []), task_key]
        self.out_keys = [LOGITS_KEY, HIDDEN_KEY]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network on every element of the batch."""
        batch_size, output = tensordict.batch_size, self.run_model(tensordict)
        logits, hidden = output.action_logits, output.hidden_states.float().mean(dim=1)
        tensordict.set(LOGITS_KEY, logits.view(*batch_size, *logits.shape[1:]))
        return tensordict.set(HIDDEN_KEY, hidden.view(*batch_size, *hidden.shape[1:]))

    def run_model(self, tensordict: TensorDictBase) -> OpenVLAOutput:
        """Return the network's output, the batch's dimensions flattened to one."""
        prepared = tensordict.get(NETWORK_KEY, None)
        if prepared is None:
            return self.model(*self.read_inputs(tensordict))
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
        batch_size, inputs = tensordict.batch_size, self.read_inputs(tensordict)
        prepared = tensordict.exclude(*self.in_keys).to(self.model.device, non_blocking=True)
        given = {name: value for name, value in inputs._asdict().items() if value is not None}
        network = {name: value.view(*batch_size, *value.shape[1:]) for name, value in given.items()}
        return prepared.set(NETWORK_KEY, TensorDict(network, batch_size))

    def read_inputs(self, tensordict: TensorDictBase) -> ProcessorOutput:
        """Return the network's inputs."""
        self.errors.raise_known()
        inputs = tensordict.select(*self.in_keys).reshape(-1)
        frames = [inputs.get(key) for key in self.image_keys]
        state = [inputs.get(STATE_KEY)] if self.model.config.use_proprio else []
        if self.prompts is None:
            prompts = self.processor.encode_instructions(self._read_instructions(inputs))
            return self._process(inputs, frames, *prompts, *state)

        def process(task_ids: Tensor, *observed: Tensor) -> tuple[Tensor, ...]:
            assert self.prompts is not None
            prompts = self.prompts.look_up(task_ids, self.model.device)
            self.errors.check(prompts.unknown, partial(self._unknown_task, task_ids))
            images, states = observed[: len(frames)], observed[len(frames) :]
            named = TensorDict({TASK_KEY: task_ids}, [len(task_ids)])
            output = self._process(named, images, prompts.input_ids, prompts.attention_mask, *states)
            present[:] = [name for name, value in output._asdict().items() if value is not None]
            return tuple(value for value in output if value is not None)

        present: list[str] = []
        outputs = call_on_batch(process, inputs.get(TASK_KEY).squeeze(-1), *frames, *state)
        found = dict(zip(present, outputs, strict=True))
        return ProcessorOutput(
            found["pixel_values"], found["input_ids"], found.get("attention_mask"), found.get("proprio")
        )

    def _process(
        self,
        inputs: TensorDictBase,
        frames: Sequence[Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor | None = None,
    ) -> ProcessorOutput:
        if state is not None:
            # Normalised it would be clipped, and an infinite state would be a possible one.
            self.errors.check(~state.isfinite().flatten(1).all(1), partial(self._non_finite_state, inputs, state))
        return self.processor.process(frames, input_ids, attention_mask, state, device=self.model.device)

    def _read_instructions(self, inputs: TensorDictBase) -> list[str]:
        text = inputs[INSTRUCTION_KEY]
        return [text] * len(inputs) if isinstance(text, str) else list(text)

    def check_decision(self, tensordict: TensorDictBase, numbers: Tensor, name: str) -> None:
        """Refuse to decide by numbers that are not finite.

        Args:
            tensordict: the decisions [*B], with what :meth:`forward` reads.
            numbers: [*B, ...], what they are made by.
            name: of the numbers, for the error.

        Raises:
            NonFiniteError: if one is NaN or infinite: at once on the CPU; on a GPU before the next decision, or by
                :meth:`raise_errors`.
        """
        if not is_transformed([numbers]):
            wrong = ~numbers.detach().isfinite().flatten(tensordict.ndim).all(-1).flatten()
            kept = tensordict.select(INSTRUCTION_KEY, TASK_KEY, strict=False)
            self.errors.check(wrong, partial(self._non_finite_decision, kept, name))

    def raise_errors(self) -> None:
        """Raise what was wrong with decisions on a GPU, once it has caught up; call it after a batch's last decision.

        Raises:
            NonFiniteError: if a state was not finite, or what a decision was made by.
            ValueError: if a task id had no instruction.
        """
        self.errors.raise_known(wait=True)

    def _unknown_task(self, task_ids: Tensor, rows: list[int]) -> Exception:
        assert self.prompts is not None
        unknown, known = sorted(set(task_ids[rows].tolist())), list(self.prompts.instructions)
        return ValueError(f"task_id {unknown} have no instruction; instructions has {known}.")

    def _non_finite_state(self, inputs: TensorDictBase, state: Tensor, rows: list[int]) -> Exception:
        return NonFiniteError(
            f"observation.state is not finite in {len(rows)} of {len(state)} decisions, first in decision {rows[0]} "
            f"({self._task_of(inputs, rows[0])}): {state[rows[0]].tolist()}. The environment or the data is at fault."
        )

    def _non_finite_decision(self, inputs: TensorDictBase, name: str, rows: list[int]) -> Exception:
        tasks = sorted({self._task_of(inputs, row) for row in rows})
        read = "its images are bytes" + (", its state was finite" if self.model.config.use_proprio else "")
        return NonFiniteError(
            f"the policy's {name} are not finite in {len(rows)} of {inputs.numel()} decisions ({'; '.join(tasks)}). As "
            f"{read}, a weight of the policy is NaN or infinite, or its numbers overflow {self.model.dtype}: "
            "`torchrl-vla doctor` looks through a checkpoint."
        )

    def _task_of(self, inputs: TensorDictBase, row: int) -> str:
        inputs = inputs.reshape(-1)
        task_id = None if TASK_KEY not in inputs.keys() else int(inputs.get(TASK_KEY)[row])
        if self.prompts is None:
            return repr(self._read_instructions(inputs)[row])
        return f"task_id {task_id}, {self.prompts.instructions.get(task_id or 0)!r}"
