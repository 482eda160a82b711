"""The cache of compiled models: found again, damaged, written by two at once, not writable."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path

import mujoco
import numpy as np
import pytest

from torchrl_vla.envs.simulation import model_cache, scene_builder
from torchrl_vla.envs.simulation.model_cache import cache_folder, keep_file, load_scene, read_states, write_states
from torchrl_vla.envs.tasks import get_suite

pytestmark = pytest.mark.simulator

TASK = get_suite("libero_object").task(0)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes, started together, have built the same scene."""
    folder = tmp_path_factory.mktemp("cache")
    program = (
        "from pathlib import Path\n"
        "from torchrl_vla.envs.simulation.model_cache import load_scene\n"
        f"print(load_scene(Path({str(TASK.bddl_file)!r}), 0)[0].model_key)\n"
    )
    environment = {**os.environ, "TORCHRL_VLA_CACHE": str(folder)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    keys = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(keys) == 1
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same files under names of their own."""
    for path in filled.rglob("*.*"):
        copy = tmp_path / path.relative_to(filled)
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, copy)
    monkeypatch.setenv("TORCHRL_VLA_CACHE", str(tmp_path))
    forget()
    return tmp_path


def forget() -> None:
    gc.collect()
    model_cache._models.clear()


def counted_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    builds: list[Path] = []
    original = scene_builder.build_scene

    def build(bddl_file: Path, *arguments: object) -> object:
        builds.append(bddl_file)
        return original(bddl_file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scene_builder, "build_scene", build)
    return builds


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_two_writers_leave_one_whole_model_and_scene(filled: Path) -> None:
    assert len(names(filled, "models/*")) == 1 and names(filled, "models/*")[0].endswith(".mjb")
    assert len(names(filled, "scenes/*.npz")) == 1 and not names(filled, "scenes/*.tmp")


def test_what_was_kept_equals_what_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = counted_builds(monkeypatch)
    kept, compiled = load_scene(TASK.bddl_file, 0)
    assert not builds
    built, model = scene_builder.build_scene(TASK.bddl_file, 0, model_cache.compile_model)
    model_cache.compile_model.cache_clear()
    assert kept.goal == built.goal and kept.goal[0].kind == "in_site"
    assert (kept.model_key, kept.eef_body, kept.gripper_qpos) == (built.model_key, built.eef_body, built.gripper_qpos)
    assert kept.object_bodies == built.object_bodies and "alphabet_soup_1" in kept.object_bodies
    assert kept.arrays.keys() == built.arrays.keys()
    for name, array in kept.arrays.items():
        assert array.dtype == built.arrays[name].dtype and np.array_equal(array, built.arrays[name]), name
    assert np.array_equal(compiled.model.geom_pos, model.geom_pos)


def test_one_model_in_memory_while_somebody_uses_it(folder: Path) -> None:
    _, first = load_scene(TASK.bddl_file, 0)
    _, second = load_scene(TASK.bddl_file, 0)
    assert first is second


@pytest.mark.parametrize("damage", ["scene", "truncated model", "changed model"])
def test_damaged_files_are_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = next(folder.glob("scenes/*.npz" if damage == "scene" else "models/*.mjb"))
    content = bytearray(path.read_bytes())
    if damage == "changed model":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    path.unlink()
    path.write_bytes(content)
    builds = counted_builds(monkeypatch)
    with pytest.warns(UserWarning, match=f"{path.name} is damaged and will be built again"):
        scene, _ = load_scene(TASK.bddl_file, 0)
    assert builds == [TASK.bddl_file] and scene.goal
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_scene(TASK.bddl_file, 0)
    assert len(builds) == 1


def test_a_changed_task_or_seed_is_another_scene(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = counted_builds(monkeypatch)
    changed = tmp_path / "changed.bddl"
    changed.write_text(TASK.bddl_file.read_text() + "\n")
    load_scene(TASK.bddl_file, 1)
    load_scene(changed, 0)
    assert builds == [TASK.bddl_file, changed]
    assert len(names(folder, "scenes/*.npz")) == 3 and len(names(folder, "models/*.mjb")) == 1


def test_a_folder_that_cannot_be_written_works_and_warns_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHRL_VLA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="cannot be kept in .*file/cache.*Set TORCHRL_VLA_CACHE") as caught:
        scene, compiled = load_scene(TASK.bddl_file, 0)
        forget()
        load_scene(TASK.bddl_file, 1)
    assert len([warning for warning in caught if "cannot be kept" in str(warning.message)]) == 1
    assert isinstance(compiled.model, mujoco.MjModel) and scene.goal


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHRL_VLA_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("TORCHRL_VLA_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "torchrl-vla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "torchrl-vla"


def test_other_code_that_makes_scenes_makes_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"scene_builder.py", "sampled_states.py"} <= set(model_cache._MAKERS)
    source = tmp_path / "builder.py"
    monkeypatch.setattr(model_cache, "_MAKERS", (str(source),))
    keys = []
    for text in ("gain = 1", "gain = 2", "gain = 1"):
        source.write_text(text)
        keys.append(model_cache.environment_key.__wrapped__())
    assert keys[0] == keys[2] != keys[1]


def test_what_may_not_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that somebody else filled: his files are whole, and are not to be built again in their place."""
    path = tmp_path / "states.npz"
    write_states(path, np.zeros(3))
    monkeypatch.setattr(model_cache, "_warned", set())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_cache.np, "load", refuse)
    with pytest.warns(UserWarning, match="cannot be kept in .* or read there .*Permission denied"):
        assert read_states(path) is None
    assert path.is_file()


def test_others_may_read_what_is_kept(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        keep_file(tmp_path, lambda path: path.write_bytes(b"x"), lambda _: "kept")
    finally:
        os.umask(umask)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o644
