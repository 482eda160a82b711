from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_openvla import random_model, small_config

from torchrl_vla.checkpoints.folder import open_checkpoint
from torchrl_vla.checkpoints.inspection import inspect_checkpoint, require_trained_tokens, trained_mode
from torchrl_vla.checkpoints.openvla_format import save_openvla


def write(folder: Path, *, head: bool = False, proprio: bool = False, noted: str | None = None) -> Path:
    save_openvla(random_model(small_config(use_proprio=proprio, trained_for=noted), use_l1_head=head), folder)
    return folder


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"head": True, "proprio": True}, "l1"),
        ({"head": True, "noted": "tokens"}, "hybrid"),
        ({"head": True, "noted": "l1"}, "l1"),
        ({"proprio": True}, "tokens"),
        ({"noted": "tokens"}, "tokens"),
        ({}, "autoregressive"),
    ],
)
def test_mode(tmp_path: Path, options: dict, mode: str) -> None:
    folder = write(tmp_path / "policy", **options)
    assert trained_mode(open_checkpoint(folder)).name == mode
    believed = trained_mode(open_checkpoint(folder), finetuned_on_discrete_actions=True).name
    assert believed == ("hybrid" if options.get("head") else "tokens")


def test_upstreams_code_tells_oft_from_base(tmp_path: Path) -> None:
    folder = write(tmp_path / "policy")
    code = folder / "modeling_prismatic.py"
    code.write_text("class OpenVLAForActionPrediction: ...")
    assert (
        trained_mode(open_checkpoint(folder)).name == "autoregressive"
        and "knows no chunks" in trained_mode(open_checkpoint(folder)).reason
    )
    code.write_text("from prismatic.vla.constants import NUM_ACTIONS_CHUNK")
    assert trained_mode(open_checkpoint(folder)).name == "tokens"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("Openvla-oft-SFT-libero-spatial-traj1", "tokens"),
        ("models--Haozhan72--Openvla-oft-SFT-libero10-traj1/snapshots/0a1b", "tokens"),
        ("openvla-7b+libero--parallel_dec--8_acts_chunk", "tokens"),
        ("oft_rl/openvla-7b", "autoregressive"),  # the folder above says nothing
        ("soft-drawer", "autoregressive"),
    ],
)
def test_names_tell_it_where_nothing_else_does(tmp_path: Path, name: str, mode: str) -> None:
    assert trained_mode(open_checkpoint(write(tmp_path / name))).name == mode


def test_l1_checkpoints_are_refused_with_the_reason(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="logits were never trained.*Haozhan72/Openvla-oft-SFT-.*--force it"):
        require_trained_tokens(open_checkpoint(checkpoint), advice="Or --force it.")
    require_trained_tokens(open_checkpoint(checkpoint), finetuned_on_discrete_actions=True, advice="")


def test_summary_of_upstreams_checkpoint(checkpoint: Path) -> None:
    summary = inspect_checkpoint(open_checkpoint(checkpoint))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert (summary.num_tensors, summary.num_shards) == (len(index["weight_map"]), 3)
    assert summary.dtypes == {"BF16": index["metadata"]["total_size"] // 2}
    heads = summary.parameters["action_head"] + summary.parameters["proprio_projector"]
    assert sum(summary.parameters.values()) == summary.dtypes["BF16"] + heads
    assert summary.steps == {"proprio_projector": "150000", "action_head": "150000"} and summary.adapter is None
    assert sorted(summary.checkpoint.config.statistics) == ["libero_spatial_no_noops"]


def test_parts_that_there_are_not_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "policy")
    (folder / "vision_backbone--50000_checkpoint.pt").touch()
    with pytest.raises(ValueError, match="vision_backbone--50000_checkpoint.pt says .* trained with FiLM"):
        inspect_checkpoint(open_checkpoint(folder))


def test_a_merged_adapter_is_told(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile))
    (folder / "lora_adapter").mkdir()
    config = {"r": 32, "lora_alpha": 16, "base_model_name_or_path": "openvla/openvla-7b", "peft_type": "LORA"}
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(open_checkpoint(folder)).adapter == {
        key: config[key] for key in ("r", "lora_alpha", "base_model_name_or_path")
    }
