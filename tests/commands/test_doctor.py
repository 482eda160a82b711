from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

from torchrl_vla.checkpoints import diagnosis as doctor
from torchrl_vla.checkpoints.locations import BUNDLED
from torchrl_vla.checkpoints.openvla_format import save_openvla
from torchrl_vla.cli import main
from torchrl_vla.config import EvaluateConfig
from torchrl_vla.modules import OpenVLA, OpenVLAConfig
from torchrl_vla.recipes.evaluate import _acting

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data" / "openvla" / "checkpoint"


def diagnose(*options: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *options])
    return end.value.code  # type: ignore[return-value]


def test_the_bundled_policy_fits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "doctor.json"
    assert diagnose(BUNDLED, "--task-suite", "libero_spatial_swap", "--device", "cpu") == 0
    assert diagnose(BUNDLED, "--task-suite", "libero_spatial", "--device", "cpu", "--json", str(out)) == 0
    table = capsys.readouterr().out
    assert "can seed RL   yes" in table and f"Findings: {out}" in table and "problem" not in table
    found = json.loads(out.read_text())
    assert found["fits"] and found["mode"] == "tokens"
    assert found["statistics"] == ["libero_10", "libero_goal", "libero_object", "libero_spatial"]
    # 7.5 million run, and those that no forward reads.
    assert found["parameters"] == 8_055_680 and found["parameters_by_part"]["unused"] == 595_456
    assert found["memory"]["rollout"]["weights"] == 4 * (8_055_680 - 595_456)
    assert found["steps"] == {"proprio_projector": "0"}
    assert {check["name"] for check in found["checks"]} == {
        "mode", "weights", "tokenizer", "cameras", "statistics", "memory", "dtype", "attention", "renderer", "versions",
    }  # fmt: skip


def test_problems_are_told_with_what_to_do(capsys: pytest.CaptureFixture) -> None:
    assert diagnose(str(DATA), "--task-suite", "libero_goal", "--device", "cpu") == 1
    table = capsys.readouterr().out
    assert "can seed RL   no" in table and "action_head of step 150000" in table
    assert "problem  mode: its action-token logits were never trained" in table
    assert "Haozhan72/Openvla-oft-SFT-libero-spatial-traj1" in table
    assert "problem  tokenizer: No tokenizer can be loaded" in table
    assert "problem  statistics: No statistics for 'libero_goal'" in table and "libero_spatial_no_noops" in table


def test_an_l1_checkpoint_can_be_evaluated_and_its_maker_believed(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "l1")
    options = ["--task-suite", "libero_spatial", "--device", "cpu"]
    assert diagnose(str(folder), *options) == 1
    assert diagnose(str(folder), *options, "--purpose", "evaluate") == 0
    assert "it acts by its L1 head" in capsys.readouterr().out
    assert diagnose(str(folder), *options, "--finetuned-on-discrete-actions") == 0
    assert "hybrid: the user says" in capsys.readouterr().out


@pytest.mark.parametrize(("heads", "instead"), [(True, "its L1 head"), (False, "its tokens one after the other")])
def test_what_evaluate_must_be_told_to_act_by_tokens(
    heads: bool, instead: str, copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """`evaluate` has no --finetuned-on-discrete-actions: --action-mode tokens does what doctor then looked at."""
    folder = copy_release(tmp_path / "openvla")
    for head in folder.glob("*.pt"):
        if not heads:
            head.unlink()
    options = [str(folder), "--purpose", "evaluate", "--finetuned-on-discrete-actions", "--device", "cpu"]
    assert diagnose(*options) == 0
    assert f"`evaluate` would act by {instead}; pass --action-mode tokens to it" in capsys.readouterr().out
    modes = [_acting(EvaluateConfig(str(folder), action_mode=mode), str(folder)).mode for mode in ("auto", "tokens")]
    assert modes == ["l1" if heads else "autoregressive", "tokens"]
    assert diagnose(BUNDLED, *options[1:]) == 0
    assert "ok       mode: its action tokens were trained" in capsys.readouterr().out


def test_train_must_be_told_of_another_format_of_the_state_and_evaluate_need_not(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "quaternion")
    config = json.loads((folder / "config.json").read_text())
    noted = {"proprio_format": "quaternion", "trained_for": "tokens"}
    (folder / "config.json").write_text(json.dumps(config | {"torchrl_vla": noted}))
    assert diagnose(str(folder), "--device", "cpu") == 0
    assert "note     proprio_format: it was trained with the robot's state as quaternion" in capsys.readouterr().out
    assert diagnose(str(folder), "--device", "cpu", "--purpose", "evaluate") == 0
    assert "proprio_format" not in capsys.readouterr().out


def test_base_openvla_can_be_evaluated_and_must_be_fine_tuned_for_rl(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "base")
    for head in folder.glob("*.pt"):
        head.unlink()
    options = ["--task-suite", "libero_spatial", "--device", "cpu"]
    assert diagnose(str(folder), *options) == 1
    assert "problem  mode: its action tokens were trained one after the other" in capsys.readouterr().out
    assert diagnose(str(folder), *options, "--purpose", "evaluate") == 0
    assert "it acts by its tokens, one after the other, one control step at a time" in capsys.readouterr().out


def test_too_few_cameras_are_a_problem(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As loading says; a release notes no number, so that doctor can only say what such releases have."""
    folder = copy_release(tmp_path / "l1")
    options = [str(folder), "--purpose", "evaluate", "--device", "cpu"]
    assert diagnose(*options) == 0
    assert "note     cameras: it does not say how many" in capsys.readouterr().out
    assert diagnose(*options, "--num-images-in-input", "2") == 0
    assert "ok       cameras: 2" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torchrl_vla": {"num_images": 2}}))
    assert diagnose(*options) == 1
    assert "problem  cameras: num_images_in_input is 1, but" in (table := capsys.readouterr().out)
    assert "use --num-images-in-input 2" in table
    assert diagnose(*options, "--num-images-in-input", "2") == 0
    (folder / "config.json").write_text(json.dumps(config | {"torchrl_vla": {"trained_for": "l1"}}))
    capsys.readouterr()
    assert diagnose(*options) == 0
    assert "ok       cameras: 1" in capsys.readouterr().out


def test_statistics_without_a_suite_must_be_liberos(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "l1")
    path = folder / "dataset_statistics.json"
    entry = json.loads(path.read_text())["libero_spatial_no_noops"]

    def check(statistics: dict[str, object]) -> tuple[int, str]:
        path.write_text(json.dumps(statistics))
        code = diagnose(str(folder), "--finetuned-on-discrete-actions", "--device", "cpu")
        return code, next(line for line in capsys.readouterr().out.splitlines() if " statistics: " in line)

    assert check({"libero_goal": entry, "libero_spatial_no_noops": entry}) == (
        0, "ok       statistics: it has those of libero_spatial, libero_goal"
    )  # fmt: skip
    assert check({"libero_goal": entry}) == (
        0,
        "note     statistics: it has those of libero_goal, not of libero_spatial, the default: pass --task-suite "
        "libero_goal",
    )
    # config.json's are not looked at where there is a file: loading does not either.
    config = json.loads((folder / "config.json").read_text())
    config["norm_stats"]["libero_spatial"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    code, line = check({"bridge_orig": entry})
    assert code == 1 and line.startswith("problem  statistics: there are none of LIBERO's, only bridge_orig")
    assert "moojink/openvla-7b-oft-finetuned-libero-*" in line and "--local-dir FOLDER" in line
    code, line = check({"libero_spatial": {"action": entry["action"]}})
    assert code == 1 and "the policy reads the robot's state, but they have no 'proprio'" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "lacks model-00002-of-00003.safetensors"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (
            lambda f: edit(f, "text_config", {"rope_theta": 1e6}),
            "text_config.rope_theta is 1000000.0, but only 10000.0",
        ),
        (lambda f: edit(f, "torchrl_vla", {"chunk_size": 1000}), "chunk_size 1000 gives 7000 action tokens"),
        (
            lambda f: [edit(f, "torchrl_vla", {"use_proprio": True}), next(f.glob("proprio_*")).unlink()],
            "lacks proprio_projector--N_checkpoint.pt, and config.json notes",
        ),
        (lambda f: (f / "action_head--150000_checkpoint.pt").write_bytes(b"no"), "truncated or no PyTorch file|code"),
    ],
    ids=["shard", "config", "json", "rope", "chunk", "projector", "head"],
)
def test_what_cannot_be_read_has_its_own_code(change, message, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(DATA, folder, copy_function=shutil.copyfile)
    change(folder)
    assert diagnose(str(folder), "--device", "cpu") == 2
    assert any(part in capsys.readouterr().err for part in message.split("|"))


def edit(folder: Path, part: str, changes: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part] = config.get(part, {}) | changes
    (folder / "config.json").write_text(json.dumps(config))


def spoil_weights(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    tensors["projector.fc1.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_statistics(folder: Path) -> None:
    path = folder / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    action = statistics["libero_spatial_no_noops"]["action"]
    action["q01"], action["q99"] = action["q99"], action["q01"]
    path.write_text(json.dumps(statistics))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_weights, "problem  weights: projector.fc1.bias in .* has 1 of 176 numbers that are NaN or infinite"),
        (spoil_statistics, "problem  statistics: .*must be finite, and 'q01' not above 'q99'"),
    ],
)
def test_what_acts_by_nothing_cannot_seed_rl(
    spoil: Callable[[Path], None],
    problem: str,
    copy_release: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    options = ["--finetuned-on-discrete-actions", "--task-suite", "libero_spatial", "--device", "cpu"]
    folder, found = copy_release(tmp_path / "l1"), tmp_path / "found.json"
    assert diagnose(str(folder), *options) == 0
    assert "can seed RL   yes" in capsys.readouterr().out
    spoil(folder)
    assert diagnose(str(folder), *options, "--json", str(found)) == 1
    table = capsys.readouterr().out
    assert "can seed RL   no" in table and re.search(problem, table)
    assert json.loads(found.read_text())["can_seed_rl"] is False


def test_a_projector_that_may_be_missing_is_noted(
    copy_release: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = copy_release(tmp_path / "l1")
    options = [str(folder), "--purpose", "evaluate", "--task-suite", "libero_spatial", "--device", "cpu"]
    assert diagnose(*options) == 0
    assert " proprio: " not in capsys.readouterr().out
    next(folder.glob("proprio_projector*")).unlink()
    assert diagnose(*options) == 0
    assert "note     proprio: it has an L1 head and statistics of the robot's state, and no" in capsys.readouterr().out


def test_a_7b_model_without_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrl_vla.checkpoints.memory_estimate import MemoryEstimate

    gib = 2**30
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: 16 * gib if name == "SC_PHYS_PAGES" else 1)
    needs = {"rollout": MemoryEstimate(14 * gib, 0, 0, gib), "training": MemoryEstimate(14 * gib, gib, 2 * gib, gib)}
    check = doctor._check_memory(torch.device("cpu"), needs)
    assert check.status == "problem" and "training needs 18.0 GiB" in check.message and "has 16.0" in check.message
    assert "--batch-size" in check.message and "--load-in-4bit" in check.message
    assert doctor._check_memory(torch.device("cpu"), {"rollout": needs["rollout"]}).status == "ok"
    # `evaluate` has none of train's options.
    check = doctor._check_memory(torch.device("cpu"), {"rollout": needs["training"]})
    assert check.status == "problem" and "--batch-size" not in check.message
    assert "lower --num-envs" in check.message and "export --dtype bfloat16" in check.message


def test_weights_that_learn_are_counted_in_float32(
    copy_release: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that is no CPU, where weights that stay as they are have the checkpoint's bfloat16."""
    monkeypatch.setattr("torchrl_vla.training.devices.choose_device", lambda name: torch.device("meta"))
    folder, out = copy_release(tmp_path / "l1"), tmp_path / "found.json"
    options = ["--finetuned-on-discrete-actions", "--no-use-lora", "--json", str(out)]
    counted = {}
    for name, option in {"frozen": ["--freeze-vla-backbone"], "learn": [], "act": ["--purpose", "evaluate"]}.items():
        diagnose(str(folder), *options, *option)
        counted[name] = json.loads(out.read_text())["memory"]["rollout"]["weights"]
    assert counted["learn"] == 2 * counted["frozen"] == 2 * counted["act"] > 0


def test_wrong_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "3.4.0" if name == "mujoco" else version(name)
    )
    check = doctor._check_versions()
    assert check.status == "problem" and "mujoco is 3.4.0, wanted is ==3.3.2" in check.message


def test_versions_are_not_checked_where_the_package_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As from a source tree on PYTHONPATH."""
    distribution = importlib.metadata.distribution

    def without_this_package(name: str) -> importlib.metadata.Distribution:
        if name == "torchrl-vla":
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr("importlib.metadata.distribution", without_this_package)
    assert diagnose(BUNDLED, "--device", "cpu") == 0
    assert "note     versions: not checked: torchrl-vla is not installed as a package" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_4bit_without_cuda_is_a_problem(capsys: pytest.CaptureFixture) -> None:
    assert diagnose(BUNDLED, "--device", "cpu", "--load-in-4bit") == 1
    assert "problem  4-bit: load_in_4bit needs a CUDA device" in capsys.readouterr().out


def test_bad_options(capsys: pytest.CaptureFixture) -> None:
    assert diagnose(BUNDLED, "--batch-size", "0") == 2
    assert "batch_size must be at least 1" in capsys.readouterr().err
    assert diagnose(BUNDLED, "--purpose", "evaluate", "--load-in-4bit") == 2
    assert "load_in_4bit is for --purpose train" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("name", ["./nothing", "owner/name"])
@pytest.mark.parametrize("error", [HTTPError, ConnectionResetError])
def test_a_checkpoint_that_cannot_be_had_has_its_own_code(
    name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def break_off(*_: object, **__: object) -> None:
        raise error("peer closed the connection")

    monkeypatch.setattr("torchrl_vla.checkpoints.locations.snapshot_download", break_off)
    assert diagnose(name, "--device", "cpu") == 2
    assert "hf download OWNER/NAME --local-dir FOLDER" in capsys.readouterr().err


def test_a_runs_folder_stands_for_its_policy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_openvla(OpenVLA(OpenVLAConfig.tiny()), tmp_path / "policy")
    assert diagnose(str(tmp_path), "--device", "cpu") == 1
    assert f"checkpoint    {tmp_path / 'policy'}" in capsys.readouterr().out


def test_findings_that_cannot_be_written_are_told_before_the_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for place in (str(tmp_path), "/proc/nothing", "/dev/null/findings.json", ""):
        assert diagnose(BUNDLED, "--json", place) == 2
        output = capsys.readouterr()
        assert "--json" in output.err and not output.out
