"""What a training starts with: the options checked against files and machine, and the policy, ready to learn."""

from __future__ import annotations

import logging

import torch

from torchrl_vla.checkpoints.policy import Policy, load_policy
from torchrl_vla.config import TrainConfig
from torchrl_vla.distributed.ranks import OneProcess
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.errors import UserError
from torchrl_vla.evaluation.protocol import initial_states
from torchrl_vla.training.devices import choose_device, choose_head_device
from torchrl_vla.training.logging import check_wandb
from torchrl_vla.training.run_folder import check_run_folder

__all__ = ["load_for_training"]

logger = logging.getLogger(__name__)


def load_for_training(config: TrainConfig, ranks: OneProcess) -> tuple[Policy, torch.device, torch.device]:
    """Check a run's options before anything long, seed what draws at random, and load its policy.

    Args:
        config: the run.
        ranks: the processes that train together; each has a GPU of its own where there are some.

    Returns:
        The policy, the device it is on, and the device for its heads.

    Raises:
        ValueError: an option does not fit the checkpoint, the suite or this machine.
    """
    ppo = config.ppo
    if ranks.is_first:
        check_run_folder(config)
    config.actor.require_tokens_for_ppo()
    device = choose_device(ppo.device, config.actor.gpu_id if ranks.size == 1 else ranks.local_rank)
    head_device = choose_head_device(
        device, use_multi_gpu=config.actor.use_multi_gpu, secondary_gpu_id=config.actor.secondary_gpu_id
    )
    suite = get_suite(ppo.task_suite)
    for states in (ppo.init_state_ids, ppo.val_init_state_ids):
        initial_states(suite, ppo.tasks, states)
    if ppo.use_wandb:
        check_wandb()
    backend = configure_rendering()
    torch.manual_seed(ppo.seed)
    policy = load_policy(
        config.actor,
        task_suite=suite.name,
        temperature=ppo.rollout_temperature,
        device=device,
        head_device=head_device,
        read_task_ids=ppo.tasks,
        proprio_format=ppo.proprio_format,
    )
    if config.actor.use_multi_gpu and policy.model.action_head is None and ppo.advantage_estimator != "gae":
        logger.warning(
            "use_multi_gpu leaves %s idle: this run has neither an L1 head (load_l1_action_head) nor a value head "
            "(advantage_estimator=gae) to put there.",
            head_device,
        )
    image_size = policy.model.config.image_size
    if ppo.image_size not in (None, (image_size, image_size)):
        raise UserError(
            f"image_size is {ppo.image_size}, but {config.actor.pretrained_checkpoint} was made for "
            f"{(image_size, image_size)}: leave image_size out."
        )
    policy.share_prompt_length(suite.task(task).instruction for task in ppo.tasks)
    attention = policy.model.language_model.config._attn_implementation
    logger.info("device %s, OpenGL through %s, attention through %s", device, backend, attention)
    return policy, device, head_device
