from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_openvla import random_model, small_config
from torch import Tensor

from torchrl_vla.checkpoints.locations import resolve_checkpoint
from torchrl_vla.checkpoints.openvla_format import load_openvla, save_openvla
from torchrl_vla.modules.openvla import OpenVLA, OpenVLAConfig

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00003.safetensors"
HEAD = "action_head--150000_checkpoint.pt"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint", copy_function=shutil.copyfile))


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards and heads."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for path in folder.glob("*.pt"):
        tensors |= {f"{path.name}:{name}": value for name, value in torch.load(path, weights_only=True).items()}
    return tensors


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_no_bit_is_lost_as_stored(checkpoint: Path, tmp_path: Path) -> None:
    """The projector's float32 included, which a bfloat16 model rounds."""
    model = load_openvla(checkpoint, dtype="stored")
    assert model.dtype == torch.bfloat16
    save_openvla(model, tmp_path)
    assert_identical(weights(tmp_path), weights(checkpoint))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_and_export_give_the_same_files(checkpoint: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Names, dtypes and bits, the tensors that no forward reads included; loaded in float32 or as stored."""
    model = load_openvla(checkpoint, dtype=dtype)
    assert model.dtype == (dtype or torch.float32) and not model.training
    save_openvla(model, tmp_path)
    found, expected = weights(tmp_path), weights(checkpoint)
    if dtype == torch.bfloat16:  # upstream keeps this projector in float32, and a bfloat16 model rounds it
        expected = {k: v.bfloat16().to(v.dtype) if k.startswith("proprio") else v for k, v in expected.items()}
    assert_identical(found, expected)
    again = load_openvla(tmp_path, dtype=dtype)
    assert_identical(again.state_dict(), model.state_dict())
    for name in ("config.json", "generation_config.json", "dataset_statistics.json", "vit_overrides.json"):
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (tmp_path, checkpoint))
        mine.pop("torchrl_vla", None)  # notes of ours
        assert {key: theirs[key] for key in mine if key in theirs} == mine


def test_shards_are_bounded_indexed_and_replaced(checkpoint: Path, tmp_path: Path) -> None:
    model = load_openvla(checkpoint)
    save_openvla(model, tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2_262_744  # as upstream's own index says
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for file in files:
        tensors = load_file(tmp_path / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(tensors)
        assert (tmp_path / file).stat().st_mode == (tmp_path / "config.json").stat().st_mode
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    assert_identical(load_openvla(tmp_path).state_dict(), model.state_dict())
    save_openvla(model, tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_model_is_replaced_whole(copied: Path) -> None:
    (copied / "vision_backbone--150000_checkpoint.pt").touch()
    (copied / "notes.txt").write_text("mine")
    (copied / "lora_adapter").mkdir()
    (copied / "lora_adapter" / "adapter_config.json").write_text("{}")
    before = files_of(copied)
    model = random_model(small_config(use_proprio=False))
    save_openvla(model, copied)
    after = files_of(copied)
    own = {"config.json", "generation_config.json", "model.safetensors", "vit_overrides.json"}
    gone = {name for name in before if name.endswith(".pt") or name.startswith("model")} | {"dataset_statistics.json"}
    assert set(after) == set(before) - gone | own
    assert all(after[name] == before[name] for name in set(after) - own)
    assert_identical(load_openvla(copied).state_dict(), model.state_dict())


def test_a_checkpoint_stays_if_another_cannot_be_written(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    before = files_of(copied)
    monkeypatch.setattr(torch, "save", full)  # the heads come last
    with pytest.raises(OSError, match="no space left"):
        save_openvla(random_model(small_config()), copied)
    assert files_of(copied) == before


@pytest.mark.parametrize(
    "said", [{"torch_dtype": "bfloat16"}, {"torch_dtype": None, "dtype": "bfloat16"}, {"torch_dtype": None}]
)
def test_stored_is_what_the_shards_say(tmp_path: Path, said: dict[str, str | None]) -> None:
    """Not config.json, which conversions leave as it was."""
    model = random_model(small_config())
    save_openvla(model, tmp_path, dtype=torch.float32)
    before = weights(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text()) | said
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    again = load_openvla(tmp_path, dtype="stored")
    assert_identical(again.state_dict(), model.state_dict())
    save_openvla(again, tmp_path)
    assert_identical(weights(tmp_path), before)
    assert "dtype" not in json.loads(path.read_text())


def test_a_model_of_ours_goes_out_and_in(tmp_path: Path) -> None:
    """One format for both: tiny models are written as upstream's, never-run tensors as zeros."""
    model = random_model(small_config(num_images=2), use_l1_head=True)
    save_openvla(model, tmp_path)
    again = load_openvla(tmp_path)
    assert_identical(again.state_dict(), model.state_dict())
    assert again.config.num_images == 2 and again.config.chunk_size == 2 and again.config.use_proprio
    stored = weights(tmp_path)
    assert stored["vision_backbone.fused_featurizer.attn_pool.latent"].shape == (1, 1, 20)
    assert not stored["vision_backbone.featurizer.blocks.2.mlp.fc1.weight"].any()


def test_loaded_weights_do_not_change_with_the_file(copied: Path) -> None:
    model = load_openvla(copied, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path in copied.glob("*.safetensors"):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.seek(size // 2)
            file.write(b"\xff" * (size // 4))
    assert_identical(model.state_dict(), before)


def test_heads_are_loaded_where_wanted(checkpoint: Path, copied: Path) -> None:
    assert load_openvla(checkpoint, load_l1_action_head=False).action_head is None
    assert load_openvla(checkpoint).action_head is not None
    (copied / "action_head--150000_checkpoint.pt").unlink()
    (copied / "proprio_projector--150000_checkpoint.pt").unlink()
    model = load_openvla(copied)
    assert model.action_head is None and model.proprio_projector is None and not model.config.use_proprio
    with pytest.raises(ValueError, match="has no action_head--N_checkpoint.pt"):
        load_openvla(copied, load_l1_action_head=True)


def test_the_latest_head_is_taken_and_said(copied: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    state = torch.load(copied / "action_head--150000_checkpoint.pt", weights_only=True)
    state["module.model.fc2.bias"] += 1
    torch.save(state, copied / "action_head--50000_checkpoint.pt")
    model = load_openvla(copied)
    assert "action_head--150000_checkpoint.pt is loaded" in caplog.text
    save_openvla(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("action_head*")] == ["action_head--150000_checkpoint.pt"]


def _peak_of_loading(small: Path, folder: Path, pipe: Connection) -> None:
    """Runs in a process of its own: bytes that were in memory at most, above those before and the weights."""

    def memory(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024

    torch.set_num_threads(1)  # a forked process has none of OpenMP's other threads, and would wait for them for ever
    load_openvla(small)  # brings the code of the libraries into this process
    before = memory("VmRSS")
    model = load_openvla(folder, dtype="stored")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pipe.send((weights, memory("VmHWM") - before - weights))


@pytest.mark.processes
def test_no_more_than_one_shard_is_in_memory_beside_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = OpenVLA(
            OpenVLAConfig.tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, torch_dtype="bfloat16")
        )
    model.to(torch.bfloat16).to_empty(device="cpu").initialize()
    save_openvla(model, tmp_path, max_shard_bytes=20_000_000)
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    ours, theirs = Pipe(duplex=False)
    # Forked, so that nothing is imported anew and the peak is the child's own.
    child = get_context("fork").Process(target=_peak_of_loading, args=(checkpoint, tmp_path, theirs))
    child.start()
    theirs.close()
    weights, above = ours.recv()
    child.join()
    assert weights > 3 * shard, (weights, shard)
    assert above < 1.2 * shard, above / shard


def test_kernel_and_dtype_are_passed_on(checkpoint: Path) -> None:
    model = load_openvla(checkpoint, attn_implementation="eager", dtype=torch.float64, device="cpu")
    assert model.language_model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in model.parameters())


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop_from_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["projector.fc1.bias"]
    path.write_text(json.dumps(index))


def add_to_index(folder: Path) -> None:
    rewrite(folder / "model-00001-of-00003.safetensors", lambda t: t.update({"robot.arm": torch.zeros(1)}))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["robot.arm"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def save_head(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "action_head--150000_checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_index(folder: Path, change: Callable[[dict], dict]) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": change(index["weight_map"])}))


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class Payload:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names",
    ),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), "it holds no weights"),
    "truncated shard": (
        lambda f: os.truncate(f / "model-00003-of-00003.safetensors", 5000),
        "model-00003-of-00003.safetensors is truncated or no safetensors file",
    ),
    "wrong shape": (
        lambda f: rewrite(
            f / "model-00001-of-00003.safetensors", lambda t: t.update({"projector.fc1.bias": torch.zeros(175)})
        ),
        r"projector.fc1.bias is \[175\] in the checkpoint, but its config.json makes it \[176\]",
    ),
    "tensor gone from shard": (
        lambda f: rewrite(f / "model-00001-of-00003.safetensors", lambda t: t.pop("projector.fc1.bias")),  # type: ignore[arg-type,return-value]
        "lacks projector.fc1.bias, which model.safetensors.index.json says it has",
    ),
    "tensor gone": (drop_from_index, "the checkpoint lacks projector.fc1.bias"),
    "foreign tensor": (add_to_index, "the checkpoint has robot.arm, which an OpenVLA has no place for"),
    "code in a head": (lambda f: torch.save(Payload(), f / "action_head--150000_checkpoint.pt"), "could run code"),
    "truncated head": (
        lambda f: os.truncate(f / "action_head--150000_checkpoint.pt", 3000),
        "action_head--150000_checkpoint.pt is truncated or no PyTorch file",
    ),
    "head of another width": (
        lambda f: save_head(f, lambda s: s.update({"module.model.fc2.bias": torch.zeros(8)})),
        r"model.fc2.bias is \[8\] in .*, but this model makes it \[7\]",
    ),
    "head lacks a tensor": (lambda f: save_head(f, lambda s: s.pop("module.model.fc2.bias")), "lacks model.fc2.bias"),
    "head is a list": (
        lambda f: torch.save([torch.zeros(1)], f / "action_head--150000_checkpoint.pt"),
        "action_head--150000_checkpoint.pt is no state dict of tensors",
    ),
    "pointer in place of a shard": (
        lambda f: (f / "model-00001-of-00003.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model-00001-of-00003.safetensors is truncated or no safetensors file",
    ),
    "index that leads out of the folder": (
        lambda f: edit_index(f, lambda m: dict.fromkeys(m, "../outside.safetensors")),
        "is in '../outside.safetensors'; only names of files beside the index are read",
    ),
    "index with an absolute path": (
        lambda f: edit_index(f, lambda m: dict.fromkeys(m, "/etc/hostname")),
        "is in '/etc/hostname'; only names of files beside the index are read",
    ),
    "index of numbers": (lambda f: edit_index(f, lambda m: dict.fromkeys(m, 3)), "is in 3; only names of files"),
    "index that is a folder": (
        lambda f: [(f / INDEX).unlink(), (f / INDEX).mkdir()],
        "model.safetensors.index.json cannot be read .Is a directory",
    ),
    "shard that is a folder": (
        lambda f: [(f / SHARD).unlink(), (f / SHARD).mkdir()],
        "model-00001-of-00003.safetensors is truncated or no safetensors file",
    ),
    "head that is a folder": (
        lambda f: [(f / HEAD).unlink(), (f / HEAD).mkdir()],
        "action_head--150000_checkpoint.pt is truncated or no PyTorch file",
    ),
    "8-bit weights": (
        lambda f: rewrite(f / SHARD, lambda t: t.update({"projector.fc1.bias": torch.zeros(176, dtype=torch.int8)})),
        "projector.fc1.bias in .* is stored as I8; weights must be F32, BF16, F16",
    ),
    "complex weights": (
        lambda f: rewrite(
            f / SHARD, lambda t: t.update({"projector.fc1.bias": torch.zeros(176, dtype=torch.complex64)})
        ),
        "projector.fc1.bias in .* is stored as C64",
    ),
    "NaN": (
        lambda f: rewrite(f / SHARD, lambda t: t["projector.fc1.bias"].view(-1)[3:5].fill_(float("nan"))),  # type: ignore[arg-type,return-value]
        "projector.fc1.bias in .*model-00001-of-00003.safetensors has 2 of 176 numbers that are NaN or infinite",
    ),
    "infinity": (
        lambda f: rewrite(f / SHARD, lambda t: t["projector.fc1.bias"].view(-1)[0].fill_(float("-inf"))),  # type: ignore[arg-type,return-value]
        "projector.fc1.bias in .* has 1 of 176 numbers that are NaN or infinite",
    ),
    "head with NaN": (
        lambda f: save_head(f, lambda s: s["module.model.fc2.bias"].fill_(float("nan"))),
        "model.fc2.bias in .*action_head--150000_checkpoint.pt has 7 of 7 numbers",
    ),
    "head of whole numbers": (
        lambda f: save_head(f, lambda s: s.update({"module.model.fc2.bias": torch.zeros(7, dtype=torch.int64)})),
        "model.fc2.bias in .* is stored as torch.int64",
    ),
    "index of another kind": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        "has no weight_map, so it is no index of shards",
    ),
    "damaged index": (
        lambda f: (f / "model.safetensors.index.json").write_bytes(b"\xff\xfe"),
        "model.safetensors.index.json is not valid JSON",
    ),
    "a list for a configuration": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json holds a JSON list where an object is expected",
    ),
    "a text for a number": (
        lambda f: edit_config(f, pad_to_multiple_of="64"),
        "config.json has a value that this version cannot read .pad_to_multiple_of must be a whole number, got '64'",
    ),
    "another version's configuration": (
        lambda f: edit_config(f, torchrl_vla={"wings": 2}),
        "config.json has a value that this version cannot read .*wings",
    ),
    "text_config of another kind": (lambda f: edit_config(f, text_config="llama"), "text_config must be an object"),
    "damaged statistics": (
        lambda f: (f / "dataset_statistics.json").write_text("{"),
        "dataset_statistics.json is not valid JSON",
    ),
    "FiLM": (
        lambda f: torch.save({}, f / "vision_backbone--150000_checkpoint.pt"),
        "vision_backbone--150000_checkpoint.pt says that this checkpoint was trained with FiLM, which this package",
    ),
    "diffusion": (
        lambda f: torch.save({}, f / "noisy_action_projector--150000_checkpoint.pt"),
        "noisy_action_projector--150000_checkpoint.pt says that this checkpoint was trained with a diffusion head",
    ),
    "head has another": (
        lambda f: save_head(f, lambda s: s.update({"module.extra": torch.zeros(1)})),
        "has extra, which this head has no place for",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_checkpoints_are_refused(copied: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    spoil(copied)
    with pytest.raises(ValueError, match=message):
        load_openvla(copied)
    assert not Path("pwned").exists()


def test_weights_that_another_dtype_cannot_hold_are_refused(copied: Path) -> None:
    """They would be infinite."""
    rewrite(copied / SHARD, lambda t: t["projector.fc1.bias"].view(-1)[0].fill_(1e6))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="projector.fc1.bias in .* has 1 of 176 numbers .* infinite in torch.float16"):
        load_openvla(copied, dtype=torch.float16)
    load_openvla(copied, dtype=torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_4bit_without_cuda_is_refused(checkpoint: Path, device: str) -> None:
    with pytest.raises(ValueError, match="load_in_4bit needs a CUDA device, .*leave load_in_4bit out"):
        load_openvla(checkpoint, load_in_4bit=True, device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nowhere"}, "device 'nowhere' is unknown: use cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not on this machine, which has . GPUs: use device='cpu'"),
        ({"dtype": "float16"}, "dtype must be torch.float32, .* got 'float16'"),
        ({"dtype": torch.int8}, "dtype must be torch.float32, .* got torch.int8"),
        ({"attn_implementation": "fast"}, "attn_implementation must be one of .* got 'fast'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_had_are_refused(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_openvla(checkpoint, **options)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "nothing"])
def test_missing_folders_are_refused(name: str) -> None:
    message = f"there is no checkpoint folder '{name}'.*local-dir.*SFT-libero-spatial.*bundled:tiny"
    with pytest.raises(ValueError, match=message):
        resolve_checkpoint(name)


def test_a_hub_id_without_network_says_how_to_go_on() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing-here' is no folder here, .*name that folder"):
        resolve_checkpoint("nobody/nothing-here", local_files_only=True)


def test_a_hub_that_cannot_be_reached_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be had .*hf download OWNER/NAME --local-dir"):
        resolve_checkpoint("nobody/nothing-here")


@pytest.mark.parametrize("error", [HTTPError("peer closed connection"), RuntimeError("Data processing error")])
def test_a_network_lost_on_the_way_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("torchrl_vla.checkpoints.locations.snapshot_download", download)
    with pytest.raises(ValueError, match=f"cannot be had .*{error}.*hf download OWNER/NAME --local-dir"):
        resolve_checkpoint("nobody/nothing-here")


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("owner/name", local_files_only=True) == Path("owner/name")
    with pytest.raises(ValueError, match="cannot be had"):
        resolve_checkpoint("owner/name", local_files_only=True, use_local=False)
