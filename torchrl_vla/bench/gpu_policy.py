"""What the parts of `torchrl-vla bench gpu` share: a 7B policy with adapters, its inputs, clocks and memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from tqdm import tqdm

from torchrl_vla.bench.measurements import Report
from torchrl_vla.checkpoints.policy import GRAPH_BATCH_SIZE, Policy, build_policy
from torchrl_vla.config import PPOConfig
from torchrl_vla.modules import make_actor
from torchrl_vla.modules.openvla.lora import add_lora
from torchrl_vla.objectives import AsymmetricClipPPOLoss
from torchrl_vla.recipes.grpo import make_buffer, update
from torchrl_vla.training.backward_pass import can_be_recorded
from torchrl_vla.training.devices import choose_device
from torchrl_vla.training.optimizer_step import OptimizerStep

GIB = 2**30
_PROMPT_TOKENS = 36  # with 256 patches, 56 action slots and </s>: 349


class Bench:
    """What the parts share: one policy with adapters, its inputs, and what has been measured of it.

    Args:
        model_name: ``7b`` or ``tiny``.
        num_envs: environments of the whole loop.
        num_decisions: decisions of the measured update.
        report: takes the figures.
        started: when the process began, by `time.perf_counter`.
    """

    def __init__(self, model_name: str, *, num_envs: int, num_decisions: int, report: Report, started: float) -> None:
        self.model_name, self.num_envs, self.num_decisions = model_name, num_envs, num_decisions
        self.report, self.started = report, started
        self.device = choose_device("auto")
        self.naive: dict[str, float] = {}
        self.floor_seconds: float | None = None
        self.expected: dict[str, Tensor] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @cached_property
    def policy(self) -> Policy:
        """The policy, LoRA-32 on every linear layer, its output adapters not at zero so that they count.

        It reads task ids, as `torchrl-vla train` has it; task 0 has an instruction that makes a decision 349 tokens.
        """
        torch.manual_seed(0)
        began = time.perf_counter()
        policy = build_policy(self.model_name, temperature=1.6, device=self.device)
        instructions = {0: _instruction_of(policy, _PROMPT_TOKENS)}
        policy.actor = make_actor(policy.model, policy.processor, temperature=1.6, instructions=instructions).eval()
        add_lora(policy.model, rank=32, alpha=16)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if ".lora_B" in name:
                    parameter.normal_(std=1e-3)
        policy.model.eval()
        self.synchronize()
        self.report.note("policy built: seconds", round(time.perf_counter() - began, 2))
        return policy

    @property
    def model(self) -> Any:
        """The network."""
        return self.policy.model

    def accelerate(self) -> None:
        """Take the fast paths from here on, as the presets do."""
        if not self.model.accelerated:
            set_adapters(self.model, torch.float32)
            self.model.accelerate(graph_batch_size=GRAPH_BATCH_SIZE if self.on_gpu else 0)

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """Model inputs of 349 tokens each."""
        config = self.model.config
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch, 6, config.image_size, config.image_size, generator=generator)
        ids = torch.randint(4, 200, (1, _PROMPT_TOKENS), generator=generator).expand(batch, -1).clone()
        ids[:, 0], ids[:, -1] = config.bos_token_id, config.empty_token_id
        proprio = torch.zeros(batch, config.proprio_dim) if config.use_proprio else None
        return (
            pixels.to(self.device), ids.to(self.device), None, None if proprio is None else proprio.to(self.device)
        )  # fmt: skip

    def decisions(self, count: int) -> TensorDictBase:
        """Return what a rollout of the policy would have stored: observations, tokens and their log-probabilities."""
        generator = torch.Generator().manual_seed(2)
        images = torch.randint(0, 256, (count, 3, 256, 256), dtype=torch.uint8, generator=generator)
        observation = TensorDict({"image": images, "state": torch.zeros(count, 8)}, [count])
        task = torch.zeros(count, 1, dtype=torch.int64)
        seen = TensorDict({"observation": observation, "task_id": task}, [count])
        with torch.no_grad():
            parts = [self.policy.actor(part.to(self.device)) for part in seen.split(8)]
        data: TensorDictBase = TensorDict.cat(parts).cpu()
        half = torch.arange(count) % 2 == 0
        data.set("advantage", torch.where(half, 1.0, -1.0).unsqueeze(-1))
        done = torch.zeros(count, 1, dtype=torch.bool)
        done[-1] = True
        return data.set(("next", "done"), done)

    def optimizer_step(self, **values: Any) -> OptimizerStep:
        """Make an optimizer step as the presets do, over decisions that have their advantages."""
        defaults = {"n_epochs": 1, "traj_split_num": 1, "val_interval": 0, "batch_size": "auto"}
        config = PPOConfig(**{**defaults, **values})
        loss = AsymmetricClipPPOLoss(self.policy.actor, None, entropy_coeff=config.entropy_coef).to(self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.actor_lr, weight_decay=0.0, fused=self.on_gpu)
        return OptimizerStep(
            loss, optimizer, config, device=self.device, report=tqdm.write,
            set_recompute=self.model.gradient_checkpointing_enable,
            prepare=self.policy.actor.backbone.prepare if can_be_recorded(self.model) else None,
        )  # fmt: skip

    @staticmethod
    def update(step: OptimizerStep, batch: TensorDictBase) -> dict[str, float]:
        """Do what `torchrl-vla train` does with a batch, without an advantage to compute; return its figures."""
        return update(step.config, batch, make_buffer(), step, episodes=int(batch["next", "done"].sum()))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any], repeats: int = 5, warm_ups: int = 2) -> float:
        """Median time of a call, waiting for the device after each."""
        for _ in range(warm_ups):
            function()
        times = []
        for _ in range(repeats):
            self.synchronize()
            began = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times) * 1e3

    @contextmanager
    def peak(self, figures: dict[str, float]) -> Iterator[None]:
        """Peak GPU memory of a block in GiB: allocated, and reserved from the card."""
        self.clean()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.on_gpu:
            figures["allocated"] = torch.cuda.max_memory_allocated() / GIB
            figures["reserved"] = torch.cuda.max_memory_reserved() / GIB

    def clean(self) -> None:
        """Give memory back between parts."""
        if "policy" in self.__dict__:
            self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def floor(self, passes: float) -> str:
        """Return the floor of so many forwards of arithmetic, for a figure's name."""
        return "" if self.floor_seconds is None else f" (floor {passes * self.floor_seconds * 1e3:.1f})"


def set_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the adapters in another dtype."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _instruction_of(policy: Policy, tokens: int) -> str:
    """Return an instruction whose prompt has so many tokens."""
    for words in range(1, 2 * tokens):
        instruction = " ".join(["bowl"] * words)
        if policy.processor.encode_instructions([instruction])[0].shape[1] >= tokens:
            break
    return instruction
