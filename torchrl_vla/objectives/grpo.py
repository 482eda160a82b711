"""Group-relative advantages, computed where a replay buffer is filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.envs.transforms import Compose, Transform

from torchrl_vla.errors import UserError
from torchrl_vla.objectives.episodes import whole_episodes
from torchrl_vla.objectives.masking import executed_actions, expand_mask, valid_entries

Estimator = Literal["grpo", "rloo", "dr_grpo"]
Baseline = Literal["group", "running"]


class GRPOAdvantage(Transform):
    r"""Score each episode against the other episodes that began in the same initial state.

    A replay-buffer transform: ``extend`` takes whole episodes, one after the other (``[T]``, each ending with
    ``("next", "done")``, or ``[N, T]`` where every row ends with an episode), and stores the decisions of the groups
    that can teach something, each with the advantage of its episode. With the episode's return
    :math:`R_i = \sum_t \gamma^t r_t` (t counts decisions) and the n returns of its group, the advantage is

    ========= ============================================================= ==============================
    grpo      :math:`(R_i - \bar R) / (s + 10^{-6})`, s the unbiased std    https://arxiv.org/abs/2402.03300
    rloo      :math:`R_i - \frac{1}{n-1}\sum_{j \ne i} R_j`                 https://arxiv.org/abs/2402.14740
    dr_grpo   :math:`R_i - \bar R`                                          https://arxiv.org/abs/2503.20783
    ========= ============================================================= ==============================

    With ``baseline="running"`` the means over the group become, at each decision, means over those of its episodes
    that still run then; an episode that runs alone is compared with the whole group. What the others do, and how long
    they run, does not depend on what this one does next, so with ``rloo`` the gradient's expectation stays what it
    was, and its variance falls: once all episodes that succeed have ended, the rest of a failure is compared with
    failures. Decisions whose advantage is then 0 are dropped.

    A group is dropped when all its episodes failed, or all succeeded, with equal returns (their advantages are zero),
    when it has fewer than ``min_group_size`` episodes, and when its mean success lies outside ``[keep_low,
    keep_high]`` (dynamic sampling, https://arxiv.org/abs/2503.14476; by default every group with both outcomes is
    kept); :meth:`get_stats` counts the reasons. When nothing is left, ``extend`` leaves the buffer as it is. TorchRL's
    ``MCAdvantage`` waits for groups of one fixed size, one trajectory at a time; here an update's groups come
    together, of any size, and are scored in one vectorised pass.

    Fragments of episodes are refused: an episode without its end, and one without its beginning, where the data say
    so: by ``("collector", "traj_ids")``, ``is_init`` (``InitTracker``), ``step_count`` (``StepCounter``), or
    ``num_control_steps`` beside the observation, which is 0 after a reset. Data with none of them must begin with an
    episode.

    Actions that were never executed, as an episode may end inside a chunk, are left out by the entry ``mask`` bool
    ``[T, K]``, which is written (or narrowed) where the data have ``("next", "num_control_steps")``.
    :class:`~torchrl_vla.objectives.AsymmetricClipPPOLoss` reads it; a stock loss with a log-probability per token or
    action does after ``loss.loss_mask_key = "mask"``, for its ``loss_*`` terms. A loss with one log-probability per
    decision cannot: the sum over the chunk, stored and new, holds the actions that were not executed, and its mask has
    one entry per decision. Leave its ``loss_mask_key`` alone: the advantage does not depend on those actions, so they
    add noise to the ratio and its gradient, and no bias where the ratio is not clipped.

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
        num_control_steps_key: int64 ``[T, 1]``, how many actions of a chunk were executed.
        action_key: ``[T, K, ...]``, whose K is the chunk's; by default ``("vla_action", "tokens")`` where the data
            have it, else ``action``.
        log_prob_key: ``[T, K, 7]``, ``[T, K]`` or ``[T]``, whose valid entries are counted for
            ``trajectory_tokens_key``.
        mask_key: written, bool ``[T, K]``, where ``num_control_steps_key`` is there.
        trajectory_tokens_key: written, int64 ``[T, 1]``, the number of valid tokens of the decision's whole episode,
            for ``aggregation="trajectory"``.

    Examples:
        >>> from tensordict import TensorDict
        >>> step = {"reward": torch.tensor([0.0, 1.0, 0.0]), "done": torch.tensor([False, True, True])}
        >>> step["success"] = step["reward"] > 0  # an episode of two decisions that succeeds, one of one that fails
        >>> step = {key: value.unsqueeze(-1) for key, value in step.items()}
        >>> data = TensorDict({"group_id": torch.zeros(3, 1, dtype=torch.int64), "next": step}, [3])
        >>> GRPOAdvantage().inv(data)["advantage"].squeeze(-1)
        tensor([ 0.7071,  0.7071, -0.7071])

    Raises:
        ValueError: if an argument is outside its range, or the data hold fragments of episodes.
    """

    def __init__(
        self,
        estimator: Estimator = "grpo",
        *,
        baseline: Baseline = "group",
        verifier_gamma: float = 1.0,
        keep_low: float = 0.0,
        keep_high: float = 1.0,
        min_group_size: int = 2,
        group_keys: Sequence[NestedKey] | None = None,
        reward_key: NestedKey = ("next", "reward"),
        success_key: NestedKey = ("next", "success"),
        done_key: NestedKey = ("next", "done"),
        advantage_key: NestedKey = "advantage",
        return_key: NestedKey = "episode_return",
        num_control_steps_key: NestedKey = ("next", "num_control_steps"),
        action_key: NestedKey | None = None,
        log_prob_key: NestedKey = ("vla_action", "log_probs"),
        mask_key: NestedKey = "mask",
        trajectory_tokens_key: NestedKey = "trajectory_tokens",
    ) -> None:
        if estimator not in get_args(Estimator):
            raise UserError(f"estimator={estimator!r} is unknown: choose one of {get_args(Estimator)}.")
        if baseline not in get_args(Baseline):
            raise UserError(f"baseline={baseline!r} is unknown: choose one of {get_args(Baseline)}.")
        if not 0 < verifier_gamma <= 1:
            raise UserError(f"verifier_gamma={verifier_gamma} must lie in (0, 1]; 1 does not discount.")
        if not 0 <= keep_low <= keep_high <= 1:
            raise UserError(
                f"keep_low={keep_low} and keep_high={keep_high} must be 0 <= keep_low <= keep_high <= 1: they bound a "
                "group's mean success."
            )
        if min_group_size < 2:
            raise UserError(
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
        self.num_control_steps_key = num_control_steps_key
        self.action_key = action_key
        self.log_prob_key = log_prob_key
        self.mask_key = mask_key
        self.trajectory_tokens_key = trajectory_tokens_key
        self.reset_stats()

    def reset_stats(self) -> None:
        """Start counting anew, such as at the beginning of an update."""
        self._stats: Counter[str] = Counter()
        self._return_sum = self._advantage_sum = self._advantage_squares = 0.0

    def get_stats(self) -> dict[str, float]:
        """Return the counts since the last reset, for a logger.

        Returns:
            ``episodes``, ``decisions``, ``groups``; of the groups ``kept``, ``dropped_all_failed``,
            ``dropped_all_succeeded``, ``dropped_out_of_bounds``, ``dropped_incomplete``; the ``kept_episodes`` and
            ``kept_decisions``; the episodes' ``success_rate`` and ``mean_return``; and of the kept decisions'
            advantages ``advantage_mean``, ``advantage_std`` and the share ``advantage_nonzero`` that is not zero.
        """
        names = ("episodes", "decisions", "groups", "kept", "kept_episodes", "kept_decisions")
        reasons = ("all_failed", "all_succeeded", "out_of_bounds", "incomplete")
        stats = {name: self._stats[name] for name in (*names, *(f"dropped_{reason}" for reason in reasons))}
        episodes, decisions = max(self._stats["episodes"], 1), max(self._stats["kept_decisions"], 1)
        mean = self._advantage_sum / decisions
        return stats | {
            "success_rate": self._stats["successes"] / episodes,
            "mean_return": self._return_sum / episodes,
            "advantage_mean": mean,
            "advantage_std": max(self._advantage_squares / decisions - mean**2, 0.0) ** 0.5,
            "advantage_nonzero": self._stats["nonzero_advantages"] / decisions,
        }

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Leave what is read from the buffer as it is."""
        return tensordict

    def _inv_call(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        if tensordict is None:  # nothing is left of what another transform was given
            return None
        self._check_order()
        tensordict = whole_episodes(tensordict, self.done_key)
        done = tensordict.get(self.done_key).reshape(-1)
        # The episode a decision belongs to: the number of ends before it.
        episode = done.cumsum(0) - done.long()
        ends = done.nonzero().squeeze(-1)
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
        self._stats["nonzero_advantages"] += int((advantage[kept] != 0).sum())
        self._advantage_sum += advantage[kept].sum().item()
        self._advantage_squares += advantage[kept].square().sum().item()
        if not kept.any():
            return None
        tensordict = self._set_mask(tensordict.clone(False), episode, len(ends))
        out = tensordict[kept]
        out.set(self.advantage_key, advantage[kept].float().unsqueeze(-1))
        out.set(self.return_key, returns[episode[kept]].float().unsqueeze(-1))
        return out

    def _check_order(self) -> None:
        """Refuse transforms that would have to work on nothing, whether or not it comes to that in this batch."""
        reference = self.__dict__.get("_container")
        container = None if reference is None else reference()
        for transform in container.transforms if isinstance(container, Compose) else ():
            if transform is self:
                return
            if transform.in_keys_inv or type(transform)._inv_call is not Transform._inv_call:
                raise UserError(
                    f"{type(transform).__name__} comes before GRPOAdvantage in the buffer's transforms, so that extend "
                    "runs it after GRPOAdvantage, of which nothing may be left. Put GRPOAdvantage first."
                )

    def _set_mask(self, tensordict: TensorDictBase, episode: Tensor, episodes: int) -> TensorDictBase:
        """Write which actions count, and how many tokens of each decision's episode."""
        steps = tensordict.get(self.num_control_steps_key, None)
        keys = (("vla_action", "tokens"), "action") if self.action_key is None else (self.action_key,)
        action = next((value for key in keys if (value := tensordict.get(key, None)) is not None), None)
        if self.action_key is not None and action is None:
            raise KeyError(f"The episodes have no action_key={self.action_key!r}, which says how long a chunk is.")
        if steps is not None and action is not None and action.ndim > 2:
            mask = tensordict.get(self.mask_key, None)
            executed = executed_actions(steps, action.shape[:2])
            if mask is not None:
                shape = mask.shape if mask.shape[:2] == executed.shape else executed.shape
                executed = expand_mask(mask, shape) & expand_mask(executed, shape)
            tensordict.set(self.mask_key, executed)
        log_prob = tensordict.get(self.log_prob_key, None)
        if log_prob is not None:
            valid = valid_entries(
                tensordict,
                log_prob.shape,
                masks=(self.mask_key,),
                num_control_steps=self.num_control_steps_key,
                device=log_prob.device,
            )
            tokens = _sums(valid.reshape(len(valid), -1).sum(-1).double(), episode, episodes)
            tensordict.set(self.trajectory_tokens_key, tokens.long()[episode].unsqueeze(-1))
        return tensordict

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
        """Return the advantage of every decision, given its episode and its number therein."""
        advantage, _ = self._compare(returns[episode], group[episode], step == 0)
        if self.baseline == "running":
            cell = group[episode] * (int(step.max()) + 1) + step
            running, size = self._compare(returns[episode], cell, torch.ones_like(cell, dtype=torch.bool))
            # Alone, an episode is compared with all others of its group, which is as independent of what it does next.
            advantage = torch.where(size > 1, running, advantage)
        if self.estimator == "grpo":
            return advantage / (_unbiased_std(returns, group) + 1e-6)[group[episode]]
        return advantage

    def _compare(self, returns: Tensor, cell: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each decision's episode got less the baseline of its cell, and how many episodes the cell has.

        Args:
            returns: of each decision's episode, ``[T]``.
            cell: whom a decision is compared with, int64 ``[T]``.
            counted: one decision of each episode of a cell, bool ``[T]``.
        """
        cells = int(cell.max()) + 1
        size = _sums(counted.double(), cell, cells)
        centred = returns - (_sums(returns * counted, cell, cells) / size.clamp_min(1))[cell]
        if self.estimator == "rloo":
            centred = centred * (size / (size - 1).clamp_min(1))[cell]
        return centred, size[cell]

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
    """Return the sum of the values of each place, float64."""
    return torch.zeros(places, dtype=torch.double, device=values.device).index_add_(0, place, values)


def _unbiased_std(values: Tensor, group: Tensor) -> Tensor:
    """Of each group; 0 for a group of one."""
    groups = int(group.max()) + 1
    size = _sums(torch.ones_like(values), group, groups)
    centred = values - (_sums(values, group, groups) / size)[group]
    return (_sums(centred.square(), group, groups) / (size - 1).clamp_min(1)).sqrt()
