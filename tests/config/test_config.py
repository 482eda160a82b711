"""The configuration: the documented defaults, and an explanation for every value that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchrl_vla.commands.demos import DemosArguments
from torchrl_vla.config import (
    EnvironmentConfig,
    EvaluateConfig,
    FinetuneConfig,
    OpenVLAActorConfig,
    PPOConfig,
    TrainConfig,
)
from torchrl_vla.config.ids import parse_ids
from torchrl_vla.config.presets import PRESETS, choose_preset

DOCUMENTED_PPO = dict(
    total_timesteps=100_000, n_steps=100, batch_size=1, n_epochs=10, actor_lr=1e-5, critic_lr=3e-4,
    clip_ratio_high=0.28,
    clip_ratio_low=0.2, gamma=0.99, gae_lambda=0.95, verifier_gamma=1.0, entropy_coef=0.01, value_loss_coef=0.5,
    max_grad_norm=0.5, rollout_temperature=1.6, eval_temperature=0.0, kl_coef=0.0, traj_split_num=4,
    traj_mini_batch_size=8, separate_rollout_training=False, val_interval=1000, val_episodes=10, use_wandb=False,
    wandb_entity=None, log_interval=1000, save_interval=10_000, task_suite="libero_spatial", task_ids=None, task_id=0,
    num_envs=1, obs_mode="image_state",
    image_size=None,  # the checkpoint's: (224, 224) where it is OpenVLA 7B
    device="auto", training_device="auto",  # documented as cuda:1, of the machine that the guide was written on
)  # fmt: skip
DOCUMENTED_ACTOR = dict(
    pretrained_checkpoint="openvla-7b-oft-finetuned-libero-spatial", use_local=True, use_multi_gpu=False, gpu_id=0,
    secondary_gpu_id=1, freeze_vla_backbone=False, use_lora=True, lora_rank=32, lora_alpha=16, lora_dropout=0.0,
    lora_target_modules="all-linear", load_in_4bit=False, use_proprio=True, proprio_dim=8, num_images_in_input=1,
    load_l1_action_head=False, freeze_l1_action_head=True, use_tokenized_actions=True, use_l1_regression=True,
    finetuned_on_discrete_actions=False, deterministic_eval=True, use_flash_attention=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "documented", "count"),
    [(PPOConfig(), DOCUMENTED_PPO, 34), (OpenVLAActorConfig(), DOCUMENTED_ACTOR, 22)],
    ids=["ppo", "actor"],
)
def test_all_56_documented_parameters_are_there_with_their_defaults(config, documented, count):
    assert len(documented) == count
    values = dataclasses.asdict(config)
    assert {name: values[name] for name in documented} == documented


def test_the_documented_examples_work_as_written():
    assert PPOConfig(task_id=0, num_envs=1).tasks == [0]
    assert PPOConfig(task_ids=[0, 1, 2, 3], num_envs=4).tasks == [0, 1, 2, 3]


def test_names_without_effect_say_so_when_set():
    for make, name in (
        (lambda: OpenVLAActorConfig(use_l1_regression=False), "use_l1_regression"),
        (lambda: OpenVLAActorConfig(freeze_l1_action_head=False), "freeze_l1_action_head"),
        (lambda: PPOConfig(gae_lambda=0.9), "gae_lambda"),
        (lambda: PPOConfig(keep_low=0.1, advantage_estimator="gae"), "keep_low"),
    ):
        with pytest.warns(UserWarning, match=f"{name}=.* has no effect"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenVLAActorConfig(), PPOConfig(), PPOConfig(gae_lambda=0.9, advantage_estimator="gae")


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
        (EnvironmentConfig, {"image_size": (224,)}, r"image_size must be 2 whole numbers or None, got \(224,\)"),
        (PPOConfig, {"obs_mode": "rgb"}, "obs_mode must be image_state, got 'rgb'"),
        (PPOConfig, {"ratio_level": "step"}, "ratio_level must be one of token, action, chunk, got 'step'"),
        (PPOConfig, {"n_steps": 1.5}, "n_steps must be a whole number, got 1.5"),
        (PPOConfig, {"num_envs": 10**30}, "num_envs must be at most 4096, got 10*.$"),
        (PPOConfig, {"val_episodes": 2**31}, "val_episodes must be at most 100000, got 2147483648"),
        (PPOConfig, {"seed": -1}, r"seed must lie in 0..4294967295, got -1"),
        (PPOConfig, {"seed": 2**32}, r"seed must lie in 0..4294967295"),
        (PPOConfig, {"rollout_temperature": 1e-320}, "rollout_temperature must be 0 .greedy. or at least 0.001"),
        (PPOConfig, {"kl_coef": 1e308}, "kl_coef must be at most 3.4e.38"),
        (OpenVLAActorConfig, {"num_images_in_input": 3}, "num_images_in_input must be 1"),
        (OpenVLAActorConfig, {"use_tokenized_actions": False}, "no way to act"),
        (OpenVLAActorConfig, {"use_multi_gpu": True, "secondary_gpu_id": 0}, "two different GPUs"),
        (OpenVLAActorConfig, {"lora_rank": 0}, "lora_rank must be positive"),
        (TrainConfig, {"resume": True}, "resume needs run_dir"),
        (TrainConfig, {"allow_changed": ["actor_lr"]}, "allow_changed is for a run that is resumed"),
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
    config = TrainConfig(ppo=PPOConfig(seed=3, task_ids=[2, 0], image_size=(126, 126)), run_dir=tmp_path / "run")
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config


def test_a_configuration_of_another_version_is_refused(tmp_path: Path):
    path = tmp_path / "config.json"
    TrainConfig().save(path)
    path.write_text(path.read_text().replace('"n_steps"', '"n_stepz"'))
    with pytest.raises(ValueError, match="n_stepz"):
        TrainConfig.load(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\udcff"])
def test_a_file_that_is_no_configuration_is_named(content: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=str(path)):
        TrainConfig.load(path)


def test_a_run_of_0_1_0_is_read_with_its_own_values(tmp_path: Path):
    """What that version wrote has the environment apart, and other names."""
    now = dataclasses.asdict(TrainConfig())
    env = {name: now["ppo"].pop(name) for name in [field.name for field in dataclasses.fields(EnvironmentConfig)]}
    for name in ("aggregation", "bootstrap_at_horizon", "lr_schedule"):
        del now["ppo"][name]
    now["ppo"] |= {"recompute": 0.5, "keep_low": 0.1, "keep_high": 0.9}
    del now["ppo"]["gradient_checkpointing"]
    old = {"ppo": now["ppo"], "env": env | {"num_envs": 4, "image_size": [126, 126]}, "actor": now["actor"],
           "run_dir": "runs/a", "resume": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig(
        PPOConfig(num_envs=4, image_size=(126, 126), gradient_checkpointing=0.5, keep_low=0.1, keep_high=0.9),
        run_dir=Path("runs/a"),
    )


def test_a_fine_tuning_of_0_1_0_is_read_with_its_own_values(tmp_path: Path):
    old = {"dataset": "demos", "out": "runs/tiny", "checkpoint": "random:tiny", "steps": 900, "batch_size": 64,
           "micro_batch_size": 16, "gradient_checkpointing": True, "learning_rate": 1e-4, "warmup_steps": 20,
           "resume": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert FinetuneConfig.load(tmp_path / "config.json") == FinetuneConfig(
        (Path("demos"),), Path("runs/tiny"), "random:tiny", steps=900, mini_batch_size=64, batch_size=16,
        gradient_checkpointing=1.0, actor_lr=1e-4, lr_warmup_steps=20,
    )  # fmt: skip


CLASSES: list[tuple[type, dict[str, Any]]] = [
    (PPOConfig, {}),
    (OpenVLAActorConfig, {}),
    (FinetuneConfig, {"dataset": ["demos"], "run_dir": "runs/a"}),
    (EvaluateConfig, {"pretrained_checkpoint": "bundled:tiny"}),
    (DemosArguments, {"out": "demos"}),
]


@pytest.mark.parametrize(
    ("cls", "others", "name"),
    [
        pytest.param(cls, others, field.name, id=f"{cls.__name__}-{field.name}")
        for cls, others in CLASSES
        for field in dataclasses.fields(cls)
        if re.search(r"\bfloat\b", str(field.type))
    ],
)
def test_numbers_that_are_not_finite_are_refused(cls: type, others: dict[str, Any], name: str):
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match=f"^{name} must be a finite number, got {value}"):
            cls(**others, **{name: value})


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("0 1 2", [0, 1, 2]), ("0-3", [0, 1, 2, 3]), ("0..3,7", [0, 1, 2, 3, 7]), ("9", [9]), ("0-1 5", [0, 1, 5]),
        ("None", None), ("", []),
    ],
)  # fmt: skip
def test_lists_of_ids(words: str, ids: list[int] | None):
    assert parse_ids(words.split()) == ids


@pytest.mark.parametrize("words", [["a"], ["3-1"], ["0-"], ["1.5"], ["-3-4"], ["0-999999999999"], [""], ["1" * 50]])
def test_bad_lists_of_ids_are_explained(words: list[str]):
    with pytest.raises(ValueError, match="expected numbers or ranges such as|numbers go up to 1000000"):
        parse_ids(words)


def test_presets():
    assert all(make().preset == name and make().ppo.entropy_coef == 0 for name, make in PRESETS.items())
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
