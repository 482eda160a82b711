"""Group-relative advantages, computed where a replay buffer is filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.transforms import Transform

Estimator = Literal["grpo", "rloo", "dr_grpo"]
Baseline = Literal["group", "running"]


class GRPOAdvantage(Transform):
    r"""Score each episode against the other episodes that began in the same initial state.

    A replay-buffer transform: ``extend`` takes whole episodes, one after the other (``[T]``, each ending with
    ``("next", "done")``), or several rows of such, ``[..., T]``, and stores the decisions of the groups that can teach
    something, each with the advantage of its episode. With the episode's return :math:`R_i = \sum_t \gamma^t r_t` (t
    counts decisions) and the n returns of its group, the advantage is

    ========= ============================================================= ==============================
    grpo      :math:`(R_i - \bar R) / (s + 10^{-6})`, s the unbiased std    https://arxiv.org/abs/2402.03300
    rloo      :math:`R_i - \frac{1}{n-1}\sum_{j \ne i} R_j`                 https://arxiv.org/abs/2402.14740
    dr_grpo   :math:`R_i - \bar R`                                          https://arxiv.org/abs/2503.20783
    ========= ============================================================= ==============================

    With ``baseline="running"`` the means over the group become, at each decision, means over those of its episodes
    that still run then. Other episodes of the same initial state know nothing of what this one does next, so with
    ``rloo`` the gradient's expectation stays what it was, and its variance falls: once all episodes that succeed have
    ended, the rest of a failure is compared with failures alone. Decisions whose advantage is then 0 are dropped.

    A group is dropped when its mean success lies outside ``[keep_low, keep_high]`` (dynamic sampling,
    https://arxiv.org/abs/2503.14476), when all its episodes failed, or all succeeded, with equal returns (their
    advantages are zero), and when it has fewer than ``min_group_size`` complete episodes; :meth:`get_stats` counts
    the reasons. TorchRL's ``MCAdvantage`` waits for groups of one fixed size, one trajectory at a time; here
    an update's groups come together, of any size, and are scored in one vectorised pass.

    Args:
        estimator: ``"grpo"``, ``"rloo"`` or ``"dr_grpo"``.

    Keyword Args:
        baseline: ``"group"``, or ``"running"`` for those of the group that still run.
        verifier_gamma: discount per decision, in (0, 1].
        keep_low: lowest mean success of a group that is kept.
        keep_high: highest mean success of a group that is kept.
        min_group_size: fewest episodes of a group that is kept, at least 2.
        group_keys: integer entries ``[T, 1]`` that together identify a group; by default ``group_id`` where the
            data have it, else ``task_id`` and ``init_state_id``.
        reward_key: float ``[T, 1]``.
        success_key: bool ``[T, 1]``, read at the episode's last decision.
        done_key: bool ``[T, 1]``.
        advantage_key: written, float32 ``[T, 1]``.
        return_key: written, float32 ``[T, 1]``, the episode's (discounted) return.

    Examples:
        >>> from tensordict import TensorDict
        >>> step = {"reward": torch.tensor([0.0, 1.0, 0.0]), "done": torch.tensor([False, True, True])}
        >>> step["success"] = step["reward"] > 0  # an episode of two decisions that succeeds, one of one that fails
        >>> step = {key: value.unsqueeze(-1) for key, value in step.items()}
        >>> data = TensorDict({"group_id": torch.zeros(3, 1, dtype=torch.int64), "next": step}, [3])
        >>> GRPOAdvantage().inv(data)["advantage"].squeeze(-1)
        tensor([ 0.7071,  0.7071, -0.7071])

    Raises:
        ValueError: if an argument is outside its range, or a row of several ends within an episode.
    """

    def __init__(
        self,
        estimator: Estimator = "grpo",
        *,
        baseline: Baseline = "group",
        verifier_gamma: float = 1.0,
        keep_low: float = 0.1,
        keep_high: float = 0.9,
        min_group_size: int = 2,
        group_keys: Sequence[NestedKey] | None = None,
        reward_key: NestedKey = ("next", "reward"),
        success_key: NestedKey = ("next", "success"),
        done_key: NestedKey = ("next", "done"),
        advantage_key: NestedKey = "advantage",
        return_key: NestedKey = "episode_return",
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator={estimator!r} is unknown: choose one of {get_args(Estimator)}.")
        if baseline not in get_args(Baseline):
            raise ValueError(f"baseline={baseline!r} is unknown: choose one of {get_args(Baseline)}.")
        if not 0 < verifier_gamma <= 1:
            raise ValueError(f"verifier_gamma={verifier_gamma} must lie in (0, 1]; 1 does not discount.")
        if not 0 <= keep_low <= keep_high <= 1:
            raise ValueError(
                f"keep_low={keep_low} and keep_high={keep_high} must be 0 <= keep_low <= keep_high <= 1: they bound a "
                "group's mean success."
            )
        if min_group_size < 2:
            raise ValueError(
                f"min_group_size={min_group_size} must be at least 2: one episode has nothing to be compared with."
            )
        super().__init__()
        self.estimator = estimator
        self.baseline = baseline
        self.verifier_gamma = verifier_gamma
        self.keep_low = keep_low
        self.keep_high = keep_high
        self.min_group_size = min_group_size
        self.group_keys = group_keys
        self.reward_key = reward_key
        self.success_key = success_key
        self.done_key = done_key
        self.advantage_key = advantage_key
        self.return_key = return_key
        self.reset_stats()

    def reset_stats(self) -> None:
        """Start counting anew, such as at the beginning of an update."""
        self._stats: Counter[str] = Counter()
        self._return_sum = 0.0

    def get_stats(self) -> dict[str, float]:
        """Counts since the last reset, for a logger.

        Returns:
            ``episodes``, ``decisions``, ``groups``; of the groups ``kept``, ``dropped_all_failed``,
            ``dropped_all_succeeded``, ``dropped_out_of_bounds``, ``dropped_incomplete``; the ``kept_episodes`` and
            ``kept_decisions``, and the episodes' ``success_rate`` and ``mean_return``. Episodes without their end
            count as incomplete, and in no other figure.
        """
        names = ("episodes", "decisions", "groups", "kept", "kept_episodes", "kept_decisions", "incomplete_episodes")
        reasons = ("all_failed", "all_succeeded", "out_of_bounds", "incomplete")
        stats = {name: self._stats[name] for name in (*names, *(f"dropped_{reason}" for reason in reasons))}
        episodes = max(self._stats["episodes"], 1)
        rates = {"success_rate": self._stats["successes"] / episodes, "mean_return": self._return_sum / episodes}
        return stats | rates

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Leave what is read from the buffer as it is."""
        return tensordict

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase | None:
        if tensordict.ndim > 1 and not tensordict.get(self.done_key)[..., -1, :].all():
            raise ValueError(
                f"GRPOAdvantage compares whole episodes, and of its data's rows {list(tensordict.shape[:-1])} some end "
                "within one. Collect whole ones: GroupCollector, or TorchRL's Collector with trajs_per_batch=... and "
                'traj_format="cat"; or use advantage_estimator=gae.'
            )
        tensordict = tensordict.reshape(-1)
        done = tensordict.get(self.done_key).reshape(-1)
        # The episode a decision belongs to: the number of ends before it. Decisions after the last end have none.
        episode = done.cumsum(0) - done.long()
        ends = done.nonzero().squeeze(-1)
        complete = episode < ends.numel()
        if not complete.all():
            self._stats["incomplete_episodes"] += 1
            tensordict, episode = tensordict[complete], episode[complete]
        if not ends.numel():
            return None
        step = torch.arange(len(episode), device=episode.device)
        step -= torch.cat([ends.new_zeros(1), ends[:-1] + 1])[episode]
        returns = self._returns(tensordict, episode, step, len(ends))
        success = tensordict.get(self.success_key).reshape(-1)[ends].double()
        _, group = torch.unique(self._groups(tensordict, ends), dim=0, return_inverse=True)
        kept = self._keep(returns, success, group)[group][episode]
        advantage = self._advantage(returns, group, episode, step)
        if self.baseline == "running":
            kept &= advantage != 0
        self._stats["episodes"] += ends.numel()
        self._stats["decisions"] += tensordict.numel()
        self._stats["successes"] += int(success.sum())
        self._return_sum += returns.sum().item()
        self._stats["kept_episodes"] += len(episode[kept].unique())
        self._stats["kept_decisions"] += int(kept.sum())
        if not kept.any():
            return None
        out = tensordict[kept]
        out.set(self.advantage_key, advantage[kept].float().unsqueeze(-1))
        out.set(self.return_key, returns[episode[kept]].float().unsqueeze(-1))
        return out

    def _groups(self, tensordict: TensorDictBase, ends: Tensor) -> Tensor:
        keys = self.group_keys
        if keys is None:
            keys = ("group_id",) if "group_id" in tensordict.keys() else ("task_id", "init_state_id")
        columns = [tensordict.get(key, None) for key in keys]
        if any(column is None for column in columns):
            raise KeyError(f"The episodes need {list(keys)} to be grouped by: add them, or set group_keys.")
        return torch.stack([column.reshape(-1)[ends] for column in columns], -1)

    def _returns(self, tensordict: TensorDictBase, episode: Tensor, step: Tensor, episodes: int) -> Tensor:
        reward = tensordict.get(self.reward_key).reshape(-1).double()
        return _sums(reward * self.verifier_gamma ** step.double(), episode, episodes)

    def _advantage(self, returns: Tensor, group: Tensor, episode: Tensor, step: Tensor) -> Tensor:
        """The advantage of every decision, given its episode and its number therein."""
        # Every episode of a group runs at its first decision.
        compared = step if self.baseline == "running" else torch.zeros_like(step)
        width = int(compared.max()) + 1
        cell, cells = group[episode] * width + compared, (int(group.max()) + 1) * width
        runs = step == compared  # so that an episode counts once in a cell
        size = _sums(runs.double(), cell, cells)
        centred = returns[episode] - (_sums(returns[episode] * runs, cell, cells) / size.clamp_min(1))[cell]
        if self.estimator == "grpo":
            return centred / (_unbiased_std(returns, group) + 1e-6)[group[episode]]
        if self.estimator == "rloo":
            return centred * (size / (size - 1).clamp_min(1))[cell]
        return centred

    def _keep(self, returns: Tensor, success: Tensor, group: Tensor) -> Tensor:
        """Which groups can teach something."""
        groups = int(group.max()) + 1
        size = _sums(torch.ones_like(returns), group, groups)
        mean_success = _sums(success, group, groups) / size
        lowest, highest = (
            torch.zeros_like(mean_success).scatter_reduce(0, group, returns, reduce, include_self=False)
            for reduce in ("amin", "amax")
        )
        incomplete = size < self.min_group_size
        outside = (mean_success < self.keep_low) | (mean_success > self.keep_high)
        failed, succeeded = mean_success == 0, mean_success == 1
        keep = ~(incomplete | outside | ((lowest == highest) & (failed | succeeded)))
        reasons = {
            "groups": torch.ones_like(keep),
            "kept": keep,
            "dropped_incomplete": incomplete,
            "dropped_all_failed": ~incomplete & ~keep & failed,
            "dropped_all_succeeded": ~incomplete & ~keep & succeeded,
            "dropped_out_of_bounds": ~incomplete & ~keep & ~failed & ~succeeded,
        }
        for name, which in reasons.items():
            self._stats[name] += int(which.sum())
        return keep


def _sums(values: Tensor, place: Tensor, places: int) -> Tensor:
    """The sum of the values of each place, float64."""
    return torch.zeros(places, dtype=torch.double, device=values.device).index_add_(0, place, values)


def _unbiased_std(values: Tensor, group: Tensor) -> Tensor:
    """Of each group; 0 for a group of one."""
    groups = int(group.max()) + 1
    size = _sums(torch.ones_like(values), group, groups)
    centred = values - (_sums(values, group, groups) / size)[group]
    return (_sums(centred.square(), group, groups) / (size - 1).clamp_min(1)).sqrt()
