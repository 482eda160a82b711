"""Where a resumed run takes those options from that are not given, and which it may be given anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchrl_vla.commands.finetune import main
from torchrl_vla.commands.options import given_options
from torchrl_vla.commands.train import main as train
from torchrl_vla.config import FinetuneConfig, TrainConfig
from torchrl_vla.training.run_folder import check_run_folder, describe_run


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    """What would have run."""
    runs: list[FinetuneConfig] = []
    monkeypatch.setattr("torchrl_vla.recipes.finetune.finetune", runs.append)
    return runs


def test_a_resumed_run_keeps_its_options(runs: list[FinetuneConfig], tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(
        [
            "--dataset",
            "demos",
            "--run-dir",
            str(out),
            "--steps",
            "1600",
            "--brightness",
            "0.1",
            "--num-images-in-input",
            "2",
        ]
    )
    out.mkdir()
    runs[0].save(out / "config.json")
    moved = out.rename(tmp_path / "moved")
    main(["--resume", "--run-dir", str(moved), "--actor-lr", "1e-4"])
    expected = {**vars(runs[0]), "run_dir": moved, "resume": True, "actor_lr": 1e-4}
    assert runs[0].steps == 1600 and runs[0].dataset == Path("demos") and vars(runs[1]) == expected


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has no config.json. Leave out --resume to start one"):
        main(["--resume", "--run-dir", str(tmp_path), "--dataset", "demos"])
    (tmp_path / "config.json").write_text('{"ppo": {}}')
    with pytest.raises(ValueError, match="was not written by this version of `torchrl-vla finetune`"):
        main(["--resume", "--run-dir", str(tmp_path)])


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What would have been trained."""
    trainings: list[TrainConfig] = []

    def check(config: TrainConfig) -> None:
        check_run_folder(config)
        trainings.append(config)

    monkeypatch.setattr("torchrl_vla.recipes.grpo.train", check)
    return trainings


OWN = [
    "--preset", "tiny", "--fidelity", "fast", "--max-episode-steps", "16", "--num-envs", "1", "--actor-lr", "1e-6",
    "--task-ids", "0-1", "--timesteps", "32",
]  # fmt: skip


def begin(folder: Path, trainings: list[TrainConfig]) -> TrainConfig:
    train([*OWN, "--run-dir", str(folder)])
    folder.mkdir()
    describe_run(trainings[0], folder)
    return trainings.pop()


@pytest.mark.parametrize(
    "spelling", [["--run-dir", "FOLDER"], ["--run_dir", "FOLDER"], ["--run-dir=FOLDER"], ["--run_dir=FOLDER"]]
)
@pytest.mark.parametrize("more", [[], ["--timesteps", "64"], ["--total_timesteps=64"]], ids=" ".join)
def test_a_resumed_run_keeps_its_options_however_they_are_spelled(
    spelling: list[str], more: list[str], trainings: list[TrainConfig], tmp_path: Path
) -> None:
    own = begin(tmp_path / "run", trainings)
    noted = (tmp_path / "run" / "config.json").read_text()
    train(["--resume", *[word.replace("FOLDER", str(tmp_path / "run")) for word in spelling], *more])
    resumed = trainings.pop()
    assert resumed.ppo.total_timesteps == (64 if more else 32) and resumed.resume
    resumed.ppo.total_timesteps, resumed.resume = 32, False
    assert resumed == own and own.ppo.actor_lr == 1e-6 and own.ppo.fidelity == "fast" and own.ppo.task_ids == [0, 1]
    assert (tmp_path / "run" / "config.json").read_text() == noted


@pytest.mark.parametrize(
    "option",
    [
        "--seed 5", "--group-size 2", "--n-steps 100", "--task-ids 3 4", "--task-suite libero_object",
        "--fidelity exact", "--actor-lr 1e-3", "--use-lora", "--lora-alpha 1", "--advantage-estimator gae",
        "--pretrained-checkpoint random:tiny", "--unnorm-key x", "--max-episode-steps 50",
        "--rollout-temperature 0.1", "--init-state-ids 3", "--camera-size 64", "--proprio-format quaternion",
        "--freeze-vla-backbone", "--clip-ratio-low 0.1", "--load-in-4bit", "--aggregation trajectory",
    ],
)  # fmt: skip
def test_what_makes_the_policy_or_the_data_stays(option: str, trainings: list[TrainConfig], tmp_path: Path) -> None:
    own = begin(tmp_path / "run", trainings)
    noted = (tmp_path / "run" / "config.json").read_text()
    name = option.split()[0].strip("-").replace("-", "_")
    resume = ["--resume", "--run-dir", str(tmp_path / "run"), *option.split()]
    with pytest.raises(ValueError, match=f"but {name} from .* would change: .* with --allow-changed {name}"):
        train(resume)
    assert not trainings and (tmp_path / "run" / "config.json").read_text() == noted
    train([*resume, "--allow-changed", name])
    resumed = {**vars(trainings[0].ppo), **vars(trainings[0].actor)}
    before = {**vars(own.ppo), **vars(own.actor)}
    assert {key for key in before if before[key] != resumed[key]} == {name}


def test_what_only_says_how_long_and_where_may_change(trainings: list[TrainConfig], tmp_path: Path) -> None:
    own = begin(tmp_path / "run", trainings)
    options = {**vars(own.ppo), **vars(own.actor), "profile": None}
    assert set(options) >= TrainConfig.MAY_CHANGE, "names that are no options"
    assert set(vars(FinetuneConfig(Path("a"), Path("b")))) >= FinetuneConfig.MAY_CHANGE
    new = ["--num-envs", "4", "--keep-checkpoints", "1", "--device", "cpu", "--batch-size", "2", "--no-val-videos"]
    train(["--resume", "--run-dir", str(tmp_path / "run"), *new, "--profile", "3"])
    assert (trainings[0].ppo.num_envs, trainings[0].ppo.batch_size, trainings[0].profile) == (4, 2, 3)


def test_resuming_is_refused_where_it_makes_no_sense(trainings: list[TrainConfig], tmp_path: Path) -> None:
    begin(tmp_path / "run", trainings)
    resume = ["--resume", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="leave out --preset"):
        train([*resume, "--preset", "tiny"])
    with pytest.raises(ValueError, match="allow_changed names no option: actor-lr"):
        train([*resume, "--allow-changed", "actor-lr"])
    with pytest.raises(ValueError, match="it has no config.json. Leave out --resume to start one"):
        train(["--resume", "--run_dir", str(tmp_path)])
    (tmp_path / "run" / "config.json").write_text("")
    with pytest.raises(ValueError, match="config.json is not valid JSON .*cannot be resumed from it"):
        train(resume)
    assert not trainings


def test_given_options_are_those_that_are_given() -> None:
    """Also where they are given the value that they have anyway."""
    words = ["--num_envs", "1", "--no-use-lora", "--task-ids", "None", "--image-size", "126", "126", "--nothing", "5"]
    assert given_options(TrainConfig, words, prog="train") == {
        "num_envs": 1,
        "use_lora": False,
        "task_ids": None,
        "image_size": (126, 126),
    }
    assert given_options(TrainConfig, ["--help"], prog="train") == {}
