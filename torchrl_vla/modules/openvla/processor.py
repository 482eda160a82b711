"""Observations to the inputs of an OpenVLA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from torchrl_vla.errors import UserError
from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.openvla.image_pipeline import ImageBackend, ImagePipeline
from torchrl_vla.modules.openvla.tokenizer import empty_token_id, encode_prompt, unknown_words


class ProcessorOutput(NamedTuple):
    """Arguments of :meth:`OpenVLA.forward`, in its order.

    Args:
        pixel_values: float32 ``[B, 6 k, S, S]`` for ``k`` images.
        input_ids: int64 ``[B, L]``, padded on the right.
        attention_mask: int64 ``[B, L]``, 1 at tokens; None if no prompt is padded.
        proprio: float32 ``[B, 8]`` in [-1, 1]; None without a state.
    """

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    proprio: Tensor | None


class OpenVLAProcessor:
    """Turns frames, instructions and states into model inputs, batched and on the model's device.

    Prompts are tokenized once per instruction. Words that the tokenizer does not know are warned of, once each, and two
    instructions that become one prompt are refused. Frames travel to the device as uint8.

    Args:
        tokenizer: of the language model, from :func:`load_tokenizer` or :func:`build_tokenizer`.
        action_tokenizer: holds the statistics that states are normalised with.
        image_size: side of the model's input images in pixels.
        center_crop: as for :class:`ImagePipeline`.
        backend: ``"exact"`` or ``"fast"``, as for :class:`ImagePipeline`.
        prompt_multiple: prompts are padded to a multiple of so many tokens, and always have a mask, so that tasks of
            different instructions share one shape; 1 pads only prompts of different length in one batch.

    Raises:
        ValueError: if the tokenizer has no empty token, or an option is out of range.

    Examples:
        >>> import torch
        >>> from torchrl_vla.modules.openvla.tokenizer import build_tokenizer
        >>> processor = OpenVLAProcessor(build_tokenizer(["open the drawer"]), ActionTokenizer(), image_size=126)
        >>> frames = torch.zeros(2, 3, 256, 256, dtype=torch.uint8)
        >>> inputs = processor(frames, ["open the drawer"] * 2, torch.zeros(2, 8))
        >>> inputs.pixel_values.shape, inputs.input_ids.shape, inputs.proprio.shape
        (torch.Size([2, 6, 126, 126]), torch.Size([2, 17]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        action_tokenizer: ActionTokenizer,
        *,
        image_size: int = 224,
        center_crop: bool = True,
        backend: ImageBackend = "exact",
        prompt_multiple: int = 1,
    ) -> None:
        if prompt_multiple < 1:
            raise UserError(f"prompt_multiple must be at least 1 (no padding beyond the batch), got {prompt_multiple}.")
        self.tokenizer = tokenizer
        self.action_tokenizer = action_tokenizer
        self.images = ImagePipeline(image_size, center_crop=center_crop, backend=backend)
        self.empty_token_id = empty_token_id(tokenizer)
        self.prompt_multiple = prompt_multiple
        self._prompts: dict[str, Tensor] = {}
        self._said: dict[tuple[int, ...], str] = {}
        self._unknown: set[str] = set()

    def __call__(
        self,
        images: Tensor | Sequence[Tensor],
        instructions: Sequence[str],
        state: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> ProcessorOutput:
        """Process a batch of observations.

        Args:
            images: uint8 ``[B, 3, H, W]``, or one such tensor per camera in the model's order.
            instructions: ``B`` task descriptions.
            state: proprioception ``[B, 8]``, not normalised; None for a model without it.
            device: where to compute and where the outputs lie; by default where the images are.

        Raises:
            ValueError: if batch sizes differ, or an image, instruction or state is not as it should be.
        """
        return self.process(images, *self.encode_instructions(instructions), state, device=device)

    def process(
        self,
        images: Tensor | Sequence[Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> ProcessorOutput:
        """Process a batch of observations whose prompts are tokenized.

        Args:
            images: as for a call.
            input_ids: int64 ``[B, L]``, as :meth:`encode_instructions` gives them.
            attention_mask: int64 ``[B, L]`` or None, likewise.
            state: as for a call.
            device: as for a call.

        Raises:
            ValueError: if batch sizes differ, or an image or state is not as it should be.
        """
        cameras = [images] if isinstance(images, Tensor) else list(images)
        sizes = {len(frames) for frames in cameras} | {len(input_ids)} | ({len(state)} if state is not None else set())
        if len(sizes) != 1:
            raise UserError(
                f"images, instructions and state must be of one batch size, got {[len(frames) for frames in cameras]} "
                f"images, {len(input_ids)} instructions and {'no' if state is None else len(state)} states."
            )
        device = cameras[0].device if device is None else torch.device(device)
        return ProcessorOutput(
            torch.cat([self.images(frames, device) for frames in cameras], dim=1),
            input_ids.to(device),
            None if attention_mask is None else attention_mask.to(device),
            None if state is None else self._normalize_state(state).to(device),
        )

    def encode_instructions(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts as int64 ``[B, L]``, padded on the right, and their mask; no mask if none is asked for or needed.

        Raises:
            ValueError: if an instruction is blank, or has the prompt of another one.
        """
        prompts = [self._prompt(instruction) for instruction in instructions]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        if self.prompt_multiple == 1 and bool((lengths == longest).all()):
            return torch.stack(prompts), None
        # What stands in the padding is never attended to.
        padding = self.tokenizer.pad_token_id or 0
        input_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=padding)
        input_ids = F.pad(input_ids, (0, -longest % self.prompt_multiple), value=padding)
        return input_ids, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()

    def _prompt(self, instruction: str) -> Tensor:
        if instruction not in self._prompts:
            ids = encode_prompt(self.tokenizer, instruction)
            self._warn_of_unknown_words(instruction)
            # The policy could not tell such tasks apart. Case and blanks alone say nothing.
            said = " ".join(instruction.lower().split())
            if (other := self._said.setdefault(tuple(ids), said)) != said:
                raise UserError(
                    f"{instruction!r} and {other!r} have the same prompt for the policy's tokenizer, which does not "
                    "know all of their words: leave one of the tasks out, or train a policy whose tokenizer knows both "
                    "(build_tokenizer)."
                )
            self._prompts[instruction] = torch.tensor(ids)
        return self._prompts[instruction]

    def _warn_of_unknown_words(self, instruction: str) -> None:
        new = [word for word in unknown_words(self.tokenizer, instruction) if word not in self._unknown]
        self._unknown.update(new)
        if new:
            warnings.warn(
                f"The policy's tokenizer does not know {', '.join(map(repr, new))} in {instruction!r}: the policy "
                f"reads {self.tokenizer.unk_token} there.",
                stacklevel=2,
            )

    def _normalize_state(self, state: Tensor) -> Tensor:
        statistics = self.action_tokenizer
        return statistics.normalize_proprio(state.to(statistics.action_q01.device, torch.float32))
