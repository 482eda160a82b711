"""The ways of acting: by tokens, by the L1 head, and with both there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import set_exploration_type
from torchrl.envs.utils import ExplorationType

from torchrl_vla.checkpoints.architecture_file import read_architecture
from torchrl_vla.checkpoints.locations import BUNDLED, find_policy
from torchrl_vla.checkpoints.policy import Policy, load_policy, policy_mode, save_policy
from torchrl_vla.checkpoints.trainable import weights_dtype
from torchrl_vla.config import OpenVLAActorConfig
from torchrl_vla.modules import (
    OpenVLAActor,
    OpenVLAAutoregressiveActor,
    OpenVLAConfig,
    OpenVLAL1Actor,
    ValueHead,
    make_l1_actor,
)
from torchrl_vla.training.devices import choose_head_device

DATA = Path(__file__).parents[1] / "data"
INSTRUCTION = "pick up the black bowl"


@pytest.fixture(scope="module")
def release(copy_release: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's tiny checkpoint with L1 head and proprio projector."""
    return copy_release(tmp_path_factory.mktemp("release") / "openvla")


def load(
    release: Path,
    *,
    trainable: bool = False,
    autoregressive: bool = False,
    head_device: torch.device | None = None,
    proprio_format: Literal["axis_angle", "quaternion"] | None = None,
    **options: object,
) -> Policy:
    actor = OpenVLAActorConfig(str(release), **options)  # type: ignore[arg-type]
    return load_policy(
        actor,
        task_suite="libero_spatial",
        trainable=trainable,
        autoregressive=autoregressive,
        head_device=head_device,
        proprio_format=proprio_format,
    )


def observation() -> TensorDict:
    torch.manual_seed(0)
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    inner = TensorDict(image=image, state=torch.rand(2, 8), batch_size=[2])
    return TensorDict(observation=inner, language_instruction=[INSTRUCTION] * 2, batch_size=[2])


def act(policy: Policy) -> TensorDict:
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        return policy.actor(observation())


def test_tokens_is_the_default_and_leaves_the_l1_head_out(release: Path) -> None:
    policy = load(release)
    assert isinstance(policy.actor, OpenVLAActor) and policy.model.action_head is None
    decision = act(policy)
    assert decision["action"].shape == decision["vla_action", "tokens"].shape == (2, 8, 7)
    assert ("vla_action", "log_probs") in decision.keys(True)


def test_l1_acts_by_the_head_without_probabilities(release: Path) -> None:
    policy = load(release, load_l1_action_head=True, use_tokenized_actions=False)
    assert isinstance(policy.actor, OpenVLAL1Actor)
    decision = act(policy)
    assert decision["action"].shape == (2, 8, 7) and "vla_action" not in decision.keys()
    assert (decision["action"][..., -1].abs() == 1).all()  # the gripper opens or closes
    # By hand: the head on the hidden states, un-normalised, the gripper turned to the env's sense.
    inputs = policy.processor(
        observation()["observation", "image"], [INSTRUCTION] * 2, observation()["observation", "state"]
    )
    with torch.no_grad():
        normalized = policy.model.predict_l1(policy.model(*inputs).hidden_states)
    raw = policy.processor.action_tokenizer.unnormalize(normalized)
    torch.testing.assert_close(decision["action"][..., :6], raw[..., :6].clamp(-1, 1), atol=1e-6, rtol=0)
    assert torch.equal(decision["action"][..., 6] > 0, raw[..., 6] < 0.5)
    with pytest.raises(ValueError, match="has no L1 head to act by"):
        make_l1_actor(load(release).model, policy.processor)


def test_hybrid_acts_by_tokens_and_keeps_the_head_out_of_training(
    release: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for options in ({"use_lora": True, "lora_rank": 2}, {"use_lora": False}, {"freeze_vla_backbone": True}):
        caplog.clear()
        policy = load(
            release, trainable=True, force=True, load_l1_action_head=True, freeze_l1_action_head=False, **options
        )
        assert isinstance(policy.actor, OpenVLAActor)
        assert policy.model.action_head is not None
        assert not any(p.requires_grad for p in policy.model.action_head.parameters())
        assert "The L1 head is loaded for comparison" in caplog.text
        other = make_l1_actor(policy.model, policy.processor)
        assert other(observation())["action"].shape == act(policy)["action"].shape


def test_an_l1_checkpoint_is_refused_for_training_alone(release: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="action-token logits were never trained.*Openvla-oft-SFT.*--force"):
        load(release, trainable=True)
    for allowed in ({"force": True}, {"finetuned_on_discrete_actions": True}):
        assert load(release, trainable=True, lora_rank=2, **allowed).model.config.trained_for == "tokens"
    names = [policy_mode(name).name for name in (str(release), "random:tiny", "bundled:tiny")]
    assert names == ["l1", "tokens", "tokens"]


@pytest.mark.parametrize(
    ("device", "options", "weights"),
    [
        ("cuda", dict(), torch.bfloat16),
        ("cuda", dict(trainable=True, use_lora=True), torch.bfloat16),
        ("cuda", dict(trainable=True, freeze_vla_backbone=True), torch.bfloat16),
        ("cuda", dict(trainable=True), torch.float32),
        ("cpu", dict(trainable=True, use_lora=True), torch.float32),
    ],
)
def test_weights_that_learn_are_float32_and_others_as_stored(
    device: str, options: dict[str, bool], weights: torch.dtype
) -> None:
    assert weights_dtype(OpenVLAConfig.seven_b(), torch.device(device), **options) == weights


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"use_lora": False}, torch.float32),
        ({"use_lora": True}, torch.bfloat16),
    ],
)
def test_what_learns_is_float32(options: dict[str, bool], weights: torch.dtype) -> None:
    """As on a GPU, where weights are bfloat16 otherwise: it would round an optimizer's steps away."""
    policy = load_policy(
        OpenVLAActorConfig("random:7b", **options), task_suite="libero_spatial", device="meta", trainable=True
    )
    assert policy.model.dtype == weights
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}


def test_what_does_not_fit_is_said_before_weights_are_read(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("torchrl_vla.checkpoints.policy.load_openvla", unexpected)
    with pytest.raises(ValueError, match="No statistics for 'mars'.*it has: libero_spatial_no_noops"):
        load(release, unnorm_key="mars")
    with pytest.raises(ValueError, match="use_proprio is off"):
        load(release, use_proprio=False)
    with pytest.raises(ValueError, match="never trained"):
        load(release, trainable=True)
    with pytest.raises(ValueError, match="No tokenizer can be loaded"):
        load(DATA / "openvla" / "checkpoint")


@pytest.fixture(scope="module")
def base(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as base OpenVLA, without heads."""
    folder = Path(shutil.copytree(release, tmp_path_factory.mktemp("release") / "base"))
    for head in folder.glob("*.pt"):
        head.unlink()
    return folder


def test_base_openvla_is_warned_of(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        policy = load(base, trainable=True, lora_rank=2)
    assert "is taken for base OpenVLA" in caplog.text and "one after the other" in caplog.text
    assert isinstance(policy.actor, OpenVLAActor) and policy.model.config.chunk_size == 8


def test_base_openvla_acts_one_token_after_the_other(base: Path, release: Path) -> None:
    assert policy_mode(str(base)).name == "autoregressive"
    policy = load(base, autoregressive=True)
    assert isinstance(policy.actor, OpenVLAAutoregressiveActor) and policy.model.config.chunk_size == 1
    decision = act(policy)
    assert decision["action"].shape == (2, 7)
    inputs = policy.processor(observation()["observation", "image"], [INSTRUCTION] * 2)
    ids = policy.model.generate_autoregressive(inputs.pixel_values, inputs.input_ids)
    # Its random weights choose words too, which upstream takes for the nearest action token.
    found = policy.processor.action_tokenizer.bins_to_ids(decision["vla_action", "tokens"])[:, 0]
    assert torch.equal(found, ids.clamp(31744, 31999)) and len(found.unique()) > 7
    # Decoded in parallel these tokens would be others.
    assert not torch.equal(act(load(base))["vla_action", "tokens"][:, :1], decision["vla_action", "tokens"])
    with pytest.raises(ValueError, match="load the policy with trainable=False"):
        load(base, autoregressive=True, trainable=True)
    with pytest.raises(ValueError, match="reads the robot's state, as OpenVLA-OFT does"):
        load(release, autoregressive=True)


def test_heads_sit_on_a_device_of_their_own(release: Path) -> None:
    """The second device gets the head alone, and what it gives comes back to the policy's."""
    policy = load(release, load_l1_action_head=True, head_device=torch.device("meta"))
    where = {name.split(".")[0]: p.device.type for name, p in policy.model.named_parameters()}
    assert where.pop("action_head") == "meta" and set(where.values()) == {"cpu"}
    width = policy.model.config.hidden_size
    assert policy.model.action_head is not None
    heads = (
        (policy.model.action_head, torch.zeros(1, 56, width)),
        (ValueHead(width).to("meta"), torch.zeros(1, width)),
    )
    for head, hidden in heads:
        # The meta device takes the input, and is the one that cannot give the output back.
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            head(hidden)


def test_a_missing_second_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="secondary_gpu_id=1, but this machine has 1 GPU: leave use_multi_gpu out"):
        choose_head_device(torch.device("cuda:0"), use_multi_gpu=True, secondary_gpu_id=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_head_device(torch.device("cuda:0"), use_multi_gpu=True, secondary_gpu_id=1) == torch.device("cuda:1")
    for device in ("cuda:1", "cpu"):
        with pytest.raises(
            ValueError, match=f"on another GPU than the heads .secondary_gpu_id=1., but it is on {device}"
        ):
            choose_head_device(torch.device(device), use_multi_gpu=True, secondary_gpu_id=1)
    assert choose_head_device(torch.device("cpu"), use_multi_gpu=False, secondary_gpu_id=7) == torch.device("cpu")


def test_adapters_drop_nothing_out_while_ppo_acts_and_learns(caplog: pytest.LogCaptureFixture) -> None:
    actor = OpenVLAActorConfig(BUNDLED, lora_rank=2, lora_dropout=0.5)
    policy = load_policy(actor, task_suite="libero_spatial")
    assert any(isinstance(module, torch.nn.Dropout) for module in policy.model.modules())
    assert not any(module.training for module in policy.actor.modules())
    assert "lora_dropout=0.5 is for `torchrl-vla finetune`" in caplog.text


def test_random_policies_honour_what_they_can_and_refuse_the_rest() -> None:
    deaf = OpenVLAActorConfig("random:tiny", use_proprio=False, use_lora=False)
    assert load_policy(deaf, task_suite="libero_spatial").model.proprio_projector is None
    with pytest.raises(ValueError, match="load_in_4bit reads a checkpoint in 4 bits, and random:7b has none"):
        load_policy(OpenVLAActorConfig("random:7b", load_in_4bit=True), task_suite="libero_spatial", device="meta")


def test_modes_that_cannot_act_or_learn_are_refused(release: Path) -> None:
    assert asdict(OpenVLAActorConfig())["load_l1_action_head"] is False
    with pytest.raises(ValueError, match="leave no way to act"):
        OpenVLAActorConfig(use_tokenized_actions=False)
    with pytest.raises(ValueError, match="PPO needs use_tokenized_actions=True"):
        OpenVLAActorConfig(use_tokenized_actions=False, load_l1_action_head=True).require_tokens_for_ppo()


@pytest.mark.parametrize(
    ("content", "message"), [('{"wings": 1}', "processor.json has wings; it may have backend"), ("{", "not valid JSON")]
)
def test_damaged_image_settings_are_told(base: Path, tmp_path: Path, content: str, message: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "processor.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(folder)


def noted(release: Path, folder: Path, **values: object) -> Path:
    """A copy in whose config.json this package has noted something."""
    copy = shutil.copytree(release, folder)
    config = json.loads((copy / "config.json").read_text())
    config["torchrl_vla"] = {**config.get("torchrl_vla", {}), **values}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_what_does_not_fit_the_checkpoint_is_refused(release: Path, tmp_path: Path) -> None:
    two_cameras = noted(release, tmp_path / "two", num_images=2)
    with pytest.raises(ValueError, match="num_images_in_input is 1.*with 2 cameras: use --num-images-in-input 2"):
        load(two_cameras)
    for checkpoint in (str(two_cameras), "random:tiny"):
        policy = load(Path(checkpoint), num_images_in_input=2)
        assert policy.model.config.num_images == len(policy.actor.backbone.image_keys) == 2
    quaternions = noted(release, tmp_path / "quaternions", proprio_format="quaternion")
    with pytest.raises(ValueError, match="is axis_angle.*with quaternion: use --proprio-format quaternion"):
        load(quaternions, proprio_format="axis_angle")
    with pytest.raises(ValueError, match="proprio_format must be 'axis_angle' or 'quaternion'.* got 'euler'"):
        load(noted(release, tmp_path / "euler", proprio_format="euler"))
    with pytest.raises(ValueError, match="proprio_dim is 5.*states of 8 numbers: use --proprio-dim 8"):
        load(release, proprio_dim=5)
    blind = shutil.copytree(release, tmp_path / "blind", ignore=shutil.ignore_patterns("proprio_projector*"))
    with pytest.raises(ValueError, match="freeze_vla_backbone leaves nothing that PPO could train"):
        load(blind, trainable=True, force=True, freeze_vla_backbone=True)


def test_the_format_of_the_state_is_noted_with_the_policy(release: Path, tmp_path: Path) -> None:
    """That of the environment it is loaded for, where it reads the state; and what a folder notes is kept."""
    for checkpoint in (release, Path("random:tiny")):
        save_policy(load(checkpoint, proprio_format="quaternion"), tmp_path / "saved")
        assert read_architecture(tmp_path / "saved").proprio_format == "quaternion"
        save_policy(load(tmp_path / "saved"), tmp_path / "again")
        assert read_architecture(tmp_path / "again").proprio_format == "quaternion"
    assert load(Path("random:tiny"), proprio_format="quaternion", use_proprio=False).model.config.proprio_format is None


def test_a_derived_suite_takes_the_statistics_of_its_base(release: Path) -> None:
    actor = OpenVLAActorConfig(str(release))
    assert load_policy(actor, task_suite="libero_spatial_swap", trainable=False).statistics_key == "libero_spatial"
    with pytest.raises(ValueError, match="No statistics for 'libero_goal'.*--unnorm-key"):
        load_policy(actor, task_suite="libero_goal_swap", trainable=False)


def test_a_run_without_a_policy_names_the_command_that_writes_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=f"`torchrl-vla export {tmp_path} OUT`"):
        find_policy(str(tmp_path))
