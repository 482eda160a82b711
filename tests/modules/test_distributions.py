import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, set_interaction_type
from torch.distributions import Categorical, kl_divergence
from torchrl.envs import ExplorationType

from torchrl_vla.modules.distributions import SEED_KEY, TokenCategorical, draw_bins, mix_seed, seeded_uniforms


def _logits(*shape: int) -> torch.Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_log_prob_by_hand() -> None:
    # logits / T = ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    logits = 2.0 * torch.tensor([1.0, 2.0, 5.0]).log().expand(8, 7, 3)
    dist = TokenCategorical(logits, temperature=2.0)
    tokens = torch.arange(56).remainder(3).view(8, 7)
    expected = torch.tensor([1 / 8, 2 / 8, 5 / 8]).log()[tokens]
    torch.testing.assert_close(dist.log_prob(tokens), expected)
    entropy = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    torch.testing.assert_close(dist.entropy(), torch.full((8, 7), entropy))
    assert (dist.deterministic_sample == 2).all()
    assert dist.batch_shape == (8, 7) and dist.event_shape == ()


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_agrees_with_torch_categorical(batch: tuple[int, ...]) -> None:
    logits = _logits(*batch, 8, 7, 256)
    ours, theirs = TokenCategorical(logits, 1.6), Categorical(logits=logits / 1.6)
    tokens = theirs.sample()
    torch.testing.assert_close(ours.log_prob(tokens), theirs.log_prob(tokens))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    other = _logits(*batch, 8, 7, 256).flip(-1)
    torch.testing.assert_close(
        kl_divergence(ours, TokenCategorical(other, 0.9)), kl_divergence(theirs, Categorical(logits=other / 0.9))
    )


def test_sampling_follows_the_probabilities() -> None:
    torch.manual_seed(0)
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.9, 0.0, 0.0, 0.1]])
    drawn = TokenCategorical(probs.log()).sample((20000,))
    assert drawn.shape == (20000, 2)
    frequency = torch.nn.functional.one_hot(drawn, 5).float().mean(0)
    torch.testing.assert_close(frequency, probs, atol=0.015, rtol=0)
    assert (frequency[probs == 0] == 0).all()


def test_samples_of_different_tokens_are_independent() -> None:
    torch.manual_seed(0)
    drawn = TokenCategorical(torch.zeros(8, 7, 256)).sample((200,)).float().view(200, 56)
    correlation = torch.corrcoef(drawn.T) - torch.eye(56)
    assert correlation.abs().max() < 0.35


def test_sampling_is_seeded_and_leaves_no_graph() -> None:
    logits = _logits(4, 8, 7, 256).requires_grad_()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(TokenCategorical(logits, 1.6).sample())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.int64 and not draws[0].requires_grad


def test_a_generator_of_the_module_is_used() -> None:
    def draw(generator: int) -> torch.Tensor:
        module = ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["tokens"], distribution_class=TokenCategorical, generator=generator
        )
        with set_interaction_type(ExplorationType.RANDOM):
            return module(TensorDict(logits=torch.zeros(3, 8, 7, 256), batch_size=[3]))["tokens"]

    assert torch.equal(draw(5), draw(5)) and not torch.equal(draw(5), draw(6))


def test_higher_temperature_is_flatter() -> None:
    logits = _logits(8, 7, 256)
    cold, warm = TokenCategorical(logits, 0.5), TokenCategorical(logits, 1.6)
    assert (warm.entropy() > cold.entropy()).all()
    assert torch.equal(cold.mode, warm.mode)


def test_temperature_zero_is_greedy() -> None:
    logits = _logits(2, 8, 7, 256)
    dist = TokenCategorical(logits, temperature=0.0)
    best = logits.argmax(-1)
    assert torch.equal(dist.sample(), best)
    assert torch.equal(dist.sample((3,)), best.expand(3, 2, 8, 7))
    assert torch.equal(dist.log_prob(best), torch.zeros(2, 8, 7))
    assert (dist.log_prob((best + 1) % 256) == -math.inf).all()
    assert torch.equal(dist.entropy(), torch.zeros(2, 8, 7))
    # All mass on the best bin: the divergence is minus its log-probability under the other distribution.
    other = TokenCategorical(logits, 1.0)
    torch.testing.assert_close(kl_divergence(dist, other), -other.log_prob(best))
    assert (kl_divergence(other, dist) == math.inf).all()


def test_bf16_logits_are_computed_with_in_float32() -> None:
    logits = _logits(8, 7, 256).to(torch.bfloat16)
    tokens = logits.argmin(-1)
    log_prob = TokenCategorical(logits, 1.6).log_prob(tokens)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, torch.log_softmax(logits.float() / 1.6, -1).gather(-1, tokens[..., None])[..., 0])


def test_gradient_of_log_prob_by_hand() -> None:
    # d log p_k / d logits = (onehot_k - p) / T
    logits = _logits(8, 7, 256).requires_grad_()
    tokens = torch.full((8, 7), 11)
    dist = TokenCategorical(logits, 1.6)
    dist.log_prob(tokens).sum().backward()
    expected = (torch.nn.functional.one_hot(tokens, 256) - dist.probs.detach()) / 1.6
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize(("event_dims", "shape"), [(1, (3, 8)), (2, (3,))])
def test_events_of_several_tokens_are_sums(event_dims: int, shape: tuple[int, ...]) -> None:
    logits = _logits(3, 8, 7, 16)
    token, event = TokenCategorical(logits, 1.6), TokenCategorical(logits, 1.6, event_dims)
    other = TokenCategorical(logits.flip(-1), 0.9), TokenCategorical(logits.flip(-1), 0.9, event_dims)
    dims = tuple(range(-event_dims, 0))
    drawn = event.sample((5,))
    assert drawn.shape == (5, 3, 8, 7) and event.batch_shape == shape
    torch.testing.assert_close(event.log_prob(drawn), token.log_prob(drawn).sum(dims))
    torch.testing.assert_close(event.entropy(), token.entropy().sum(dims))
    torch.testing.assert_close(kl_divergence(event, other[1]), kl_divergence(token, other[0]).sum(dims))
    assert event.expand((2, *shape)).sample().shape == (2, 3, 8, 7)
    with pytest.raises(ValueError, match="event_dims must be from 0 to 3"):
        TokenCategorical(logits, event_dims=4)


def test_expand_and_extreme_logits() -> None:
    logits = torch.tensor([0.0, -1e4, 1e4])
    dist = TokenCategorical(logits).expand(torch.Size([4]))
    assert dist.batch_shape == (4,)
    assert torch.equal(dist.log_prob(torch.tensor([2, 2, 0, 1])), torch.tensor([0.0, 0.0, -1e4, -2e4]))
    assert torch.equal(dist.entropy(), torch.zeros(4))


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be finite and >= 0"):
        TokenCategorical(torch.zeros(8, 7, 256), temperature)


def test_tokens_out_of_range_are_refused_when_validating() -> None:
    with pytest.raises(ValueError, match="within the support"):
        TokenCategorical(torch.zeros(8, 7, 256), validate_args=True).log_prob(torch.full((8, 7), 256))


def test_splitmix64_reference_outputs() -> None:
    # The first outputs of the reference implementation (https://prng.di.unimi.it/splitmix64.c) from state 1234567.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    mixed = mix_seed(torch.tensor(1234567), torch.arange(1, 6))
    assert [word % 2**64 for word in mixed.tolist()] == outputs
    uniform = seeded_uniforms(torch.tensor([[1234567]]), 5)
    assert uniform.tolist() == [[(word >> 40) / 2**24 for word in outputs]]


def test_seeded_samples_belong_to_their_decisions() -> None:
    logits = _logits(5, 8, 7, 256)
    seed = torch.tensor([[3], [-4], [2**62], [0], [3]])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    tokens = TokenCategorical(logits, 1.6, seed=seed).sample()
    assert torch.equal(torch.get_rng_state(), state)
    for row in range(5):
        alone = TokenCategorical(logits[row], 1.6, seed=seed[row])
        assert torch.equal(alone.sample(), tokens[row])
    same = TokenCategorical(logits[:1].expand(5, 8, 7, 256), 1.6, seed=seed).sample()
    assert torch.equal(same[0], same[4]) and not torch.equal(same[0], same[1])
    for event_dims in (1, 2):  # what a log-probability spans has no part in it
        assert torch.equal(TokenCategorical(logits, 1.6, event_dims, seed=seed).sample(), tokens)
    expanded = TokenCategorical(logits, 1.6, seed=seed).expand(torch.Size([2, 5, 8, 7]))
    assert torch.equal(expanded.sample(), tokens.expand(2, 5, 8, 7))
    several = TokenCategorical(logits, 1.6, seed=seed).sample((3,))
    assert several.shape == (3, 5, 8, 7) and not torch.equal(several[0], several[1])


def test_inverse_transform_at_exact_thresholds() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    below = torch.nextafter(torch.tensor([0.25, 0.75, 1.0]), torch.tensor(0.0))
    uniform = torch.tensor([0.0, below[0], 0.25, below[1], 0.75, below[2]])
    assert draw_bins(probs, uniform).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_no_draw_is_out_of_range_or_without_mass(scale: float) -> None:
    probs = torch.softmax(scale * torch.randn(2000, 256, generator=torch.Generator().manual_seed(0)), -1)
    probs[:, :3] = probs[:, -3:] = 0.0  # so that 0 and the largest number meet bins of no mass
    for number in (0.0, 1 - 2.0**-24):
        drawn = draw_bins(probs, torch.full((2000, 1), number))
        assert 0 <= drawn.min() and drawn.max() < 256
        assert (probs.gather(-1, drawn) > 0).all()


def test_seeded_samples_follow_the_probabilities() -> None:
    bins, decisions = 16, 4000
    logits = _logits(7, bins)
    seed = mix_seed(torch.tensor(5), torch.arange(decisions)).unsqueeze(-1)
    drawn = TokenCategorical(logits.expand(decisions, 7, bins), 1.6, seed=seed).sample()
    expected = decisions * torch.softmax(logits / 1.6, -1)
    observed = torch.nn.functional.one_hot(drawn, bins).sum(0)
    chi_square = ((observed - expected).square() / expected).sum(-1)
    # 15 degrees of freedom: 37.7 is exceeded once in a thousand.
    assert (chi_square < 37.7).all() and chi_square.sum() > 40  # nor are they evener than chance (105 expected)
    uniform = seeded_uniforms(seed, 7)
    correlation = torch.corrcoef(torch.cat([uniform, uniform.roll(1, 0)], -1).T) - torch.eye(14)
    assert correlation.abs().max() < 0.06


def test_a_module_passes_the_seeds_where_there_are_any() -> None:
    module = ProbabilisticTensorDictModule(
        in_keys={"logits": "logits", "seed": SEED_KEY},
        out_keys=["tokens"],
        distribution_class=TokenCategorical,
        return_log_prob=True,
    )
    logits = _logits(3, 8, 7, 256)
    data = TensorDict({"logits": logits, SEED_KEY: torch.tensor([[1], [2], [3]])}, [3])
    with set_interaction_type(ExplorationType.RANDOM):
        tokens = module(data.clone())["tokens"]
        assert torch.equal(module(data[1:].clone())["tokens"], tokens[1:])
        torch.manual_seed(0)
        without = module(data.exclude(SEED_KEY))["tokens"]
    torch.manual_seed(0)
    assert torch.equal(TokenCategorical(logits).sample(), without)
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.MODE, ExplorationType.MEAN):
        with set_interaction_type(mode):
            assert torch.equal(module(data.clone())["tokens"], logits.argmax(-1))


@pytest.mark.parametrize("seed", [torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 1), torch.zeros(3).long()])
def test_seeds_that_are_not_one_per_decision_are_refused(seed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"seed must be int64 \[\*B, 1\]"):
        TokenCategorical(torch.zeros(3, 8, 7, 256), seed=seed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_without_waiting_for_it() -> None:
    logits, seed = _logits(5, 8, 7, 256), torch.arange(5).unsqueeze(-1)
    expected = TokenCategorical(logits, 1.6, seed=seed).sample()
    on_gpu, seed = logits.cuda(), seed.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = TokenCategorical(on_gpu, 1.6, seed=seed).sample()
        uniform = seeded_uniforms(seed, 56)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(uniform.cpu(), seeded_uniforms(seed.cpu(), 56))
    assert (drawn.cpu() == expected).float().mean() > 0.99  # but for sums that round otherwise at a threshold
