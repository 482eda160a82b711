import numpy as np
import pytest
import torch
from torchrl.data.vla import VocabTailActionTokenizer

from torchrl_vla.modules.action_tokenizer import ActionTokenizer

STATISTICS = {
    "action": {
        "q01": [-0.7454732, -0.6616072, -0.9375, -0.1071429, -0.2068, -0.1842857, 0.0],
        "q99": [0.9375, 0.8758929, 0.9321429, 0.1039286, 0.17678571, 0.14571428, 1.0],
        "mask": [True] * 6 + [False],
    },
    "proprio": {
        "q01": [-0.3256, -0.2838, 0.4579, 1.2548, -2.1866, -1.0353, 0.0009, -0.0399],
        "q99": [0.1348, 0.3529, 1.1963, 3.2962, 0.8973, 0.5714, 0.04, -0.0011],
    },
}


def _numpy_decode(ids: np.ndarray) -> np.ndarray:
    """OpenVLA's rule, written out: the centre of the bin below the digitised edge."""
    edges = np.linspace(-1, 1, 256)
    return ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - ids - 1, 0, 254)]


def test_encode_is_numpy_digitize_at_and_around_every_edge() -> None:
    edges = np.linspace(-1, 1, 256)
    values = np.concatenate([edges, np.nextafter(edges, 2), np.nextafter(edges, -2), [-3.0, 3.0]])
    ids = 32000 - np.digitize(np.clip(values, -1, 1), edges)
    tokenizer = ActionTokenizer()
    bins = tokenizer.encode(torch.from_numpy(values))
    assert np.array_equal(tokenizer.bins_to_ids(bins).numpy(), ids)
    assert ids.min() == 31744 and ids.max() == 31999
    # float32 values are compared with the float64 edges, as NumPy does.
    values32 = values.astype(np.float32)
    ids32 = 32000 - np.digitize(np.clip(values32, -1, 1), edges)
    assert np.array_equal(tokenizer.bins_to_ids(tokenizer.encode(torch.from_numpy(values32))).numpy(), ids32)


def test_decode_equals_upstream_to_the_bit_for_every_id() -> None:
    tokenizer = ActionTokenizer()
    ids = torch.tensor([0, 31743, *range(31744, 32000), 32000, 32063])
    decoded = tokenizer.decode(tokenizer.ids_to_bins(ids), dtype=torch.float64)
    assert np.array_equal(decoded.numpy(), _numpy_decode(ids.numpy()))
    bins = torch.arange(256)
    assert torch.equal(tokenizer.ids_to_bins(tokenizer.bins_to_ids(bins)), bins)
    assert tokenizer.decode(bins).dtype == torch.float32


def test_same_token_convention_as_torchrl() -> None:
    # Off the edges: TorchRL's are rounded to float32.
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    values = values[((values + 1) * 127.5).frac().sub(0.5).abs() < 0.499].float()
    bins = ActionTokenizer().encode(values)
    assert torch.equal(bins, VocabTailActionTokenizer(256).encode(values))
    torch.testing.assert_close(ActionTokenizer().decode(bins), VocabTailActionTokenizer(256).decode(bins))


def test_round_trip_is_within_half_a_bin_and_one_percent() -> None:
    values = torch.linspace(-1, 1, 10007)
    tokenizer = ActionTokenizer()
    error = (tokenizer.decode(tokenizer.encode(values)) - values).abs()
    assert error.max() <= 1 / 255 + 1e-6  # half the width of 255 equal cells over [-1, 1]
    assert error.max() / 2 < 0.01


def test_small_vocabulary_keeps_its_tail() -> None:
    tokenizer = ActionTokenizer(vocab_size=300)
    assert tokenizer.bins_to_ids(torch.tensor([0, 255])).tolist() == [44, 299]


def test_unnormalize_equals_the_formula_in_float64() -> None:
    normalised = torch.linspace(-1, 1, 56, dtype=torch.float64).view(8, 7)
    q01, q99 = (np.array(STATISTICS["action"][name]) for name in ("q01", "q99"))
    expected = np.where(
        STATISTICS["action"]["mask"], 0.5 * (normalised.numpy() + 1) * (q99 - q01 + 1e-8) + q01, normalised.numpy()
    )
    tokenizer = ActionTokenizer(STATISTICS)
    assert np.array_equal(tokenizer.unnormalize(normalised).numpy(), expected)
    torch.testing.assert_close(tokenizer.normalize(tokenizer.unnormalize(normalised)), normalised, atol=1e-12, rtol=0)


def test_normalize_clips_where_masked_only() -> None:
    actions = torch.tensor([9.0, -9.0, 0.0, 0.0, 0.0, 0.0, 9.0])
    normalised = ActionTokenizer(STATISTICS).normalize(actions)
    assert normalised[0] == 1 and normalised[1] == -1 and normalised[6] == 9
    assert normalised.dtype == torch.float32


def test_proprio_by_hand() -> None:
    tokenizer = ActionTokenizer(STATISTICS)
    middle = (torch.tensor(STATISTICS["proprio"]["q01"]) + torch.tensor(STATISTICS["proprio"]["q99"])) / 2
    torch.testing.assert_close(tokenizer.normalize_proprio(middle), torch.zeros(8), atol=1e-6, rtol=0)
    assert torch.equal(tokenizer.normalize_proprio(middle + 100), torch.ones(8))
    assert torch.equal(tokenizer.normalize_proprio(middle.expand(4, 2, 8) - 100), -torch.ones(4, 2, 8))


def test_gripper_and_bounds_of_env_actions() -> None:
    tokenizer = ActionTokenizer()
    # Dataset gripper: 1 is open; LIBERO opens with -1. The threshold lies at 0.5.
    gripper = torch.tensor([1.0, 0.51, 0.49, 0.0, -1.0])
    actions = torch.cat([torch.full((5, 6), 3.0), gripper[:, None]], dim=-1)
    env = tokenizer.to_env(actions)
    assert env[:, 6].tolist() == [-1, -1, 1, 1, 1]
    assert (env[:, :6] == 1).all() and env.dtype == torch.float32


@pytest.mark.parametrize("statistics", [None, STATISTICS])
def test_env_actions_survive_the_way_there_and_back(statistics: dict | None) -> None:
    tokenizer = ActionTokenizer(statistics)
    generator = torch.Generator().manual_seed(0)
    normalised = torch.rand(64, 8, 7, generator=generator, dtype=torch.float64) * 2 - 1
    env = tokenizer.to_env(normalised)
    again = tokenizer.bins_to_env(tokenizer.encode(tokenizer.from_env(env)))
    assert torch.equal(env[..., 6], again[..., 6])
    width = (tokenizer.action_q99 - tokenizer.action_q01)[:6]
    assert ((env - again)[..., :6].abs() <= width / 255 + 1e-6).all()
    # LIBERO's "do nothing, gripper open" has gripper -1.
    still = torch.tensor([0.0, 0, 0, 0, 0, 0, -1])
    assert tokenizer.from_env(still)[6] == 1


def test_default_statistics_are_the_identity() -> None:
    actions = torch.linspace(-1, 1, 70, dtype=torch.float64).view(10, 7)
    torch.testing.assert_close(ActionTokenizer().unnormalize(actions), actions, atol=2e-8, rtol=0)
    torch.testing.assert_close(ActionTokenizer().to_env(actions)[:, :6], actions[:, :6].float(), atol=1e-7, rtol=0)


def test_casting_a_policy_leaves_the_statistics_exact() -> None:
    tokenizer = ActionTokenizer(STATISTICS)
    cast = torch.nn.Sequential(tokenizer).to(torch.bfloat16)[0]
    assert cast.statistics() == STATISTICS
    assert cast.bin_centers.dtype == torch.float64


def test_statistics_travel_with_the_state_dict() -> None:
    other = ActionTokenizer()
    other.load_state_dict(ActionTokenizer(STATISTICS).state_dict())
    assert other.statistics() == STATISTICS


def test_bad_statistics() -> None:
    for damaged in (
        3,
        {"action": 3},
        {"action": {"q01": "low", "q99": [1.0]}},
        {"action": {"q01": [None], "q99": [1.0]}},
    ):
        with pytest.raises(ValueError, match="entry 'action', got 3|must have 'q01'.*got 3|must be lists of numbers"):
            ActionTokenizer(damaged)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have 'q01' and 'q99'"):
        ActionTokenizer({"action": {"q01": [0.0]}})
    with pytest.raises(ValueError, match="lists of one length"):
        ActionTokenizer({"action": {"q01": [0.0], "q99": [1.0, 2.0]}})
    with pytest.raises(ValueError, match="'mask'.* has 1 entries"):
        ActionTokenizer({"action": {"q01": [0.0] * 7, "q99": [1.0] * 7, "mask": [True]}})
    with pytest.raises(ValueError, match="must have the entry 'action'"):
        ActionTokenizer({"proprio": STATISTICS["proprio"]})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="n_bins must be at least 2, got 1"):
        ActionTokenizer(n_bins=1)
    with pytest.raises(ValueError, match="vocab_size must be at least n_bins"):
        ActionTokenizer(vocab_size=100)
    with pytest.raises(ValueError, match="NaN"):
        ActionTokenizer().encode(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"state must be \[..., 8\], got \[2, 7\]"):
        ActionTokenizer().normalize_proprio(torch.zeros(2, 7))
