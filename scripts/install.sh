#!/usr/bin/env bash
# Make a virtual environment with torchrl-vla in it, and see to it that something can draw: a GPU's EGL, or Mesa's software renderer.
#   bash scripts/install.sh [FOLDER]        (default .venv; PYTHON chooses the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}

"$python" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"torchrl-vla needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12")
PY

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || {
    echo "Could not create $venv. On Debian or Ubuntu: apt-get install -y python3-venv" >&2
    exit 1
  }
fi

# A GPU host renders through the driver's EGL; without a GPU, OSMesa renders on the CPU.
if ! ldconfig -p | grep -q libOSMesa && [ ! -e /dev/nvidia0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing the software renderer (libosmesa6) ..."
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libosmesa6
  else
    echo "LIBERO needs OpenGL to draw, and this machine has no renderer. Run:  sudo apt-get install -y libosmesa6" >&2
    exit 1
  fi
fi

echo "Installing torchrl-vla and what it needs into $venv (a few minutes) ..."
"$venv/bin/python" -m pip install --quiet --upgrade pip
# Without a GPU, a build of PyTorch that is already there is enough; on Linux pip's default build carries CUDA.
# setuptools says at length that an editable installation is one; every other warning, and every error, is shown.
PYTHONWARNINGS='ignore:Editable installation' "$venv/bin/python" -m pip install --quiet ${PIP_TORCH:-} -e '.[dev]'
echo "Installed. Next: make train, make test-fast, or $venv/bin/torchrl-vla --help"
