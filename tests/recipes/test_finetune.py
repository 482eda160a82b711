"""Supervised fine-tuning, end to end on a small network and demonstrations of two kinds of frames."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_openvla import small_openvla_config
from tensordict import TensorDict
from torch import nn

from torchrl_vla.checkpoints.architecture_file import read_architecture
from torchrl_vla.checkpoints.openvla_format import load_openvla, save_openvla
from torchrl_vla.checkpoints.policy import load_policy
from torchrl_vla.commands.finetune import main
from torchrl_vla.config import FinetuneConfig, OpenVLAActorConfig
from torchrl_vla.datasets import DemonstrationDataset, DemonstrationIndex, DemonstrationMixture, Episode, write_episode
from torchrl_vla.modules import ActionTokenizer, OpenVLA, build_tokenizer
from torchrl_vla.modules.openvla.augmentation import ImageAugmentation
from torchrl_vla.modules.openvla.image_pipeline import center_crop_resize, lanczos3_resize, normalize
from torchrl_vla.modules.openvla.jpeg import decode_jpeg, encode_jpeg
from torchrl_vla.recipes.finetune import Finetuner, finetune
from torchrl_vla.training.ema import ParameterAverage
from torchrl_vla.training.finetune_data import InputBuilder, load_samples
from torchrl_vla.training.finetune_policy import load_student
from torchrl_vla.training.optimizer_step import TrainingDiverged
from torchrl_vla.training.run_lock import lock_run
from torchrl_vla.training.stopping import Stopped

pytestmark = pytest.mark.slow

SUITE = "libero_spatial"
INSTRUCTIONS = {0: "push left", 3: "push the bowl right"}  # prompts of two lengths


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost more than these products do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: dark frames and moves to one side, bright frames and moves to the other."""
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(
    folder: Path, suite: str = SUITE, instructions: dict[int, str] = INSTRUCTIONS, scale: float = 1.0
) -> Path:
    """Demonstrations of two tasks, actions as large as `scale`."""
    index = DemonstrationIndex(suite, instructions)
    generator = torch.Generator().manual_seed(0)
    for task_id, instruction in instructions.items():
        for number in range(3):
            steps = 6
            action = torch.full((steps, 7), 0.5 if task_id else -0.5)
            action[:, 1] = torch.rand(steps, generator=generator)  # cannot be told from the frames
            action[:, :6] *= scale
            action[:, 6] = action[:, 6].sign()
            frames = torch.randint(0, 60, (steps, 32, 32, 3), generator=generator, dtype=torch.uint8)
            images = {"image": [encode_jpeg(frame) for frame in (frames + (180 if task_id else 10)).numpy()]}
            state = torch.rand(steps, 8, generator=generator)
            name = index.episode_name(task_id, number)
            write_episode(
                folder / "episodes" / name, Episode(state, action, action, images, task_id, 0, instruction, 0)
            )
            index.outcomes[name] = "success"
    index.save(folder)
    DemonstrationDataset(folder).update_statistics()
    return folder


def save_start(folder: Path, *, l1_head: bool = False, **overrides) -> Path:
    """A small untrained policy's folder."""
    config = small_openvla_config(embed_dim=16, vocab_size=352, **overrides)
    torch.manual_seed(0)
    save_openvla(OpenVLA(config, use_l1_head=l1_head), folder)
    build_tokenizer(INSTRUCTIONS.values(), vocab_size=config.tokenizer_vocab_size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def config(data: Path, start: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        (data,),
        tmp_path / "run",
        pretrained_checkpoint=str(start),
        steps=60,
        lr_warmup_steps=5,
        mini_batch_size=16,
        actor_lr=3e-3,
        log_interval=10,
        val_interval=30,
        save_interval=30,
        device="cpu",
    )


def rows(config: FinetuneConfig) -> list[dict[str, float]]:
    with (config.run_dir / "metrics.csv").open() as stream:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]


def decide(folder: Path, episode: TensorDict, suite: str = SUITE) -> torch.Tensor:
    """What a policy's folder says, greedily, to an episode's observations: [T, K, 7]."""
    policy = load_policy(OpenVLAActorConfig(str(folder)), task_suite=suite, temperature=0.0, trainable=False)
    observation = TensorDict({"image": decode(episode), "state": episode["state"].clone()}, [len(episode["state"])])
    batch = TensorDict({"observation": observation}, observation.batch_size)
    batch["language_instruction"] = episode["instruction"]
    with torch.no_grad():
        return policy.actor(batch)["action"]


def decode(episode: TensorDict) -> torch.Tensor:
    """Frames uint8 [T, 3, H, W]."""
    blob, offsets = episode["images", "image", "jpeg"].numpy(), episode["images", "image", "offsets"].tolist()
    frames = [decode_jpeg(blob[a:b]) for a, b in pairwise(offsets)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, torch.float32),
        ({"use_lora": True}, torch.bfloat16),
        ({"freeze_vla_backbone": True, "objective": "l1"}, torch.bfloat16),
    ],
)
def test_what_learns_is_float32_on_any_device(
    config: FinetuneConfig, data: Path, options: dict[str, Any], weights: torch.dtype
):
    """As on a GPU, where a 7B model's frozen weights stay as they are stored."""
    config = replace(config, pretrained_checkpoint="random:7b", **options)
    policy = load_student(config, DemonstrationMixture([data]), torch.device("meta"))
    assert policy.model.dtype == weights
    assert {p.dtype for p in policy.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_policy_learns_to_imitate(config: FinetuneConfig, data: Path):
    folder = finetune(replace(config, actor_lr=5e-3, steps=120))
    first, last = rows(config)[0], rows(config)[-1]
    assert last["train/loss"] < 0.5 * first["train/loss"]
    assert last["val/accuracy"] > 0.75 and last["val/l1"] < 0.25
    assert last["update"] == 120 and "val/accuracy" not in first
    for name in ("000002", "030002"):  # held out
        episode = DemonstrationDataset(data).episodes[name]
        wrong = (decide(folder, episode) - episode["action"][0]).abs()[..., [0, 2, 3, 4, 5, 6]] > 0.01
        assert wrong.float().mean() < 0.15


def test_one_policy_learns_two_suites_each_in_its_own_units(config: FinetuneConfig, data: Path, tmp_path: Path):
    """Task 0 of one suite is not task 0 of the other, and a tenth of an action is the whole of it there."""
    gentle = {0: "push the bowl right", 1: "push left"}
    other = make_data(tmp_path / "other", "libero_goal", gentle, scale=0.1)
    folder = finetune(replace(config, dataset=(data, other), actor_lr=5e-3, steps=150))
    assert read_architecture(folder).dataset_statistics == DemonstrationMixture([data, other]).statistics
    for suite, path, names in ((SUITE, data, ("000002", "030002")), ("libero_goal", other, ("000002", "010002"))):
        for name in names:  # held out
            episode = DemonstrationDataset(path).episodes[name]
            expected = episode["action"][0]
            wrong = (decide(folder, episode, suite) - expected).abs() > 0.02 * expected.abs()
            assert wrong[..., [0, 2, 3, 4, 5, 6]].float().mean() < 0.15


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero_by_a_cosine(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
):
    used: list[list[float]] = []
    optimizer_step = Finetuner._optimizer_step

    def noted(self: Finetuner) -> dict[str, torch.Tensor]:
        figures = optimizer_step(self)
        used.append([group["lr"] for group in self.optimizer.param_groups])
        return figures

    monkeypatch.setattr(Finetuner, "_optimizer_step", noted)
    finetune(replace(config, steps=9, lr_warmup_steps=3, actor_lr=3e-3, log_interval=1))
    logged = [row["train/learning_rate"] for row in rows(config)]
    # What is logged is the rate of the step that follows: of warm-up's second, the peak, a third of the cosine, none.
    assert [logged[step - 1] for step in (1, 3, 5, 9)] == pytest.approx([2e-3, 3e-3, 2.25e-3, 0.0])
    np.testing.assert_allclose(used, [[rate, rate] for rate in (1e-3, *logged[:-1])])


def test_the_saved_weights_are_the_averages(config: FinetuneConfig, start: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Finetuner] = []

    def make(*given: Any) -> Finetuner:
        made.append(Finetuner(*given))
        return made[0]

    monkeypatch.setattr("torchrl_vla.recipes.finetune.Finetuner", make)
    saved = load_openvla(finetune(replace(config, steps=6, lr_warmup_steps=1)), dtype=torch.float32)
    (trainer,) = made
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for name, average in zip(trained, trainer.average.average, strict=True):
        assert torch.equal(saved.get_parameter(name).bfloat16(), average.bfloat16()), name
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    for other in (trained[name], load_openvla(start).get_parameter(name)):
        assert not torch.equal(saved.get_parameter(name).bfloat16(), other.bfloat16())


def test_the_policy_folder_is_complete(config: FinetuneConfig, data: Path):
    folder = finetune(replace(config, steps=2, lr_warmup_steps=1))
    loaded = read_architecture(folder)
    assert (loaded.torch_dtype, loaded.image_size, loaded.use_proprio) == ("bfloat16", 28, True)
    assert loaded.proprio_format == "axis_angle"
    assert loaded.dataset_statistics[SUITE] == DemonstrationDataset(data).statistics
    expected = DemonstrationDataset(data).statistics["action"]["q01"]
    assert ActionTokenizer(loaded.statistics[SUITE]).action_q01.tolist() == expected
    with pytest.raises(ValueError, match="exists already"):
        finetune(config)


def test_a_resumed_run_equals_an_uninterrupted_one(config: FinetuneConfig, tmp_path: Path, monkeypatch):
    whole = finetune(replace(config, run_dir=tmp_path / "whole", steps=6, lr_warmup_steps=2, save_interval=3))
    optimizer_step = Finetuner._optimizer_step

    def interrupted(self):
        if self.step == 4:
            raise KeyboardInterrupt
        return optimizer_step(self)

    part = replace(config, run_dir=tmp_path / "part", steps=6, lr_warmup_steps=2, save_interval=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Finetuner, "_optimizer_step", interrupted)
        finetune(part)
    resumed = finetune(replace(part, resume=True))
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_with_a_checkpoint_that_goes_on_to_the_bit(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int
) -> None:
    whole = finetune(replace(config, run_dir=tmp_path / "whole", steps=6, lr_warmup_steps=2, save_interval=100))
    optimizer_step = Finetuner._optimizer_step

    def interrupted(self: Finetuner) -> dict[str, torch.Tensor]:
        if self.step == 4:
            os.kill(os.getpid(), number)
        return optimizer_step(self)

    part = replace(config, run_dir=tmp_path / "part", steps=6, lr_warmup_steps=2, save_interval=100)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Finetuner, "_optimizer_step", interrupted)
        finetune(part)
    assert stopped.value.code == 128 + number
    assert f"To go on: torchrl-vla finetune --resume --run-dir {part.run_dir}" in capsys.readouterr().out
    assert [path.name for path in (part.run_dir / "checkpoints").glob("checkpoint-*")] == ["checkpoint-000000000005"]
    resumed = finetune(replace(part, resume=True))
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_a_second_process_in_the_folder_is_refused(config: FinetuneConfig) -> None:
    finetune(replace(config, steps=2, lr_warmup_steps=1))
    before = (config.run_dir / "metrics.csv").read_bytes()
    with lock_run(config.run_dir), pytest.raises(ValueError, match="Another process is training in"):
        finetune(replace(config, steps=4, lr_warmup_steps=1, resume=True))
    assert (config.run_dir / "metrics.csv").read_bytes() == before


def test_a_run_that_diverges_between_two_log_entries_keeps_its_last_checkpoint(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer_step = Finetuner._optimizer_step

    def poisoned(self: Finetuner) -> dict[str, torch.Tensor]:
        if self.step == 4:
            self.parameters[0].data.fill_(torch.nan)
        return optimizer_step(self)

    run = replace(config, steps=12, lr_warmup_steps=2, log_interval=10, save_interval=3)
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "_optimizer_step", poisoned)
        with pytest.raises(TrainingDiverged, match="not finite at step 6.*go on with --resume"):
            finetune(run)
        early = replace(run, run_dir=run.run_dir.with_name("early"), save_interval=6)
        with pytest.raises(TrainingDiverged, match="start over with --resume.*there is no checkpoint yet"):
            finetune(early)
    finetune(replace(early, resume=True))
    assert rows(early)[-1]["update"] == 12 and np.isfinite(rows(early)[-1]["train/loss"])
    assert [path.name for path in (run.run_dir / "checkpoints").glob("checkpoint-*")] == ["checkpoint-000000000003"]
    finetune(replace(run, resume=True, actor_lr=1e-3, allow_changed=["actor_lr"]))
    assert np.isfinite(rows(run)[-1]["train/loss"])


def test_options_of_a_resumed_run_hold_for_the_next_one(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(config, steps=4, lr_warmup_steps=1)
    finetune(run)
    noted, about = run.run_dir / "config.json", run.run_dir / "about.json"
    first, first_about = noted.read_text(), about.read_text()
    resume = ["--resume", "--run-dir", str(run.run_dir)]
    with pytest.raises(ValueError, match="use_lora from False to True would change.*--allow-changed use_lora"):
        main([*resume, "--use-lora"])
    with pytest.raises(ValueError, match="have changed, leave them out"):
        main([*resume, "--use-lora", "--allow-changed", "use_lora"])  # what the checkpoint does not fit is not noted
    main(resume)
    assert noted.read_text() == first and about.read_text() == first_about
    for steps in ("6", "8"):
        monkeypatch.setattr("sys.argv", ["finetune", *resume, "--steps", steps])
        main([*resume, "--steps", steps])
    main(resume)
    assert (run.run_dir / "config-1.json").read_text() == first and (
        run.run_dir / "about-1.json"
    ).read_text() == first_about
    assert FinetuneConfig.load(run.run_dir / "config-2.json") == replace(run, steps=6)
    assert FinetuneConfig.load(noted) == replace(run, steps=8)
    assert json.loads(about.read_text())["command"][-1] == "8" and not (run.run_dir / "config-3.json").exists()
    assert rows(run)[-1]["update"] == 8
    moved = run.run_dir.rename(run.run_dir.with_name("moved"))
    main(["--resume", "--run-dir", str(moved)])
    assert not (moved / "config-3.json").exists()


def test_micro_batches_add_up_to_their_batch(config: FinetuneConfig, tmp_path: Path):
    settings = replace(config, steps=2, lr_warmup_steps=1, ema_decay=0.0, proprio_noise=0.0, crop_area=1.0,
                       brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, log_interval=1)  # fmt: skip
    at_once = replace(settings, run_dir=tmp_path / "a")
    in_parts = replace(settings, run_dir=tmp_path / "b", batch_size=4)
    finetune(at_once), finetune(in_parts)
    for one, other in zip(rows(at_once), rows(in_parts), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/accuracy", "val/tokens"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_inputs_are_what_evaluation_makes_of_the_same_observation(data: Path, start: Path):
    mixture = DemonstrationMixture([data])
    dataset = mixture.datasets[SUITE]
    policy = load_student(
        FinetuneConfig((data,), Path("unused"), pretrained_checkpoint=str(start)), mixture, torch.device("cpu")
    )
    samples = load_samples(mixture, {SUITE: ["000000", "030000"]}, policy.model, policy.processor)
    inputs = InputBuilder(
        policy.model, policy.processor, mixture.instructions, augmentation=ImageAugmentation(), proprio_noise=0.01
    )
    batch = inputs(samples, training=False)
    episodes = [dataset.episodes[name] for name in ("000000", "030000")]
    # A stored frame is the evaluation's JPEG round trip already: the rest of its pipeline follows.
    stored = torch.cat([decode(episode) for episode in episodes])
    expected = normalize(center_crop_resize(lanczos3_resize(stored, 28)))
    assert torch.equal(batch["pixel_values"], expected)
    instructions = [INSTRUCTIONS[0]] * 6 + [INSTRUCTIONS[3]] * 6
    given = policy.processor(stored, instructions, torch.cat([episode["state"] for episode in episodes]))
    assert torch.equal(batch["input_ids"], given.input_ids)
    assert torch.equal(batch["attention_mask"], given.attention_mask)
    assert torch.equal(batch["proprio"], given.proprio)
    assert torch.equal(policy.processor.action_tokenizer.encode(batch["vla_action", "chunk"]),
                       batch["vla_action", "tokens"])  # fmt: skip
    noisy = inputs(samples, training=True)
    assert 0.005 < (noisy["proprio"] - batch["proprio"]).std() < 0.02
    assert not torch.equal(noisy["pixel_values"], batch["pixel_values"])


def test_only_adapters_and_heads_learn_with_lora(config: FinetuneConfig, start: Path):
    folder = finetune(replace(config, steps=3, lr_warmup_steps=1, use_lora=True, lora_rank=2, ema_decay=0.0))
    before, after = (load_openvla(path, dtype=torch.float32) for path in (start, folder))
    changed = {
        name
        for name, parameter in before.named_parameters()
        if not torch.allclose(parameter, after.get_parameter(name), atol=0.01, rtol=0.01)
        or not torch.equal(parameter.bfloat16(), after.get_parameter(name).bfloat16())
    }
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in changed
    assert "proprio_projector.fc1.weight" in changed
    assert "language_model.model.embed_tokens.weight" not in changed
    assert not any("norm" in name for name in changed)


def test_cameras_have_to_be_in_the_demonstrations_and_no_fewer_than_the_policys(
    config: FinetuneConfig, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="wrist"):
        finetune(replace(config, num_images_in_input=2))
    two_cameras = shutil.copytree(start, tmp_path / "two")
    settings = json.loads((two_cameras / "config.json").read_text())
    settings["torchrl_vla"] |= {"num_images": 2}
    (two_cameras / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trained with 2 cameras: use --num-images-in-input 2"):
        finetune(replace(config, pretrained_checkpoint=str(two_cameras)))


def test_the_l1_head_is_added_and_learns_alone(config: FinetuneConfig, start: Path):
    run = replace(config, objective="l1", freeze_vla_backbone=True, actor_lr=1e-2)
    folder = finetune(run)
    assert rows(run)[-1]["train/l1"] < 0.6 * rows(run)[0]["train/l1"]
    after = load_openvla(folder, dtype=torch.float32, load_l1_action_head=True)
    before = load_openvla(start, dtype=torch.float32)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after.get_parameter(name), before.get_parameter(name).bfloat16().float())
    assert after.action_head is not None
    # The folder now has an L1 head, so that its tokens are not taken for trained ones.
    with pytest.raises(ValueError, match="logits were never trained"):
        finetune(replace(config, pretrained_checkpoint=str(folder), run_dir=config.run_dir.with_name("second")))


def test_one_demonstration_per_task(config: FinetuneConfig, capsys: pytest.CaptureFixture):
    finetune(replace(config, episodes_per_task=1, steps=2, lr_warmup_steps=1, mini_batch_size=12))
    assert "2 demonstrations to learn from, 2 held out" in capsys.readouterr().out


def test_bad_combinations_are_explained(config: FinetuneConfig, tmp_path: Path):
    with pytest.raises(ValueError, match="mini_batch_size is 999, but the demonstrations have 24 samples"):
        finetune(replace(config, mini_batch_size=999))
    assert not config.run_dir.exists()
    with pytest.raises(ValueError, match="gives 6"):
        finetune(
            replace(
                config, run_dir=tmp_path / "d", pretrained_checkpoint=str(save_start(tmp_path / "six", action_dim=6))
            )
        )
    with pytest.raises(ValueError, match="no L1 head to keep"):
        finetune(replace(config, run_dir=tmp_path / "e", objective="l1", freeze_l1_action_head=True))
    for changes, message in (
        (dict(lr_warmup_steps=60), "lr_warmup_steps"),
        (dict(batch_size=5), "batch_size"),
        (dict(ema_decay=1.0), "ema_decay"),
        (dict(freeze_l1_action_head=True), "objective=l1"),
        (dict(freeze_vla_backbone=True), "objective=l1"),
        (dict(episodes_per_task=0), "episodes_per_task"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **changes)


def test_the_average_by_hand():
    weight, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(1), requires_grad=False)
    average = ParameterAverage([weight, frozen], decay=0.15)
    weight.data.fill_(10.0)
    average.update()  # decay 1/10
    weight.data.fill_(20.0)
    average.update()  # decay 0.15, since 2/11 is more
    with average.swapped_in():
        assert weight.tolist() == pytest.approx([0.15 * 9.0 + 0.85 * 20.0] * 2)
    assert weight.tolist() == [20.0, 20.0] and weight.requires_grad
    other = ParameterAverage([nn.Parameter(torch.zeros(2))], decay=0.15)
    other.load_state_dict(average.state_dict())
    assert other.updates == 2 and torch.equal(other.average[0], average.average[0])
    off = ParameterAverage([weight], decay=0.0)
    off.update()
    with off.swapped_in():
        assert weight.tolist() == [20.0, 20.0]
