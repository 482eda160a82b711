"""Whole episodes are taken in any layout, fragments are refused, and a buffer holds what GRPOAdvantage leaves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import CatTensors, Compose, DoubleToFloat, InitTracker, StepCounter, Transform, TransformedEnv

from torchrl_vla.envs.toy import ToyTrackingEnv
from torchrl_vla.objectives import GRPOAdvantage
from torchrl_vla.objectives.episodes import whole_episodes

make_env = partial(ToyTrackingEnv, chunk_size=2, action_dim=7, max_decisions=3)


def make_policy() -> TensorDictModule:
    """Actions that do not succeed, so that every episode has three decisions."""
    far = partial(torch.full, fill_value=0.9)
    return TensorDictModule(
        lambda state: far((*state.shape[:-1], 2, 7)), in_keys=[("observation", "state")], out_keys=["action"]
    )


def rows(*lengths: int) -> TensorDict:
    """Episodes of these lengths, one after the other, all of one group; every other one succeeds."""
    done = torch.cat([torch.arange(length) == length - 1 for length in lengths]).unsqueeze(-1)
    success = done & torch.cat([torch.full((n, 1), i % 2 == 0) for i, n in enumerate(lengths)])
    after = {"done": done, "success": success, "reward": success.float()}
    return TensorDict({"group_id": torch.zeros(len(done), 1, dtype=torch.int64), "next": after}, [len(done)])


def collect(env, frames: int) -> TensorDictBase:
    collector = Collector(env, make_policy(), frames_per_batch=frames, total_frames=frames)
    batch = next(iter(collector)).clone()
    collector.shutdown()
    batch["next", "success"] = batch["next", "done"] & (torch.arange(batch.shape[-1]).unsqueeze(-1) < 4)
    batch["next", "reward"] = batch["next", "success"].float()
    return batch


def test_rows_that_end_with_an_episode_are_as_good_as_one_after_the_other():
    flat = rows(2, 2, 1, 3)
    expected = GRPOAdvantage().inv(flat)
    torch.testing.assert_close(GRPOAdvantage().inv(flat.reshape(2, 4))["advantage"], expected["advantage"])
    assert GRPOAdvantage().inv(flat.reshape(1, 2, 4)).batch_size == expected.batch_size == torch.Size([8])


@pytest.mark.parametrize("layout", [make_env, partial(make_env, 2)])
def test_a_stock_collector_s_fragments_are_refused(layout):
    """Of episodes of three decisions, 14 or 7 per row end within one."""
    batch = collect(layout(), 14)
    where = r"of the collector's rows \[2\] some end" if batch.ndim > 1 else "the 14 decisions end"
    with pytest.raises(ValueError, match=f"{where} within one. Collect whole ones: GroupCollector"):
        GRPOAdvantage(group_keys=["task_id"]).inv(batch)
    whole = collect(layout(), 12)
    assert GRPOAdvantage(group_keys=["task_id"]).inv(whole).numel() == 12


@pytest.mark.parametrize("layout", [make_env, partial(make_env, 2)])
@pytest.mark.parametrize(
    ("key", "tracker"), [("is_init", InitTracker), ("step_count", StepCounter), ("num_control_steps", None)]
)
def test_an_episode_without_its_first_decision_is_refused(layout, key, tracker):
    env = layout() if tracker is None else TransformedEnv(layout(), tracker())
    batch = collect(env, 12)
    others = {"is_init", "step_count", "num_control_steps", "collector"} - {key}
    batch = batch.exclude(*others)
    whole_episodes(batch)
    with pytest.raises(ValueError, match=f"by '{key}' an episode does not begin at decision 0, where the batch begins"):
        whole_episodes(batch[..., 1:])


def test_fragments_of_two_processes_put_together_are_refused():
    """One's last decisions, without an end, are followed by the other's, whose ends are all there."""
    batch = torch.cat([collect(make_env(), 12)[:-1], collect(make_env(), 12)])
    batch["collector", "traj_ids"][11:] += 100
    for key, others in {
        "num_control_steps": ("collector",),
        "('collector', 'traj_ids')": ("num_control_steps",),
    }.items():
        with pytest.raises(ValueError) as raised:
            whole_episodes(batch.exclude(*others))
        assert f"by {key if key.startswith('(') else repr(key)} an episode begins at decision 11" in str(raised.value)
        assert "none had ended: the data hold a fragment" in str(raised.value)


@pytest.mark.processes
def test_a_stock_collector_s_batches_of_several_processes_are_refused():
    collector = MultiSyncCollector(
        [make_env, make_env], make_policy(), frames_per_batch=16, total_frames=16, cat_results=0
    )
    batch = next(iter(collector)).clone()
    collector.shutdown()
    batch["next", "done"][-1] = True  # as if the last happened to end there
    with pytest.raises(ValueError, match="an episode begins at decision 8, where none had ended"):
        whole_episodes(batch)


def test_one_decision_is_no_episode():
    with pytest.raises(ValueError, match="this is one decision"):
        GRPOAdvantage().inv(rows(1)[0])


def make_buffer(*transforms: Transform) -> TensorDictReplayBuffer:
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(100),
        sampler=SamplerWithoutReplacement(drop_last=False),
        batch_size=4,
        transform=transforms[0] if len(transforms) == 1 else Compose(*transforms),
    )


NOTHING = rows(3)  # no other episode to compare with


@pytest.mark.parametrize("others", [[], [DoubleToFloat(in_keys_inv=["weight"]), CatTensors(["group_id"], "group")]])
def test_a_buffer_stays_empty_when_nothing_is_left(others):
    buffer = make_buffer(GRPOAdvantage(), *(transform.clone() for transform in others))
    for _ in range(2):
        assert len(buffer.extend(NOTHING.clone().set("weight", torch.ones(3).double()))) == 0
        assert len(buffer) == 0
    data = rows(2, 3).set("weight", torch.arange(5).double())
    assert len(buffer.extend(data)) == len(buffer) == 5
    assert len(buffer.extend(NOTHING.clone().set("weight", torch.ones(3).double()))) == 0
    read = torch.cat([sample["advantage"] for sample in buffer])
    expected = GRPOAdvantage().inv(data)["advantage"]
    assert sorted(read.flatten().tolist()) == sorted(expected.flatten().tolist())


def test_rows_go_into_a_buffer():
    buffer = make_buffer(GRPOAdvantage())
    buffer.extend(rows(2, 2, 1, 3).reshape(2, 4))
    assert len(buffer) == 8 and buffer.sample().batch_size == torch.Size([4])


def test_a_transform_that_would_have_to_work_on_nothing_is_refused_at_once():
    buffer = make_buffer(DoubleToFloat(in_keys_inv=["weight"]), GRPOAdvantage())
    with pytest.raises(ValueError, match="DoubleToFloat comes before GRPOAdvantage.*Put GRPOAdvantage first"):
        buffer.extend(rows(2, 3).set("weight", torch.arange(5).double()))


def test_a_transform_without_an_inverse_may_come_first():
    buffer = make_buffer(CatTensors(["group_id"], "group"), GRPOAdvantage())
    assert len(buffer.extend(NOTHING.clone())) == 0
