from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from torchrl_vla.checkpoints.openvla_format import upstream_tensors
from torchrl_vla.checkpoints.policy import load_policy
from torchrl_vla.cli import main
from torchrl_vla.config import OpenVLAActorConfig, TrainConfig
from torchrl_vla.config.finetune import FinetuneConfig
from torchrl_vla.modules import OpenVLA
from torchrl_vla.training.run_checkpoints import RunCheckpoints, TrainableState

pytestmark = pytest.mark.slow

SUITE = "libero_spatial"


@pytest.fixture(scope="module")
def base(copy_release: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release in upstream's format, with an L1 head and files that are none of ours."""
    folder = copy_release(tmp_path_factory.mktemp("release") / "openvla")
    (folder / "modeling_prismatic.py").write_text("NUM_ACTIONS_CHUNK = 8\n")
    (folder / "preprocessor_config.json").write_text('{"theirs": true}')
    return folder


def make_run(folder: Path, base: Path, **actor: object) -> OpenVLA:
    """What `torchrl-vla train` leaves behind: two checkpoints, whose adapters differ. Returns the newer policy."""
    config = TrainConfig(actor=OpenVLAActorConfig(str(base), force=True, lora_rank=4, **actor))  # type: ignore[arg-type]
    policy = load_policy(config.actor, task_suite=SUITE, dtype="stored")
    checkpoints = RunCheckpoints(folder / "checkpoints", keep=2, policy=TrainableState(policy.model))
    torch.manual_seed(1)
    for step in (1, 2):
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        checkpoints.save(step=step, success=0.0)
    config.save(folder / "config.json")
    return policy.model


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenVLA]:
    folder = tmp_path_factory.mktemp("run")
    return folder, make_run(folder, base, load_l1_action_head=True)


def shards(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_checkpoint_goes_out_as_it_came_in(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    main(["export", str(base), str(out)])
    assert f"Policy: {out}" in capsys.readouterr().out
    assert_equal(shards(out), shards(base))
    for head in base.glob("*.pt"):
        assert_equal(*(torch.load(folder / head.name, weights_only=True) for folder in (out, base)))
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_prismatic.py", "preprocessor_config.json",
                 "dataset_statistics.json"):  # fmt: skip
        content = [(folder / name).read_text() for folder in (out, base)]
        assert content[0] == content[1] or json.loads(content[0]) == json.loads(content[1])


def test_a_run_is_exported_with_its_adapters_merged(base: Path, run: tuple[Path, OpenVLA], tmp_path: Path) -> None:
    folder, model = run
    main(["export", str(folder), str(tmp_path / "new")])
    assert_equal(shards(tmp_path / "new"), dict(upstream_tensors(model)))
    oldest = min((folder / "checkpoints").iterdir())
    main(["export", str(oldest), str(tmp_path / "old")])
    before, after = shards(tmp_path / "old"), shards(tmp_path / "new")
    assert set(before) == set(after) == set(shards(base))  # upstream's key set, never-run tensors included
    assert any(not torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["torchrl_vla"] == {
        "use_proprio": True, "proprio_format": "axis_angle", "trained_for": "tokens",
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    assert config["torch_dtype"] == "bfloat16"
    # The data set that it acts by was there already, with more than percentiles, and stays as it was.
    statistics = [json.loads((path / "dataset_statistics.json").read_text()) for path in (tmp_path / "new", base)]
    assert statistics[0] == statistics[1]
    assert (tmp_path / "new" / "preprocessor_config.json").read_text() == '{"theirs": true}'
    assert load_policy(OpenVLAActorConfig(str(tmp_path / "new")), task_suite=SUITE).statistics_key == SUITE


def test_dtypes_of_merge_and_weights(run: tuple[Path, OpenVLA], tmp_path: Path) -> None:
    folder, model = run
    main(["export", str(folder), str(tmp_path / "weights"), "--merge-dtype", "weights"])
    assert_equal(shards(tmp_path / "weights"), dict(upstream_tensors(model, merge_in_float32=False)))
    main(["export", str(folder), str(tmp_path / "float32"), "--dtype", "float32"])
    wide, exact = shards(tmp_path / "float32"), dict(upstream_tensors(copy.deepcopy(model).float()))
    assert_equal(wide, {name: tensor.float() for name, tensor in exact.items()})


class Branch(nn.Module):
    """A module with upstream's names around given weights, that peft can adapt."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        layers = {name.removesuffix(".weight"): t for name, t in tensors.items() if t.ndim in (2, 4)}
        for name, weight in layers.items():
            layer: nn.Module
            if name.endswith("embed_tokens"):
                layer = nn.Embedding(*weight.shape)
            elif weight.ndim == 4:
                layer = nn.Conv2d(3, len(weight), weight.shape[2:], bias=False)
            else:
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            node: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = getattr(node, part)
            node.add_module(leaf, layer)


def test_peft_loads_the_adapter(base: Path, run: tuple[Path, OpenVLA], tmp_path: Path) -> None:
    """peft's own merge of our adapter into upstream's weights is our merge."""
    folder, model = run
    main(["export", str(folder), str(tmp_path / "adapter"), "--adapter-only"])
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and (settings["r"], settings["lora_alpha"]) == (4, 4)
    weights = {name: tensor.float() for name, tensor in shards(base).items()}
    adapted = PeftModel.from_pretrained(Branch(weights), str(tmp_path / "adapter")).merge_and_unload()
    merged = dict(adapted.named_parameters())
    expected = {name: tensor.float() for name, tensor in upstream_tensors(model)}
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.data.bfloat16().float(), expected[name], atol=1e-6, rtol=0.01)
    changed = [name for name in merged if not torch.equal(merged[name], weights[name])]
    assert len(changed) == sum(".lora_A." in name for name, _ in model.named_parameters())


def test_an_adapter_is_merged_into_a_policy(base: Path, run: tuple[Path, OpenVLA], tmp_path: Path) -> None:
    folder, model = run
    adapter = tmp_path / "adapter"
    main(["export", str(folder), str(adapter), "--adapter-only"])
    main(["export", str(base), str(tmp_path / "merged"), "--adapter", str(adapter)])
    assert_equal(shards(tmp_path / "merged"), dict(upstream_tensors(model)))


def test_nothing_is_overwritten_without_being_told(base: Path, run: tuple[Path, OpenVLA], tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["export", str(base), str(out)])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists already: choose another folder, or pass --overwrite"):
        main(["export", str(base), str(out)])
    assert (out / "notes.txt").exists()
    main(["export", str(base), str(out), "--overwrite"])
    assert not (out / "notes.txt").exists() and not list(tmp_path.glob("out.*"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(SystemExit, match="neither a checkpoint nor an adapter, and is not replaced"):
        main(["export", str(base), str(tmp_path / "thesis"), "--overwrite"])
    shutil.copytree(run[0], out / "run")
    with pytest.raises(SystemExit, match="is the folder of a run, or holds one, and is not replaced"):
        main(["export", str(out / "run"), str(out), "--overwrite"])
    assert (out / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize("command", ["train", "finetune"])
@pytest.mark.parametrize("extra", ["nothing", "checkpoints", "adapter"])
def test_a_run_is_never_replaced(command: str, extra: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    out.mkdir(parents=True)
    config = TrainConfig() if command == "train" else FinetuneConfig((tmp_path / "demos",), out)
    config.save(out / "config.json")
    if extra == "checkpoints":
        (out / "checkpoints").mkdir()
    elif extra == "adapter":
        (out / "adapter_config.json").write_text("{}")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(SystemExit, match=f"{out} is .* is not replaced: choose another folder"):
        main(["export", str(base), str(out), "--overwrite"])
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_policy_that_learns_further_in_its_folder_is_not_replaced(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["export", str(base), str(out)])
    (out / "checkpoints").mkdir()
    with pytest.raises(SystemExit, match="is the folder of a run, or holds one, and is not replaced"):
        main(["export", str(base), str(out), "--overwrite"])
    assert (out / "checkpoints").is_dir()


def test_an_adapter_is_replaced(run: tuple[Path, OpenVLA], tmp_path: Path) -> None:
    arguments = ["export", str(run[0]), str(tmp_path / "adapter"), "--adapter-only"]
    main(arguments)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    main([*arguments, "--overwrite"])
    assert not (tmp_path / "adapter" / "notes.txt").exists()


def test_a_failed_export_leaves_the_old_one(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    main(["export", str(base), str(out)])
    before = shards(out)

    def fail(*_: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr("torchrl_vla.checkpoints.exporting.copy_companions", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        main(["export", str(base), str(out), "--overwrite"])
    assert_equal(shards(out), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_explained(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="adapters merged: export the adapters from the run's folder"):
        main(["export", str(base), str(out), "--adapter-only"])
    make_run(tmp_path / "whole", base, use_lora=False)
    with pytest.raises(SystemExit, match="was trained without adapters"):
        main(["export", str(tmp_path / "whole"), str(out), "--adapter-only"])
    with pytest.raises(SystemExit, match="a run has its own adapters"):
        main(["export", str(tmp_path / "whole"), str(out), "--adapter", str(tmp_path)])
    config = TrainConfig.load(tmp_path / "whole" / "config.json")
    config.actor.use_lora = True
    config.save(tmp_path / "whole" / "config.json")
    with pytest.raises(SystemExit, match="does not hold the policy of the run.*trainable parameters are not this"):
        main(["export", str(tmp_path / "whole"), str(out)])
    config.actor.pretrained_checkpoint = "random:tiny"
    config.save(tmp_path / "whole" / "config.json")
    with pytest.raises(SystemExit, match="random weights, which differ between devices.*its policy as a whole is in"):
        main(["export", str(tmp_path / "whole"), str(out)])
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    with pytest.raises(SystemExit, match="the run in .* has no checkpoint: it ended before its first one"):
        main(["export", str(tmp_path / "whole"), str(out)])
    assert not out.exists()
