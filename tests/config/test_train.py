"""The configuration: the documented defaults, and an explanation for every value that cannot be used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchrl_vla.config import EnvironmentConfig, OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.config.presets import PRESETS, choose_preset

DOCUMENTED_PPO = dict(
    total_timesteps=100_000, n_steps=100, batch_size=1, n_epochs=10, actor_lr=1e-5, critic_lr=3e-4,
    clip_ratio_high=0.28,
    clip_ratio_low=0.2, gamma=0.99, gae_lambda=0.95, verifier_gamma=1.0, entropy_coef=0.01, value_loss_coef=0.5,
    max_grad_norm=0.5, rollout_temperature=1.6, eval_temperature=0.0, kl_coef=0.0, traj_split_num=4,
    traj_mini_batch_size=8, separate_rollout_training=False, val_interval=1000, val_episodes=10, use_wandb=False,
    wandb_entity=None, log_interval=1000, save_interval=10_000,
)  # fmt: skip
DOCUMENTED_ENV = dict(
    task_suite="libero_spatial", task_ids=None, task_id=0, num_envs=1, obs_mode="image_state", image_size=(224, 224)
)
DOCUMENTED_ACTOR = dict(
    pretrained_checkpoint="openvla-7b-oft-finetuned-libero-spatial", use_local=True, use_multi_gpu=False, gpu_id=0,
    secondary_gpu_id=1, freeze_vla_backbone=False, use_lora=True, lora_rank=32, lora_alpha=16, lora_dropout=0.0,
    lora_target_modules="all-linear", load_in_4bit=False, use_proprio=True, proprio_dim=8, num_images_in_input=1,
    load_l1_action_head=False, freeze_l1_action_head=True, use_tokenized_actions=True, use_l1_regression=True,
    finetuned_on_discrete_actions=False, deterministic_eval=True, use_flash_attention=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "documented"),
    [(PPOConfig(), DOCUMENTED_PPO), (EnvironmentConfig(), DOCUMENTED_ENV), (OpenVLAActorConfig(), DOCUMENTED_ACTOR)],
    ids=["ppo", "env", "actor"],
)
def test_defaults_are_the_documented_ones(config, documented):
    values = dataclasses.asdict(config)
    assert {name: values[name] for name in documented} == documented


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (PPOConfig, {"n_steps": 0}, "n_steps must be positive, got 0"),
        (PPOConfig, {"batch_size": -1}, "batch_size must be positive, got -1"),
        (PPOConfig, {"group_size": 1}, "group_size must be at least 2 .* got 1"),
        (PPOConfig, {"keep_low": 0.9, "keep_high": 0.1}, "keep_low .0.9. must not exceed keep_high"),
        (PPOConfig, {"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        (PPOConfig, {"clip_ratio_low": 1.0}, "clip_ratio_low must be below 1"),
        (PPOConfig, {"dual_clip": 1.1}, "dual_clip must exceed"),
        (PPOConfig, {"rollout_temperature": 0.0}, "rollout_temperature must be positive"),
        (PPOConfig, {"separate_rollout_training": True}, "not available"),
        (PPOConfig, {"device": "cuda:0", "training_device": "cuda:1"}, "training_device .'cuda:1'. must equal device"),
        (EnvironmentConfig, {"task_ids": [1, 1]}, r"task_ids has duplicates: \[1, 1\]"),
        (EnvironmentConfig, {"task_ids": []}, "task_ids is empty"),
        (EnvironmentConfig, {"task_id": -1}, "task_id must not be negative, got -1"),
        (EnvironmentConfig, {"num_envs": 0}, "num_envs must be positive, got 0"),
        (EnvironmentConfig, {"image_size": (224, 200)}, "image_size must be square"),
        (OpenVLAActorConfig, {"num_images_in_input": 3}, "num_images_in_input must be 1"),
        (OpenVLAActorConfig, {"use_tokenized_actions": False}, "no way to act"),
        (OpenVLAActorConfig, {"use_multi_gpu": True, "secondary_gpu_id": 0}, "two different GPUs"),
        (OpenVLAActorConfig, {"lora_rank": 0}, "lora_rank must be positive"),
        (TrainConfig, {"resume": True}, "resume needs run_dir"),
    ],
)
def test_bad_values_are_named(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_a_group_of_one_is_fine_with_gae():
    assert PPOConfig(group_size=1, advantage_estimator="gae").group_size == 1


def test_ppo_refuses_a_policy_without_token_probabilities():
    actor = OpenVLAActorConfig(use_tokenized_actions=False, load_l1_action_head=True)
    with pytest.raises(ValueError, match="PPO needs use_tokenized_actions=True"):
        actor.require_tokens_for_ppo()


def test_saved_configuration_reads_back_the_same(tmp_path: Path):
    config = TrainConfig(ppo=PPOConfig(seed=3), env=EnvironmentConfig(task_ids=[2, 0]), run_dir=tmp_path / "run")
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_a_configuration_of_another_version_is_refused(tmp_path: Path):
    path = tmp_path / "config.json"
    TrainConfig().save(path)
    path.write_text(path.read_text().replace('"n_steps"', '"n_stepz"'))
    with pytest.raises(ValueError, match="n_stepz"):
        TrainConfig.load(path)


def test_presets():
    assert all(isinstance(make(), TrainConfig) for make in PRESETS.values())
    assert choose_preset("24gb") == "24gb"
    with pytest.raises(ValueError, match="No preset 'huge': choose auto, tiny, 24gb, 80gb"):
        choose_preset("huge")


@pytest.mark.parametrize(
    ("gibibytes", "preset"), [(None, "tiny"), (15.6, "tiny"), (21.9, "24gb"), (23.5, "24gb"), (79.2, "80gb")]
)
def test_the_preset_is_chosen_by_the_memory_of_the_gpu(
    gibibytes: float | None, preset: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gibibytes is not None)
    card = SimpleNamespace(total_memory=int((gibibytes or 0) * 2**30))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: card)
    assert choose_preset() == preset


def test_the_24gb_preset_leaves_room_on_its_card():
    memory = PRESETS["24gb"]().ppo.memory_gb
    assert memory is not None and memory < 23.5, "what such cards have for programs"
