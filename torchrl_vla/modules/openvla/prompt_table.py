"""The prompts of all tasks, tokenized once and looked up by task id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrl_vla.errors import UserError
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor


class Prompts(NamedTuple):
    """Prompts of a batch.

    Args:
        input_ids: int64 [B, L], padded on the right to the longest prompt of all tasks.
        attention_mask: int64 [B, L], 1 at tokens; None if all tasks' prompts are of one length.
        unknown: bool [B], True where there is no such task; another task's prompt stands there.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    unknown: Tensor


class PromptTable:
    """Looks prompts up on any device, without reading a value back.

    Args:
        processor: tokenizes the instructions.
        instructions: instruction of each task id.

    Raises:
        ValueError: if there is no instruction, one is blank, or two of them have the same prompt.

    Examples:
        >>> from torchrl_vla.modules import ActionTokenizer, OpenVLAProcessor, build_tokenizer
        >>> tasks = {3: "open the drawer", 8: "close the drawer"}
        >>> processor = OpenVLAProcessor(build_tokenizer(tasks.values()), ActionTokenizer(), image_size=126)
        >>> prompts = PromptTable(processor, tasks).look_up(torch.tensor([8, 3, 5]), torch.device("cpu"))
        >>> prompts.input_ids.shape, prompts.unknown
        (torch.Size([3, 17]), tensor([False, False,  True]))
    """

    def __init__(self, processor: OpenVLAProcessor, instructions: Mapping[int, str]) -> None:
        if not instructions:
            raise UserError("instructions is empty: give the instruction of every task id that is to be read.")
        self.instructions = dict(sorted(instructions.items()))
        input_ids, attention_mask = processor.encode_instructions(list(self.instructions.values()))
        self._tables = {torch.device("cpu"): (torch.tensor(list(self.instructions)), input_ids, attention_mask)}

    def __getstate__(self) -> dict[str, Any]:
        cpu = torch.device("cpu")
        return self.__dict__ | {"_tables": {cpu: self._tables[cpu]}}  # another process has its own device

    def look_up(self, task_ids: Tensor, device: torch.device) -> Prompts:
        """Find prompts.

        Args:
            task_ids: int64 [B], on any device.
            device: where the prompts are wanted.
        """
        known = self._on(task_ids.device)[0]
        row = torch.searchsorted(known, task_ids.contiguous()).clamp(max=len(known) - 1)
        unknown = known[row] != task_ids
        _, input_ids, attention_mask = self._on(device)
        row = row.to(device, non_blocking=True)
        return Prompts(input_ids[row], None if attention_mask is None else attention_mask[row], unknown)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        if device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            known, input_ids, attention_mask = (None if table is None else table.to(device) for table in tables)
            assert known is not None and input_ids is not None
            self._tables[device] = known, input_ids, attention_mask
        return self._tables[device]
