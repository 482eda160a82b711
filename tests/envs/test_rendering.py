"""Choosing the OpenGL backend."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from torchrl_vla.envs import rendering
from torchrl_vla.envs.rendering import configure_rendering, renderer_name

NVIDIA = "NVIDIA H100 80GB HBM3/PCIe/SSE2"
LLVMPIPE = "llvmpipe (LLVM 15.0.6, 256 bits)"


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process in which nothing was chosen and PyOpenGL not imported."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")
    for name in [name for name in sys.modules if name.split(".")[0] == "OpenGL"]:
        monkeypatch.delitem(sys.modules, name)
    configure_rendering.cache_clear()
    yield monkeypatch
    configure_rendering.cache_clear()


def _machine(monkeypatch: pytest.MonkeyPatch, *, gpu: bool, egl: str | None, osmesa: str | None) -> None:
    """A machine with or without a GPU, on which the backends render with what is named (None: not at all)."""

    def name(backend: str) -> str:
        found = {"egl": egl, "osmesa": osmesa}[backend]
        if found is None:
            raise RuntimeError(f"{backend} cannot make an OpenGL context: no library")
        return found

    monkeypatch.setattr(rendering, "has_gpu", lambda: gpu)
    monkeypatch.setattr(rendering, "renderer_name", name)


@pytest.mark.parametrize(
    ("gpu", "egl", "osmesa", "chosen", "warned"),
    [
        (True, NVIDIA, LLVMPIPE, "egl", False),
        (False, LLVMPIPE, LLVMPIPE, "osmesa", False),
        (False, LLVMPIPE, None, "egl", False),
        (True, None, LLVMPIPE, "osmesa", True),
        (True, LLVMPIPE, LLVMPIPE, "osmesa", True),
        (True, LLVMPIPE, None, "egl", True),
    ],
)
def test_the_fastest_that_works_is_chosen(
    undecided: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    gpu: bool,
    egl: str | None,
    osmesa: str | None,
    chosen: str,
    warned: bool,
) -> None:
    _machine(undecided, gpu=gpu, egl=egl, osmesa=osmesa)
    assert configure_rendering() == chosen
    assert os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"] == chosen
    messages = [str(warning.message) for warning in recwarn]
    assert [("has a GPU" in message, LLVMPIPE in message) for message in messages] == [(True, True)] * warned


def test_without_opengl_the_error_gives_the_command_and_the_reasons(undecided: pytest.MonkeyPatch) -> None:
    _machine(undecided, gpu=True, egl=None, osmesa=None)
    with pytest.raises(RuntimeError, match="apt-get install libosmesa6") as error:
        configure_rendering()
    assert "egl cannot make" in str(error.value) and "osmesa cannot make" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_users_choice_wins(undecided: pytest.MonkeyPatch) -> None:
    _machine(undecided, gpu=True, egl=NVIDIA, osmesa=None)
    undecided.setattr(rendering, "_LIBRARIES", {"egl": (), "osmesa": ("libc.so.6",)})
    undecided.setenv("MUJOCO_GL", "osmesa")
    assert configure_rendering() == "osmesa" == os.environ["PYOPENGL_PLATFORM"]


@pytest.mark.parametrize(
    ("mujoco_gl", "platform", "error", "message"),
    [
        ("glfw", "", ValueError, "MUJOCO_GL='glfw'.*'egl'.*'osmesa'"),
        ("osmesa", "egl", ValueError, "PYOPENGL_PLATFORM='egl' contradicts MUJOCO_GL='osmesa'"),
        ("egl", "", RuntimeError, "MUJOCO_GL=egl is set and no-such-library.so is not installed"),
    ],
)
def test_a_choice_that_cannot_work(
    undecided: pytest.MonkeyPatch, mujoco_gl: str, platform: str, error: type[Exception], message: str
) -> None:
    undecided.setattr(rendering, "_LIBRARIES", {"egl": ("no-such-library.so",), "osmesa": ("libc.so.6",)})
    undecided.setenv("MUJOCO_GL", mujoco_gl)
    undecided.setenv("PYOPENGL_PLATFORM", platform)
    with pytest.raises(error, match=message):
        configure_rendering()


@pytest.mark.processes
def test_a_missing_library_is_named_before_torchrl_imports_mujoco() -> None:
    code = (
        "from torchrl_vla.envs import rendering\n"
        "rendering._LIBRARIES = {'osmesa': ('no-such-library.so',)}\n"
        "from torchrl_vla.envs import LiberoEnv\n"
    )
    environment = {**os.environ, "MUJOCO_GL": "osmesa"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "RenderingUnavailable: LIBERO needs OpenGL" in run.stderr and "apt-get install libosmesa6" in run.stderr


def test_pyopengl_imported_too_early(undecided: pytest.MonkeyPatch) -> None:
    undecided.setitem(sys.modules, "OpenGL", sys)
    with pytest.raises(RuntimeError, match="PyOpenGL was imported before"):
        configure_rendering()


@pytest.mark.processes
def test_the_renderer_is_asked_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert renderer_name(configure_rendering())
    monkeypatch.setattr(rendering, "_PROBE", "raise SystemExit('first line\\nno such driver')")
    with pytest.raises(RuntimeError, match="egl cannot make an OpenGL context: no such driver$"):
        renderer_name.__wrapped__("egl")
    monkeypatch.setattr(rendering, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(rendering, "_PROBE_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match="did not make an OpenGL context within 0.5 s"):
        renderer_name.__wrapped__("egl")


@pytest.mark.processes
def test_a_picture_when_mujoco_was_imported_first_and_silence_at_exit() -> None:
    """MuJoCo decides at its import; and a process that ends without closing must not spew OpenGL errors."""
    code = (
        "import mujoco\n"
        "from torchrl_vla.envs import LiberoEnv\n"
        "env = LiberoEnv(image_size=16)\n"
        "print(env.reset()['observation', 'image'].float().std() > 1)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "tensor(True)\n", "")


@pytest.mark.parametrize(
    ("visible", "chosen", "expected"),
    [
        (None, None, (0, 2)),
        ("2,1", None, (2,)),
        ("0", None, (0,)),
        ("", None, ()),
        ("GPU-8932f937", None, ()),
        (None, "1", ()),
    ],
)
def test_drawing_is_spread_over_the_gpus_that_cuda_may_use(
    undecided: pytest.MonkeyPatch, visible: str | None, chosen: str | None, expected: tuple[int, ...]
) -> None:
    """Of three GPUs EGL numbers the second differently, or does not draw on it."""

    def name(backend: str, device: int | None = None) -> str:
        if device == 1:
            raise RuntimeError("egl cannot make an OpenGL context")
        return "NVIDIA H100"

    undecided.setattr(rendering, "configure_rendering", lambda: "egl")
    undecided.setattr(rendering, "renderer_name", name)
    undecided.setattr("torch.cuda.device_count", lambda: 3)
    for variable, value in (("CUDA_VISIBLE_DEVICES", visible), ("MUJOCO_EGL_DEVICE_ID", chosen)):
        undecided.delenv(variable, raising=False)
        if value is not None:
            undecided.setenv(variable, value)
    assert rendering.egl_devices.__wrapped__() == expected
    undecided.setattr(rendering, "configure_rendering", lambda: "osmesa")
    assert rendering.egl_devices.__wrapped__() == ()
