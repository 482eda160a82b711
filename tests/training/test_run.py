"""The main job itself, small: real LIBERO, a tiny OpenVLA, every phase of a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from torchrl_vla.cli import main
from torchrl_vla.config import EnvironmentConfig, OpenVLAActorConfig, PPOConfig, TrainConfig
from torchrl_vla.envs import get_suite
from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.modules import ValueHead
from torchrl_vla.training import run
from torchrl_vla.training.devices import choose_device
from torchrl_vla.training.logging import RunLogger
from torchrl_vla.training.policy import BUNDLED, build_policy, load_policy, save_policy
from torchrl_vla.training.run import _advantage, _assemble, _validation, train

SMALL = [
    "--preset", "tiny", "--pretrained-checkpoint", "random:tiny", "--num-envs", "1", "--group-size", "2",
    "--max-episode-steps", "16", "--n-steps", "29", "--camera-size", "64", "--val-episodes", "2", "--n-epochs", "1",
    "--save-interval", "1", "--settle-steps", "1",
]  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_train_resume_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture):
    """GAE learns from failures too, so that an untrained policy's update is not empty."""
    run = tmp_path / "run"
    gae = ["--advantage-estimator", "gae", "--val-interval", "60"]
    main(["train", *SMALL, *gae, "--num-envs", "2", "--run-dir", str(run), "--timesteps", "40"])
    output = capsys.readouterr().out
    assert f"results go to {run}" in output and f"Policy: {run / 'policy'}" in output
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

    main(["train", "--resume", "--run-dir", str(run), "--timesteps", "70", "--num-envs", "1", "--no-val-videos"])
    assert "Going on from" in capsys.readouterr().out
    assert [float(row["update"]) for row in rows(run)] == [0.0, 1.0, 2.0, 3.0]

    out = tmp_path / "evaluation"
    main(
        ["evaluate", "--checkpoint", str(run / "policy"), "--task-ids", "0", "3", "--episodes-per-task", "1",
         "--max-episode-steps", "16", "--num-envs", "1", "--out", str(out)]
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
        (["--resume"], "is not the folder of a run"),
    ],
)
def test_bad_input_is_explained_before_a_folder_is_made(options: list[str], message: str, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=message):
        main(["train", *SMALL, "--run-dir", str(run), *options])
    assert not run.exists()


def test_the_value_head_learns_on_the_heads_device(tmp_path: Path):
    cpu, other = torch.device("cpu"), torch.device("meta")
    policy = load_policy(OpenVLAActorConfig(BUNDLED), task_suite="libero_spatial")
    value_head = ValueHead(policy.model.config.hidden_size)
    config = TrainConfig(PPOConfig(advantage_estimator="gae", val_interval=0))
    trainer = _assemble(config, tmp_path, cpu, other, policy, value_head, [ToyTrackingEnv(2)], 220)
    trainer.logger.close()
    learned = [{p.device for p in group["params"]} for group in trainer.optimizer.param_groups]
    assert learned == [{cpu}, {other}] and {p.device for p in value_head.parameters()} == {other}
    assert {p.device for p in policy.model.parameters()} == {cpu}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(val_episodes=5), "Validations run 4 episodes, not val_episodes=5"),
        (dict(val_episodes=4), None),
        (dict(val_episodes=5, eval_temperature=0.5), None),
        (dict(val_episodes=5, val_interval=0), None),
    ],
)
def test_greedy_validations_run_no_state_twice(
    options: dict[str, float], said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
):
    config = TrainConfig(PPOConfig(**options), env=EnvironmentConfig(task_ids=[0, 3], val_init_state_ids=[7, 8]))
    logger = RunLogger(tmp_path)
    _validation(config, load_policy(OpenVLAActorConfig(BUNDLED), task_suite="libero_spatial").actor, [], logger)
    logger.close()
    output = capsys.readouterr().out
    assert said in output if said else "Validations" not in output


def test_an_existing_folder_is_not_written_over(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists already. Choose another --run-dir, or go on with the run in it"):
        main(["train", *SMALL, "--run-dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_command():
    with pytest.raises(SystemExit, match="no command 'trian': choose train, evaluate"):
        main(["trian"])


def test_policy_folder_reads_back_the_same(tmp_path: Path):
    from tensordict import TensorDict

    torch.manual_seed(0)
    policy = build_policy("tiny", temperature=1.0)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(
        OpenVLAActorConfig(pretrained_checkpoint=str(tmp_path / "policy")), task_suite="libero_spatial", trainable=False
    )
    data = TensorDict(
        observation=TensorDict(image=torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8), state=torch.randn(8)),
        language_instruction="pick up the black bowl and place it on the plate",
    )
    expected, actual = (p.actor.get_dist(data.clone()).logits for p in (policy, loaded))
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


def test_cpu_is_a_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert train.__doc__


def test_every_choice_about_the_simulator_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Reached(Exception):
        pass

    def make_envs(task_suite: str, **options: object) -> None:
        raise Reached(task_suite, options)

    monkeypatch.setattr("torchrl_vla.training.run.make_envs", make_envs)
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


def test_the_baseline_reaches_the_advantage():
    assert _advantage(PPOConfig(advantage_estimator="rloo", baseline="running")).baseline == "running"


def test_videos_are_of_the_simulation_that_was_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With other fixtures or physics the same actions would be another episode."""
    seen: dict[str, dict[str, object]] = {}

    def watch(name: str) -> None:
        function = getattr(run, name)

        def watched(*arguments: object, **options: object) -> object:
            seen[name] = options
            return function(*arguments, **options)

        monkeypatch.setattr(run, name, watched)

    watch("make_envs")
    watch("film")
    options = ["--fidelity", "fast", "--seed", "9", "--timesteps", "29"]
    main(["train", *SMALL, *options, "--run-dir", str(tmp_path / "run")])
    assert seen["film"] == {"fidelity": "fast", "seed": 0, "settle_steps": 1}
    assert seen["film"].items() <= seen["make_envs"].items()
