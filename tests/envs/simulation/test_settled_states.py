"""Settled states that are kept on disk: the same bits, found by all, rebuilt when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import random_actions

from torchrl_vla.envs.simulation import model_cache, settled_states
from torchrl_vla.envs.simulation.model_cache import cache_folder
from torchrl_vla.envs.simulation.simulator import LiberoSimulator

pytestmark = pytest.mark.simulator

ACTIONS = random_actions(3, 5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds models and scenes, but no starts."""
    for name in ("models", "scenes", "init_states"):
        (cache_folder() / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(cache_folder() / name)
    monkeypatch.setenv("TORCHRL_VLA_CACHE", str(tmp_path))
    return tmp_path / "starts"


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts control steps."""
    done = {"steps": 0}
    step = LiberoSimulator.step

    def counted_step(self: LiberoSimulator, slot: int, actions: np.ndarray) -> tuple[int, bool]:
        done["steps"] += len(actions)
        return step(self, slot, actions)

    monkeypatch.setattr(LiberoSimulator, "step", counted_step)
    return done


@pytest.fixture(scope="module")
def simulators() -> Iterator[dict[str, LiberoSimulator]]:
    made = {name: LiberoSimulator("libero_spatial", image_size=32, fidelity=name) for name in ("exact", "fast")}
    yield made
    for simulator in made.values():
        simulator.close()


def play(simulator: LiberoSimulator) -> list[dict[str, np.ndarray]]:
    """What a simulator without memories shows at a start, and twice after it."""
    simulator._settled.clear()
    simulator.reset(0, 0, 1)
    seen = []
    for actions in (ACTIONS[:0], ACTIONS[:2], ACTIONS[2:]):
        if len(actions):
            simulator.step(0, actions)
        data = simulator.data(0)
        arrays = {name: getattr(data, name).copy() for name in ("qpos", "qvel", "geom_xpos", "site_xmat")}
        arrays |= {"picture": simulator.render(0, "agentview"), "time": np.array(data.time), **simulator.low_dim(0)}
        seen.append(arrays)
    return seen


def assert_equal(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(first, second, strict=True):
        for name, array in one.items():
            assert np.array_equal(array, other[name]), name


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npz"))


@pytest.mark.parametrize("fidelity", ["exact", "fast"])
def test_a_kept_start_does_not_settle_and_goes_on_to_the_same_bits(
    folder: Path, work: dict[str, int], simulators: dict[str, LiberoSimulator], fidelity: str
) -> None:
    first = play(simulators[fidelity])
    assert work == {"steps": 13} and len(files(folder)) == 1
    second = play(simulators[fidelity])
    assert work == {"steps": 16}
    assert_equal(first, second)


def test_another_process_starts_from_it(folder: Path, simulators: dict[str, LiberoSimulator]) -> None:
    program = (
        "import sys, numpy as np\n"
        "from torchrl_vla.envs.simulation.simulator import LiberoSimulator\n"
        "simulator = LiberoSimulator('libero_spatial', image_size=32, fidelity='fast', num_slots=2)\n"
        "simulator.reset(1, 0, 1)\n"
        "picture = simulator.render(1, 'agentview')\n"
        "simulator.step(1, np.load(sys.argv[1]))\n"
        "np.savez(sys.argv[2], picture=picture, qpos=simulator.data(1).qpos, last=simulator.render(1, 'agentview'))\n"
    )
    expected = play(simulators["fast"])
    before = {path: path.stat().st_mtime_ns for path in files(folder)}
    np.save(folder.parent / "actions.npy", ACTIONS)
    arguments = [folder.parent / "actions.npy", folder.parent / "seen.npz"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    with np.load(arguments[1]) as seen:
        assert np.array_equal(seen["picture"], expected[0]["picture"])
        assert np.array_equal(seen["qpos"], expected[2]["qpos"])
        assert np.array_equal(seen["last"], expected[2]["picture"])
    assert {path: path.stat().st_mtime_ns for path in files(folder)} == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damage", ["changed", "cut off", "emptied"])
def test_damaged_starts_are_made_again(
    folder: Path, work: dict[str, int], simulators: dict[str, LiberoSimulator], damage: str
) -> None:
    expected = play(simulators["fast"])
    for path in files(folder):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"changed": content, "cut off": content[: len(content) // 2], "emptied": b""}[damage])
    with pytest.warns(UserWarning, match="is damaged and will be built again"):
        assert_equal(play(simulators["fast"]), expected)
    assert work == {"steps": 26}
    assert_equal(play(simulators["fast"]), expected)
    assert work == {"steps": 29}


def test_where_nothing_can_be_kept_it_is_made_each_time(
    folder: Path, work: dict[str, int], simulators: dict[str, LiberoSimulator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_cache, "_warned", set())
    folder.touch()
    with pytest.warns(UserWarning, match="cannot be kept in") as caught:
        first = play(simulators["fast"])
    assert len([warning for warning in caught if "cannot be kept" in str(warning.message)]) == 1
    assert_equal(play(simulators["fast"]), first)
    assert work == {"steps": 26}


@pytest.mark.parametrize(
    "option", [{"settle_steps": 1}, {"fidelity": "exact"}, {"seed": 1}, {"sampled_init_states": 1}]
)
def test_a_start_of_other_settings_is_another_one(
    folder: Path, simulators: dict[str, LiberoSimulator], option: dict[str, object]
) -> None:
    # The fixture's simulators hold the model in memory.
    base = {"settle_steps": 0, "fidelity": "fast"}
    for options, task_id, init_state_id, expected in (
        (base, 0, 0, 1),
        (base, 0, 0, 1),
        (base | option, 0, 0, 2),
        (base | option, 0, 1, 3),
        (base | option, 1, 0, 4),
    ):
        simulator = LiberoSimulator("libero_spatial", **options)
        simulator.reset(0, task_id, init_state_id)
        assert len(files(folder)) == expected


def test_names_depend_on_everything_that_they_are_given() -> None:
    state = np.arange(3.0)
    names = [
        settled_states.name_start("scene", state, 10, exact=True),
        settled_states.name_start("other", state, 10, exact=True),
        settled_states.name_start("scene", np.nextafter(state, 9), 10, exact=True),
        settled_states.name_start("scene", state, 9, exact=True),
        settled_states.name_start("scene", state, 10, exact=False),
    ]
    assert len(set(names)) == len(names)


def test_changed_code_a_compiler_or_a_processor_is_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key: Callable[[Path], str] = settled_states.code_key.__wrapped__
    (tmp_path / "physics.py").write_text("a = 1\n")
    first = key(tmp_path)
    (tmp_path / "notes.txt").touch()
    os.utime(tmp_path / "physics.py", (0, 0))
    assert key(tmp_path) == first
    monkeypatch.setattr(settled_states.llvmlite.binding, "get_host_cpu_name", lambda: "another")
    assert key(tmp_path) != first
    monkeypatch.undo()
    version = settled_states.importlib.metadata.version
    for package in ("numba", "llvmlite", "scipy"):
        with monkeypatch.context() as patch:
            newer = {package: version(package) + "0"}
            patch.setattr(
                settled_states.importlib.metadata, "version", lambda name, newer=newer: newer.get(name, version(name))
            )
            assert key(tmp_path) != first, package
    (tmp_path / "physics.py").write_text("a = 2\n")
    assert key(tmp_path) != first
