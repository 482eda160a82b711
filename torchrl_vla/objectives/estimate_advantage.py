"""TorchRL's value estimators, such as GAE, where a replay buffer is filled."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDictBase
from torchrl.envs.transforms import Transform

__all__ = ["EstimateAdvantage"]


class EstimateAdvantage(Transform):
    """Score what a replay buffer is filled with by a value estimator, along time, and store it flat.

    ``extend`` takes decisions ``[T]``, episode after episode, or ``[N, T]`` with one environment's decisions per row: a
    row may be cut within an episode, as the estimator looks along it before rows are put one after the other.

    Args:
        estimator: writes ``advantage`` and ``value_target``, such as :class:`torchrl.objectives.value.GAE`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives.value import GAE
        >>> flags = {name: torch.tensor([[[False], [True]]]) for name in ("done", "terminated")}
        >>> step = {"reward": torch.tensor([[[0.0], [1.0]]]), "state_value": torch.zeros(1, 2, 1), **flags}
        >>> data = TensorDict({"state_value": torch.zeros(1, 2, 1), "next": step}, [1, 2])
        >>> EstimateAdvantage(GAE(gamma=0.5, lmbda=1.0, value_network=None)).inv(data)["advantage"].squeeze(-1)
        tensor([0.5000, 1.0000])
    """

    def __init__(self, estimator: Callable[[TensorDictBase], TensorDictBase]) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Leave what is read from the buffer as it is."""
        return tensordict

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.estimator(tensordict).reshape(-1)
