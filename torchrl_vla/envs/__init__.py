"""LIBERO as TensorDicts; knows no model. Importing it imports neither MuJoCo nor OpenGL."""

from torchrl_vla.envs.instruction import InstructionFromTaskId
from torchrl_vla.envs.libero import LiberoEnv
from torchrl_vla.envs.tasks import SUITES, LiberoTask, TaskSuite, get_suite, suite_names

__all__ = ["SUITES", "InstructionFromTaskId", "LiberoEnv", "LiberoTask", "TaskSuite", "get_suite", "suite_names"]
