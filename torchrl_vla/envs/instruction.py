"""Instructions added where they cost nothing: in the process of the policy, from the integers that workers send."""

from __future__ import annotations

from tensordict import NonTensorData, NonTensorStack, TensorDictBase
from torchrl.data import Composite, NonTensor
from torchrl.envs import Transform

from torchrl_vla.envs.tasks import get_suite

__all__ = ["InstructionFromTaskId"]


class InstructionFromTaskId(Transform):
    """Writes ``"language_instruction"`` (str) from ``"task_id"`` (int64 ``[*B, 1]``).

    Strings do not fit in the memory that ``ParallelEnv`` shares with its workers and are pickled at every step. Leave
    them out of the workers and add them behind.

    Args:
        task_suite: name of the suite that the tasks belong to.

    Examples:
        >>> make_env = functools.partial(LiberoEnv, "libero_spatial", include_instruction=False)  # doctest: +SKIP
        >>> env = TransformedEnv(ParallelEnv(4, make_env), InstructionFromTaskId("libero_spatial"))  # doctest: +SKIP
    """

    def __init__(self, task_suite: str) -> None:
        super().__init__(in_keys=["task_id"], out_keys=["language_instruction"])
        self._instructions = [task.instruction for task in get_suite(task_suite).tasks]

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        task_ids = next_tensordict.get("task_id").squeeze(-1)
        next_tensordict.set("language_instruction", self._lookup(task_ids.tolist()))
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Add the instruction to the observations."""
        observation_spec["language_instruction"] = NonTensor(
            shape=observation_spec.shape, example_data="", device=observation_spec.device
        )
        return observation_spec

    def _lookup(self, task_ids: int | list) -> NonTensorData | NonTensorStack:
        if isinstance(task_ids, int):
            return NonTensorData(self._instructions[task_ids], batch_size=[])
        return NonTensorStack(*map(self._lookup, task_ids))
