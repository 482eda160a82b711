"""`torchrl-vla train`: check what can be checked, build the parts, run the loop, say where the results are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.envs import EnvBase
from torchrl.objectives.value import GAE
from tqdm import tqdm

from torchrl_vla.checkpoints.policy import Policy, load_policy, save_policy
from torchrl_vla.collectors import GroupCollector
from torchrl_vla.collectors.update_batches import UpdateCollector
from torchrl_vla.config import PPOConfig, TrainConfig
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.factory import make_envs
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.evaluation.protocol import evaluate, initial_states, spread_episodes
from torchrl_vla.evaluation.videos import choose_episodes, film
from torchrl_vla.modules import ActionTokenizer, OpenVLAActor, ValueHead, make_value_operator
from torchrl_vla.modules.openvla.lora import has_lora
from torchrl_vla.objectives import AsymmetricClipPPOLoss, GRPOAdvantage
from torchrl_vla.training.backward_pass import can_be_recorded
from torchrl_vla.training.devices import choose_device, choose_head_device
from torchrl_vla.training.logging import RunLogger, check_wandb
from torchrl_vla.training.optimizer_step import PPOTrainer
from torchrl_vla.training.progress import EpisodeBar
from torchrl_vla.training.run_checkpoints import RunCheckpoints, TrainableState
from torchrl_vla.training.run_folder import describe_run, log_to, open_run_folder

__all__ = ["build_trainer", "train"]

logger = logging.getLogger(__name__)


def train(config: TrainConfig, preset: str) -> Path:
    """Run one training from start (or checkpoint) to end.

    Args:
        config: the run.
        preset: name of the preset it started from, for the record.

    Returns:
        The run's folder.

    Raises:
        ValueError: something the user asked for cannot be had; nothing long was started then.
    """
    config.actor.require_tokens_for_ppo()
    device = choose_device(config.ppo.device, config.actor.gpu_id)
    head_device = choose_head_device(
        device, use_multi_gpu=config.actor.use_multi_gpu, secondary_gpu_id=config.actor.secondary_gpu_id
    )
    suite = get_suite(config.env.task_suite)
    initial_states(suite, config.env.tasks, config.env.init_state_ids)
    initial_states(suite, config.env.tasks, config.env.val_init_state_ids)
    if config.ppo.use_wandb:
        check_wandb()
    backend = configure_rendering()
    torch.manual_seed(config.ppo.seed)
    policy = load_policy(
        config.actor,
        task_suite=suite.name,
        temperature=config.ppo.rollout_temperature,
        device=device,
        head_device=head_device,
        read_task_ids=True,
        proprio_format=config.env.proprio_format,
    )
    if config.actor.use_multi_gpu and policy.model.action_head is None and config.ppo.advantage_estimator != "gae":
        logger.warning(
            "use_multi_gpu leaves %s idle: this run has neither an L1 head (load_l1_action_head) nor a value head "
            "(advantage_estimator=gae) to put there.",
            head_device,
        )
    image_size = policy.model.config.image_size
    if tuple(config.env.image_size) != (image_size, image_size):
        raise ValueError(
            f"image_size is {tuple(config.env.image_size)}, but {config.actor.pretrained_checkpoint} was made for "
            f"{(image_size, image_size)}: use --image-size {image_size} {image_size}."
        )
    policy.share_prompt_length(suite.task(task).instruction for task in config.env.tasks)
    folder = open_run_folder(config, preset)
    tqdm.write(f"preset {preset}, policy {config.actor.pretrained_checkpoint} on {device}, results go to {folder}")
    attention = policy.model.language_model.config._attn_implementation
    with log_to(folder / "train.log"), build_trainer(config, policy, folder, device, head_device) as trainer:
        # Not before its checkpoint is read: options that do not fit it are not to stay.
        describe_run(config, folder, preset=preset)
        logger.info("preset %s, device %s, OpenGL through %s, attention through %s", preset, device, backend, attention)
        trainer.train()
        # Weights in 4 bits are rounded: adapters are merged into those of the checkpoint.
        place = f"`torchrl-vla export {folder} OUT`" if policy.model.is_loaded_in_4bit else folder / "policy"
        trainer.logger.print(
            f"Done: {trainer.updates} updates, {trainer.env_steps:,} control steps. Policy: {place}   "
            f"Figures: {trainer.logger.csv_path}   Learning curve: {trainer.logger.curve_path}"
        )
    return folder


@contextmanager
def build_trainer(
    config: TrainConfig, policy: Policy, folder: Path, device: torch.device, head_device: torch.device
) -> Iterator[PPOTrainer]:
    """Put a run's parts together, and close what needs closing when it ends.

    Args:
        config: the run.
        policy: what is to learn.
        folder: the run's folder.
        device: where the policy lives.
        head_device: where a value head learns.
    """
    ppo = config.ppo
    value_head = ValueHead(policy.model.config.hidden_size).to(device) if ppo.advantage_estimator == "gae" else None
    suite = get_suite(config.env.task_suite)
    horizon = config.env.max_episode_steps or suite.horizon
    envs = make_envs(
        config.env.task_suite,
        task_ids=config.env.tasks,
        num_envs=config.env.num_envs,
        chunk_size=policy.model.config.chunk_size,
        image_size=config.env.camera_size,
        cameras=("agentview", "robot0_eye_in_hand")[: policy.model.config.num_images],
        proprio_format=config.env.proprio_format,
        max_episode_steps=horizon,
        reward_scale=config.env.reward_scale,
        worker_timeout=config.env.worker_timeout,
        **config.env.simulation,
    )
    try:
        yield _assemble(config, folder, device, head_device, policy, value_head, envs, horizon)
    finally:
        for env in envs:
            env.close(raise_if_closed=False)  # an error before its first use is the one to see


def _assemble(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    head_device: torch.device,
    policy: Policy,
    value_head: ValueHead | None,
    envs: Sequence[EnvBase],
    horizon: int,
) -> PPOTrainer:
    ppo, actor = config.ppo, policy.actor
    assert isinstance(actor, OpenVLAActor)
    value_operator = None if value_head is None else make_value_operator(actor, value_head)
    loss = AsymmetricClipPPOLoss(
        actor,
        None if value_operator is None else value_operator[-1],
        clip_ratio_low=ppo.clip_ratio_low,
        clip_ratio_high=ppo.clip_ratio_high,
        ratio_level=ppo.ratio_level,
        dual_clip=ppo.dual_clip,
        entropy_coeff=ppo.entropy_coef,
        kl_coeff=ppo.kl_coef,
        reference_context=_reference(policy) if ppo.kl_coef else None,
        reconstruction_coeff=ppo.reconstruction_coef,
        bin_centers=_token_values(policy.processor.action_tokenizer) if ppo.reconstruction_coef else None,
        critic_coeff=None if value_head is None else ppo.value_loss_coef,
    ).to(device)
    if value_head is not None:
        # The loss holds it too, and took it along to the policy's device.
        value_head.to(head_device)
    one_gpu = value_head is None or head_device == device
    groups = [{"params": [p for p in policy.model.parameters() if p.requires_grad], "lr": ppo.actor_lr}]
    if value_head is not None:
        groups.append({"params": list(value_head.parameters()), "lr": ppo.critic_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type == "cuda")

    run_logger = RunLogger(folder, use_wandb=ppo.use_wandb, wandb_entity=ppo.wandb_entity, config=_described(config))
    rollout: TensorDictModuleBase = actor
    if value_operator is not None:
        # The actor keeps its hidden state to itself; the value head reads it here, in the same pass.
        rollout = TensorDictSequential(actor.backbone, actor[-1], value_operator[-1])
        rollout.select_out_keys(*actor.out_keys, *value_operator.out_keys)
    collector = UpdateCollector(
        GroupCollector(envs, rollout, progress=EpisodeBar("rollout")),
        config.env.tasks,
        next(
            iter(initial_states(get_suite(config.env.task_suite), config.env.tasks, config.env.init_state_ids).values())
        ),
        min_steps=ppo.n_steps,
        group_size=ppo.group_size,
        horizon=horizon,
        seed=ppo.seed,
    )
    components: dict[str, Any] = {
        "policy": TrainableState(policy.model),
        "optimizer": optimizer,
        "collector": collector,
    }
    if value_head is not None:
        components["value_head"] = TrainableState(value_head)

    def save(trainer: PPOTrainer) -> None:
        success = trainer.latest("val/success_rate", trainer.latest("rollout/success_rate", 0.0))
        checkpoints.save(step=trainer.env_steps, success=success)
        if not policy.model.is_loaded_in_4bit:
            save_policy(policy, folder / "policy")

    validate = _validation(config, actor, envs, run_logger)
    trainer = PPOTrainer(
        ppo,
        collector,
        loss,
        _advantage(ppo),
        optimizer,
        run_logger,
        validate=lambda: validate(trainer.env_steps),
        save=save,
        device=device,
        set_recompute=policy.model.gradient_checkpointing_enable,
        # A recording is of one GPU.
        prepare=actor.backbone.prepare if one_gpu and can_be_recorded(policy.model) else None,
    )
    checkpoints = RunCheckpoints(folder / "checkpoints", keep=ppo.keep_checkpoints, trainer=trainer, **components)
    if config.resume:
        path = checkpoints.load_latest()
        run_logger.restore(trainer.updates)
        run_logger.print(f"Going on from {path}: update {trainer.updates}, {trainer.env_steps:,} control steps.")
    return trainer


def _described(config: TrainConfig) -> dict[str, Any]:
    """The options for W&B, where TorchRL writes under "env" what it runs on."""
    return {"ppo": vars(config.ppo), "environment": vars(config.env), "actor": vars(config.actor)}


def _token_values(tokenizer: ActionTokenizer) -> torch.Tensor:
    """The normalised action of each token `[V]`; the tokenizer's centres are one fewer, and rise where tokens fall."""
    return tokenizer.decode(torch.arange(tokenizer.n_bins))


def _reference(policy: Policy) -> Callable[[], AbstractContextManager[Any]]:
    """The policy that the run started from: adapters left out, or, without adapters, the first weights put back."""
    if has_lora(policy.model):
        return policy.reference_context
    frozen = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}

    @contextmanager
    def first_weights() -> Iterator[None]:
        current = {name: p.data for name, p in policy.model.named_parameters() if name in frozen}
        for name, parameter in policy.model.named_parameters():
            if name in frozen:
                parameter.data = frozen[name]
        try:
            yield
        finally:
            for name, parameter in policy.model.named_parameters():
                if name in current:
                    parameter.data = current[name]

    return first_weights


def _advantage(ppo: PPOConfig) -> GRPOAdvantage | Callable[[TensorDictBase], TensorDictBase]:
    if ppo.advantage_estimator == "gae":
        # The rollout wrote the values, of the last observations too: no network is needed here.
        return GAE(gamma=ppo.gamma, lmbda=ppo.gae_lambda, value_network=None, average_gae=True)
    return GRPOAdvantage(
        ppo.advantage_estimator,
        baseline=ppo.baseline,
        verifier_gamma=ppo.verifier_gamma,
        keep_low=ppo.keep_low,
        keep_high=ppo.keep_high,
    )


def _validation(
    config: TrainConfig, actor: OpenVLAActor, envs: Sequence[EnvBase], run_logger: RunLogger
) -> Callable[[int], Mapping[str, float]]:
    suite = get_suite(config.env.task_suite)
    states = initial_states(suite, config.env.tasks, config.env.val_init_state_ids)
    if config.ppo.val_interval and any(
        set(states[task]) & set(trained_on)
        for task, trained_on in initial_states(suite, config.env.tasks, config.env.init_state_ids).items()
    ):
        run_logger.print(
            "Training starts from the validations' initial states too: they say how the run goes, not how the policy "
            "does where it has not trained. --init-state-ids and --val-init-state-ids keep them apart."
        )
    instructions = {task: suite.task(task).instruction for task in config.env.tasks}
    temperature, wanted = config.ppo.eval_temperature, max(config.ppo.val_episodes, 1)
    if not config.actor.deterministic_eval and not temperature:
        temperature = config.ppo.rollout_temperature
    plan = spread_episodes(config.env.tasks, states, wanted, repeat=temperature > 0)
    if len(plan) < wanted and config.ppo.val_interval:
        run_logger.print(
            f"Validations run {len(plan)} episodes, not val_episodes={wanted}: greedy ones from one initial state are "
            "nearly the same, so each is run once. More --val-init-state-ids or an --eval-temperature above 0 add some."
        )

    def validate(env_steps: int) -> Mapping[str, float]:
        sampling = actor.temperature
        actor.temperature = temperature or sampling
        try:
            report = evaluate(
                envs,
                actor,
                plan,
                task_suite=config.env.task_suite,
                instructions=instructions,
                greedy=temperature == 0,
                progress=EpisodeBar("validation"),
            )
        finally:
            actor.temperature = sampling
        if config.ppo.val_videos:
            chosen = choose_episodes(report.episodes, per_task=False)
            for video in film(report, chosen, **config.env.simulation):
                outcome = "success" if video.episode.success else "failure"
                run_logger.log_video(f"val/{outcome}", video.frames, env_steps=env_steps)
        figures = {f"val/{name}": value for name, value in report.figures().items()}
        by_task = {f"val/success_task_{task}": result.success.rate for task, result in report.tasks.items()}
        return {**figures, "val/mean_reward": config.env.reward_scale * report.total.rate, **by_task}

    return validate
