"""The main job itself, small: real LIBERO, a tiny OpenVLA, every phase of a run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.objectives.value import GAE

from torchrl_vla.checkpoints.locations import BUNDLED
from torchrl_vla.checkpoints.policy import Policy, build_policy, load_policy, save_policy
from torchrl_vla.cli import main
from torchrl_vla.collectors import GroupCollector
from torchrl_vla.config import OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.distributed import OneProcess
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.rendering import configure_rendering
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import AsymmetricClipPPOLoss, EstimateAdvantage, GRPOAdvantage
from torchrl_vla.recipes import grpo
from torchrl_vla.training import start, validation
from torchrl_vla.training.devices import choose_device
from torchrl_vla.training.optimizer_step import OptimizerStep
from torchrl_vla.training.run_checkpoints import RunCheckpoints

pytestmark = [pytest.mark.simulator, pytest.mark.processes]

SMALL = [
    "--preset", "tiny", "--pretrained-checkpoint", "random:tiny", "--num-envs", "1", "--group-size", "2",
    "--max-episode-steps", "16", "--n-steps", "29", "--camera-size", "64", "--val-episodes", "2", "--n-epochs", "1",
    "--save-interval", "1", "--settle-steps", "1",
]  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def watch(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The options of each call of a function that a run uses, from now on."""
    function, calls = getattr(module, name), []

    def watched(*arguments: object, **options: object) -> object:
        calls.append(options)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, watched)
    return calls


class Parts(NamedTuple):
    """What `train` hands to the loop."""

    policy: Policy
    collector: GroupCollector
    buffer: TensorDictReplayBuffer
    step: OptimizerStep
    advantage: EstimateAdvantage | GRPOAdvantage
    checkpoints: RunCheckpoints

    @property
    def loss(self) -> AsymmetricClipPPOLoss:
        return self.step.loss

    def save(self) -> None:
        self.checkpoints.save(step=0, success=None)


@pytest.fixture
def assemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parts]:
    """A run's parts, put together by `train` around an environment that needs no simulator; nothing is learned."""

    def assemble(config: TrainConfig, folder: Path = tmp_path, *, heads: str = "cpu", in_4bit: bool = False) -> Parts:
        policies: list[Policy] = []
        parts: list[Parts] = []

        def load(config: TrainConfig, *ranks: OneProcess) -> tuple[Policy, torch.device, torch.device]:
            policy, device, head_device = start.load_for_training(config, *ranks)
            policy.model.is_loaded_in_4bit = in_4bit
            policies.append(policy)
            return policy, device, head_device

        def learn(ppo, collector, buffer, step, progress, logger, *, advantage, checkpoints, **options) -> None:
            parts.append(Parts(policies[0], collector, buffer, step, advantage, checkpoints))

        monkeypatch.setattr(start, "choose_head_device", lambda *_, **__: torch.device(heads))
        monkeypatch.setattr(grpo, "load_for_training", load)
        monkeypatch.setattr(grpo, "make_envs", lambda *_, **__: [ToyTrackingEnv(2)])
        monkeypatch.setattr(grpo, "learn", learn)
        grpo.train(replace(config, ppo=replace(config.ppo, device="cpu"), run_dir=folder))
        return parts[0]

    return assemble


def make_observation() -> TensorDict:
    torch.manual_seed(0)
    return TensorDict(
        observation=TensorDict(image=torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8), state=torch.randn(8)),
        language_instruction="pick up the black bowl and place it on the plate",
        task_id=torch.zeros(1, dtype=torch.int64),
    )


def test_train_resume_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """GAE learns from failures too, so that an untrained policy's update is not empty."""
    simulations, films_made = watch(grpo, "make_envs", monkeypatch), watch(validation, "film", monkeypatch)
    run = tmp_path / "run"
    options = ["--advantage-estimator", "gae", "--val-interval", "60", "--fidelity", "fast", "--seed", "9"]
    options += ["--reconstruction-coef", "0.01", "--proprio-format", "quaternion"]
    main(["train", *SMALL, *options, "--num-envs", "2", "--run-dir", str(run), "--timesteps", "40"])
    output = capsys.readouterr().out
    assert f"results in {run}" in output and f"Policy: {run / 'policy'}" in output
    first = rows(run)
    assert [float(row["update"]) for row in first] == [0.0, 1.0, 2.0]
    assert float(first[1]["rollout/env_steps"]) == 32.0
    # Nothing was learned before the first step: old and new probabilities are those of the same weights.
    assert abs(float(first[1]["train/approx_kl"])) < 1e-6 and float(first[1]["train/grad_norm"]) > 0
    for name in ("config.json", "about.json", "train.log", "learning_curve.png", "policy/model.safetensors"):
        assert (run / name).stat().st_size > 0
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    # Nothing succeeds in 16 control steps, so there is a failure to film, before training and after.
    films = sorted(path.name for path in (run / "videos").iterdir())
    assert len(films) == 2 and films[0] == "val-failure-0.mp4" and films[1].startswith("val-failure-")
    # Of the simulation that was validated: with other fixtures or physics the same actions are another episode.
    assert films_made == [{"fidelity": "fast", "seed": 0, "settle_steps": 1}] * 2
    assert films_made[0].items() <= simulations[0].items()

    main(["train", "--resume", "--run-dir", str(run), "--timesteps", "70", "--num-envs", "1", "--no-val-videos"])
    assert "Resumed from" in capsys.readouterr().out
    assert [float(row["update"]) for row in rows(run)] == [0.0, 1.0, 2.0, 3.0]
    # What it was resumed with is what it is resumed with the next time.
    steps = [TrainConfig.load(run / name).ppo.total_timesteps for name in ("config.json", "config-1.json")]
    assert steps == [70, 40] and not TrainConfig.load(run / "config.json").resume
    assert TrainConfig.load(run / "config.json").preset == "tiny" and (run / "about-1.json").is_file()
    assert not list(run.glob("*.partial"))

    out = tmp_path / "evaluation"
    main(
        ["evaluate", "--checkpoint", str(run / "policy"), "--task-ids", "0", "3", "--episodes-per-task", "1",
         "--max-episode-steps", "16", "--num-envs", "1", "--dtype", "bfloat16", "--out", str(out)]
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert [(e["task_id"], e["init_state_id"], e["control_steps"]) for e in report["episodes"]] == [
        (0, 0, 16),
        (3, 0, 16),
    ]
    page = (out / "report.html").read_text()
    assert page.count("<video ") == 2 and page.count("<polyline ") == 2 and "0 of 2 episodes succeeded" in page
    assert sorted(path.name for path in (out / "videos").iterdir()) == [
        "task0-state0-failure.mp4",
        "task3-state0-failure.mp4",
    ]
    noted = [report["settings"][name] for name in ("dtype", "renderer", "proprio_format")]
    assert noted == ["bfloat16", configure_rendering(), "quaternion"]  # the policy's folder says the last
    assert report["success"].endswith("(0/2)") and report["settings"]["versions"]["mujoco"] == "3.3.2"


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    options = [*SMALL, "--advantage-estimator", "gae", "--val-interval", "0"]
    main(["train", *options, "--run-dir", str(tmp_path / "whole"), "--timesteps", "60"])
    main(["train", *options, "--run-dir", str(tmp_path / "parts"), "--timesteps", "30"])
    main(["train", "--resume", "--run-dir", str(tmp_path / "parts"), "--timesteps", "60"])
    for column in ("train/policy_loss", "train/value_loss", "train/grad_norm"):
        assert [row[column] for row in rows(tmp_path / "whole")] == [row[column] for row in rows(tmp_path / "parts")]


def test_a_random_policy_has_nothing_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    main(["train", *SMALL, "--val-interval", "0", "--run-dir", str(run), "--timesteps", "30"])
    assert "No group had both outcomes (1 failed throughout" in capsys.readouterr().out
    (row,) = rows(run)
    assert (float(row["rollout/groups"]), float(row["rollout/groups_kept"])) == (1.0, 0.0)
    assert "train/policy_loss" not in row
    # One was written before anything was learned.
    names = sorted(path.name for path in (run / "checkpoints").glob("checkpoint-*"))
    assert names == ["checkpoint-000000000000", f"checkpoint-{int(float(row['env_steps'])):012}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task-suite", "libero_spatal"], "Unknown task suite 'libero_spatal'. Did you mean 'libero_spatial'"),
        (["--task-ids", "0", "10"], "task_id=10 is not a task of libero_spatial"),
        (["--init-state-ids", "50"], "Initial state 50 does not exist: task 0 of libero_spatial has 0..49"),
        (["--image-size", "224", "224"], r"image_size is \(224, 224\), but random:tiny was made for \(126, 126\)"),
        (["--pretrained-checkpoint", "./nowhere"], "there is no checkpoint folder './nowhere'"),
        (["--device", "cuda:7"], "device 'cuda:7' is not on this machine"),
        (["--device", "quantum"], "device 'quantum' is unknown"),
        (["--no-use-tokenized-actions", "--load-l1-action-head"], "PPO needs use_tokenized_actions=True"),
        (["--resume"], "a resumed run keeps its own options: leave out --preset"),
    ],
)
def test_bad_input_is_explained_before_a_folder_is_made(options: list[str], message: str, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        main(["train", *SMALL, "--run-dir", str(run), *options])
    assert not run.exists()


def test_the_value_head_learns_on_the_heads_device(assemble):
    config = TrainConfig(PPOConfig(advantage_estimator="gae", val_interval=0), actor=OpenVLAActorConfig(BUNDLED))
    parts = assemble(config, heads="meta")
    learned = [{p.device.type for p in group["params"]} for group in parts.step.optimizer.param_groups]
    assert learned == [{"cpu"}, {"meta"}]
    assert {p.device.type for p in parts.loss.critic_network.parameters()} == {"meta"}
    assert {p.device.type for p in parts.policy.model.parameters()} == {"cpu"}


def test_every_choice_about_learning_reaches_its_part(assemble):
    chosen = PPOConfig(
        clip_ratio_low=0.11, clip_ratio_high=0.33, ratio_level="action", dual_clip=2.5, entropy_coef=0.02, kl_coef=0.03,
        reconstruction_coef=0.04, value_loss_coef=0.6, advantage_estimator="gae", gamma=0.9, gae_lambda=0.8,
        actor_lr=1e-4, critic_lr=2e-3, lr_warmup_steps=0, n_steps=77, group_size=3, seed=5, val_interval=0,
    )  # fmt: skip
    chosen = replace(chosen, task_ids=[4, 2], init_state_ids=[3, 5], val_init_state_ids=[8])
    parts = assemble(TrainConfig(chosen, OpenVLAActorConfig(BUNDLED, lora_rank=2)))
    policy, loss, collector, gae = parts.policy, parts.loss, parts.collector, parts.advantage.estimator
    coefficients = {
        "clip_epsilon_low": 0.11, "clip_epsilon_high": 0.33, "dual_clip": 2.5, "entropy_coeff": 0.02, "kl_coeff": 0.03,
        "reconstruction_coeff": 0.04, "critic_coeff": 0.6,
    }  # fmt: skip
    assert {name: float(getattr(loss, name)) for name in coefficients} == pytest.approx(coefficients)
    assert loss.ratio_level == "action" and loss.reference_context is not None
    tokens = torch.tensor([0, 17, 255])
    assert torch.equal(loss.bin_centers[tokens], policy.processor.action_tokenizer.decode(tokens))
    assert isinstance(gae, GAE) and (float(gae.gamma), float(gae.lmbda)) == pytest.approx((0.9, 0.8))
    rates = {parameter: group["lr"] for group in parts.step.optimizer.param_groups for parameter in group["params"]}
    learning = dict.fromkeys((p for p in policy.model.parameters() if p.requires_grad), 1e-4)
    assert rates == learning | dict.fromkeys(loss.critic_network.parameters(), 2e-3)
    plans = list(islice(collector._plans, 4))
    assert {(plan[0].task_id, plan[0].init_state_id) for plan in plans} == set(product([4, 2], [3, 5]))
    assert {len(plan) for plan in plans} == {3} and (collector.min_control_steps, collector.seed) == (77, 5)


def test_every_choice_about_groups_reaches_their_advantage():
    chosen = {"baseline": "running", "verifier_gamma": 0.7, "keep_low": 0.2, "keep_high": 0.6}
    advantage = grpo.make_advantage(PPOConfig(advantage_estimator="rloo", **chosen))
    assert {name: getattr(advantage, name) for name in chosen} == chosen and advantage.estimator == "rloo"


@pytest.mark.parametrize(("warmup", "rates"), [(4, [2.5e-5, 5e-5]), (0, [1e-4, 1e-4])])
def test_the_warm_up_reaches_the_steps(assemble, warmup: int, rates: list[float]):
    ppo = PPOConfig(actor_lr=1e-4, lr_warmup_steps=warmup, val_interval=0)
    step = assemble(TrainConfig(ppo, actor=OpenVLAActorConfig(BUNDLED, lora_rank=2))).step
    seen = [step.optimizer.param_groups[0]["lr"]]
    step.optimizer.step()
    step.schedule.step()
    assert [*seen, step.optimizer.param_groups[0]["lr"]] == pytest.approx(rates)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_what_a_save_writes(in_4bit: bool, assemble, tmp_path: Path):
    """Weights in 4 bits, which need a GPU, cannot be written: that must not end the run."""
    actor = OpenVLAActorConfig(BUNDLED, lora_rank=2)
    parts = assemble(TrainConfig(PPOConfig(val_interval=0), actor=actor), in_4bit=in_4bit)
    parts.save()
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 1
    assert (tmp_path / "policy").exists() is not in_4bit


def test_a_policy_is_saved_as_it_learned(assemble, tmp_path: Path):
    """In bfloat16, as the bundled one is stored, most of a short run's steps would be lost."""
    actor = OpenVLAActorConfig(BUNDLED, use_lora=False)
    parts = assemble(TrainConfig(PPOConfig(val_interval=0), actor=actor), tmp_path / "whole")
    with torch.no_grad():
        for parameter in parts.step.parameters:
            parameter += 1e-4 * torch.randn_like(parameter)
    parts.save()
    folder = str(tmp_path / "whole" / "policy")
    saved = load_policy(replace(actor, pretrained_checkpoint=folder), task_suite="libero_spatial")
    assert all(map(torch.equal, saved.model.state_dict().values(), parts.policy.model.state_dict().values()))
    merged = OpenVLAActorConfig(BUNDLED, lora_rank=2)
    assemble(TrainConfig(PPOConfig(val_interval=0), actor=merged), tmp_path / "adapters").save()
    assert json.loads((tmp_path / "adapters" / "policy" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_kl_penalty_is_to_the_policy_that_the_run_started_from(use_lora: bool, assemble):
    actor = OpenVLAActorConfig(BUNDLED, use_lora=use_lora, lora_rank=2)
    ppo = PPOConfig(kl_coef=0.1, actor_lr=1e-2, lr_warmup_steps=0, val_interval=0)
    parts = assemble(TrainConfig(ppo, actor=actor))

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return parts.policy.actor.get_dist(make_observation()).logits

    start = logits()
    for parameter in parts.step.parameters:
        parameter.grad = torch.randn_like(parameter)
    for _ in range(2):
        parts.step.optimizer.step()
        learned = logits()
        with parts.loss.reference_context():
            torch.testing.assert_close(logits(), start)
        assert torch.equal(logits(), learned) and (learned - start).abs().max() > 0.1


def test_an_existing_folder_is_not_written_over(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists already. Choose another --run-dir, or resume the run in it"):
        main(["train", *SMALL, "--run-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_error_before_the_first_rollout_is_the_one_that_is_seen(tmp_path: Path):
    main(["train", *SMALL, "--run-dir", str(tmp_path / "run"), "--timesteps", "30", "--val-interval", "0"])
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    # Workers start with their first use: these were never used, and have nothing to close.
    with pytest.raises(SystemExit, match="All checkpoints in .* are damaged"):
        main(["train", "--resume", "--run-dir", str(tmp_path / "run"), "--num-envs", "4"])
    assert TrainConfig.load(tmp_path / "run" / "config.json").ppo.num_envs == 1, "it did not go on with 4"


@pytest.mark.parametrize("arguments", ["train --help", "compare --help", "--help", ""])  # the first is a long text
@pytest.mark.parametrize("reader", ["head -n 1", "true"])
def test_help_whose_reader_has_seen_enough(arguments: str, reader: str):
    command = f"{sys.executable} -c 'from torchrl_vla.cli import main; main()' {arguments} | {reader}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: torchrl-vla") or reader == "true"


def test_unknown_command():
    with pytest.raises(SystemExit, match="no command 'trian': choose train, evaluate"):
        main(["trian"])


def test_policy_folder_reads_back_the_same(tmp_path: Path):
    torch.manual_seed(0)
    policy = build_policy("tiny", temperature=1.0)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(
        OpenVLAActorConfig(pretrained_checkpoint=str(tmp_path / "policy")), task_suite="libero_spatial", trainable=False
    )
    expected, actual = (p.actor.get_dist(make_observation()).logits for p in (policy, loaded))
    assert torch.equal(actual, expected)


def test_bundled_policy_knows_the_suite():
    policy = load_policy(
        OpenVLAActorConfig(pretrained_checkpoint=BUNDLED), task_suite="libero_spatial", trainable=False
    )
    assert sum(p.numel() for p in policy.model.parameters()) < 8e6
    instruction = get_suite("libero_spatial").task(0).instruction
    ids, _ = policy.processor.encode_instructions([instruction])
    assert policy.processor.tokenizer.unk_token_id not in ids
    low, high = policy.processor.action_tokenizer.action_q01, policy.processor.action_tokenizer.action_q99
    assert (low[:3] < -0.3).all() and (high[:3] > 0.3).all()


def test_a_gpu_is_made_ready_for_learning(monkeypatch: pytest.MonkeyPatch):
    made_current: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", made_current.append)
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert choose_device("auto", gpu_id=1) == torch.device("cuda:1")
        assert made_current == [torch.device("cuda:1")]
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])


def test_the_cpu_is_a_device_and_the_one_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert choose_device("cpu") == choose_device("auto") == torch.device("cpu")


def test_every_choice_about_the_simulator_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Reached(Exception):
        pass

    def make_envs(task_suite: str, **options: object) -> None:
        raise Reached(task_suite, options)

    monkeypatch.setattr("torchrl_vla.recipes.grpo.make_envs", make_envs)
    chosen = [
        "--task-suite", "libero_goal", "--task-ids", "2", "5", "--num-envs", "3", "--camera-size", "32",
        "--max-episode-steps", "16", "--settle-steps", "4", "--proprio-format", "quaternion", "--reward-scale", "2",
        "--fidelity", "fast", "--worker-timeout", "7", "--seed", "9", "--pretrained-checkpoint", "random:tiny",
    ]  # fmt: skip
    with pytest.raises(Reached) as reached:
        main(["train", "--preset", "tiny", "--run-dir", str(tmp_path / "run"), *chosen])
    suite, options = reached.value.args
    assert suite == "libero_goal" and options == {
        "task_ids": [2, 5], "num_envs": 3, "chunk_size": 8, "image_size": 32, "cameras": ("agentview",),
        "proprio_format": "quaternion", "max_episode_steps": 16, "settle_steps": 4, "reward_scale": 2.0,
        "fidelity": "fast", "worker_timeout": 7.0, "seed": 0,
    }  # fmt: skip
