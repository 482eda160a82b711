import copy
import pickle

import pytest
import torch
from small_openvla import decided_model, small_openvla_config
from tensordict import LazyStackedTensorDict, NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import EnvBase, ExplorationType, SerialEnv, set_exploration_type
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import A2CLoss, ClipPPOLoss, ReinforceLoss
from torchrl.objectives.value import GAE

from torchrl_vla.modules import (
    ActionTokenizer,
    NonFiniteError,
    OpenVLA,
    OpenVLAActor,
    OpenVLAProcessor,
    TokenCategorical,
    ValueHead,
    build_tokenizer,
    make_actor,
    make_l1_actor,
    make_value_operator,
)

TOKENS, LOG_PROBS = ("vla_action", "tokens"), ("vla_action", "log_probs")
TASKS = ["open the top drawer", "put the black bowl on the plate and open the top drawer"]


def _actor(log_prob_level: str = "token", instructions: dict | None = None, **overrides: object) -> OpenVLAActor:
    config = small_openvla_config(**overrides)
    model = decided_model(config)
    processor = OpenVLAProcessor(
        build_tokenizer(TASKS, vocab_size=config.tokenizer_vocab_size), ActionTokenizer(), image_size=28, backend="fast"
    )
    return make_actor(model, processor, log_prob_level=log_prob_level, instructions=instructions)


def _observations(*batch: int, seed: int = 0, wrist: bool = False) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    frames = {
        name: torch.randint(256, (*batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
        for name in ("image", *(["wrist_image"] if wrist else []))
    }
    observation = TensorDict(frames, batch)
    observation["state"] = torch.rand(*batch, 8, generator=generator)
    data = TensorDict({"observation": observation}, batch)
    count = max(1, int(torch.Size(batch).numel()))
    names = [TASKS[index % 2] for index in range(count)]
    for size in reversed(batch[1:]):
        names = [NonTensorStack(*names[start : start + size]) for start in range(0, len(names), size)]
    data["language_instruction"] = NonTensorStack(*names) if batch else names[0]
    data["task_id"] = torch.arange(count).remainder(2).view(*batch, 1)
    return data


class FrameEnv(EnvBase):
    """Random frames for three decisions; rewards a positive first action."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec = Composite(
            observation=Composite(
                image=Bounded(0, 255, (3, 32, 32), dtype=torch.uint8), state=Unbounded((8,), dtype=torch.float32)
            ),
            language_instruction=NonTensor((), example_data="x"),
        )
        self.action_spec = Bounded(-1.0, 1.0, (2, 7))
        self.reward_spec = Unbounded((1,))
        self.done_spec = Composite(
            done=Categorical(2, (1,), dtype=torch.bool), terminated=Categorical(2, (1,), dtype=torch.bool)
        )
        self._generator = torch.Generator().manual_seed(0)
        self._step_count = 0

    def _observe(self) -> TensorDict:
        frame = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=self._generator)
        data = TensorDict(observation=TensorDict(image=frame, state=torch.zeros(8)))
        data["language_instruction"] = NonTensorData(TASKS[0])
        return data

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: object) -> TensorDict:
        self._step_count = 0
        return self._observe()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self._step_count += 1
        done = torch.tensor([self._step_count == 3])
        reward = (tensordict["action"][0, :1] > 0).float()
        return self._observe().update({"reward": reward, "done": done, "terminated": done})

    def _set_seed(self, seed: int | None) -> None:
        self._generator.manual_seed(seed or 0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch_shape(batch: tuple[int, ...]) -> None:
    actor = _actor()
    data = actor(_observations(*batch))
    assert isinstance(actor, ProbabilisticActor)
    assert data["action"].shape == (*batch, 2, 7) and data["action"].dtype == torch.float32
    assert data[TOKENS].shape == (*batch, 2, 7) and data[TOKENS].dtype == torch.int64
    assert data[LOG_PROBS].shape == (*batch, 2, 7) and data[LOG_PROBS].dtype == torch.float32
    assert set(data["vla_action"].keys()) == {"tokens", "log_probs"}
    # Row by row the same numbers, whatever the batch.
    flat = data.reshape(-1)
    for index in range(len(flat)):
        alone = actor.get_dist(flat[index]).log_prob(flat[index][TOKENS])
        torch.testing.assert_close(alone, flat[index][LOG_PROBS], atol=1e-5, rtol=0)


def test_rollout_log_probs_are_those_of_the_update_to_the_bit() -> None:
    actor = _actor()
    with torch.no_grad():
        data = actor(_observations(6))
    log_probs = actor.get_dist(data.copy()).log_prob(data[TOKENS])
    assert log_probs.requires_grad and torch.equal(log_probs, data[LOG_PROBS])
    # Another batch size and another padding: other kernels, same numbers up to rounding.
    parts = [actor.get_dist(part).log_prob(part[TOKENS]) for part in (data[:1], data[1:4], data[4:])]
    torch.testing.assert_close(torch.cat(parts), data[LOG_PROBS], atol=1e-5, rtol=0)


def test_tokens_decode_to_the_action() -> None:
    actor = _actor()
    data = actor(_observations(4))
    expected = ActionTokenizer().decode(data[TOKENS])
    torch.testing.assert_close(data["action"][..., :6], expected[..., :6])
    assert torch.equal(data["action"][..., 6], -(2 * expected[..., 6] - 1).sign())


def test_chunk_of_one_has_no_chunk_dimension() -> None:
    data = _actor(chunk_size=1)(_observations(3))
    assert data["action"].shape == (3, 7) and data[TOKENS].shape == (3, 1, 7)


def test_two_cameras_are_told_apart_and_state_is_optional() -> None:
    actor = _actor(num_images=2, use_proprio=False)
    assert ("observation", "wrist_image") in actor.in_keys and ("observation", "state") not in actor.in_keys
    data = _observations(2, wrist=True)
    swapped = data.clone()
    swapped["observation", "image"], swapped["observation", "wrist_image"] = (
        data["observation", "wrist_image"],
        data["observation", "image"],
    )
    with torch.no_grad():
        assert not torch.allclose(actor.get_dist(data).logits, actor.get_dist(swapped).logits, atol=1e-3)


def test_state_and_instruction_matter() -> None:
    actor = _actor()
    base, state, task = _observations(2), _observations(2), _observations(2)
    state["observation", "state"] = 1 - state["observation", "state"]
    task["language_instruction"] = NonTensorStack(TASKS[1], TASKS[0])
    with torch.no_grad():
        logits = [actor.get_dist(data).logits for data in (base, state, task)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-3) and not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_one_instruction_for_the_whole_batch_and_lazy_stacks() -> None:
    actor = _actor()
    data = _observations(2)
    data["language_instruction"] = TASKS[0]
    stacked = LazyStackedTensorDict(*_observations(2).unbind(0))
    with torch.no_grad():
        same = actor.get_dist(data).logits
        lazy = actor.get_dist(stacked).logits
        torch.testing.assert_close(lazy, actor.get_dist(_observations(2)).logits)
    torch.testing.assert_close(same[0], lazy[0], atol=1e-5, rtol=0)


def test_task_ids_stand_for_instructions() -> None:
    strings, numbers = _actor(), _actor(instructions=dict(enumerate(TASKS)))
    assert "task_id" in numbers.in_keys and "language_instruction" not in numbers.in_keys
    data = _observations(2, 3)
    assert torch.equal(
        strings.get_dist(data.copy()).logits, numbers.get_dist(data.exclude("language_instruction")).logits
    )
    data["task_id"][0, 0] = 7
    with pytest.raises(ValueError, match=r"task_id \[7\] have no instruction; instructions has \[0, 1\]"):
        numbers.get_dist(data)


def test_exploration_type_and_temperature() -> None:
    actor = _actor()
    data = _observations(4)
    best = actor.get_dist(data.copy()).logits.argmax(-1)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        decision = actor(data.copy())
    assert torch.equal(decision[TOKENS], best)
    expected = TokenCategorical(actor.get_dist(data.copy()).logits, 1.6).log_prob(best)
    assert torch.equal(decision[LOG_PROBS], expected)
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(actor(data.copy())[TOKENS], best)
        actor.temperature = 0.0
        assert torch.equal(actor(data.copy())[TOKENS], best)
    loss = ClipPPOLoss(actor, None)
    actor.temperature = 0.7
    assert loss.actor_network.temperature == 0.7
    assert actor.get_dist(data.copy()).temperature == 0.7
    assert not torch.equal(actor(data.copy())[TOKENS], best), "samples unless told otherwise"
    with pytest.raises(ValueError, match="temperature must be finite"):
        actor.temperature = -1.0


def test_sampling_follows_the_seed() -> None:
    actor = _actor()
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(actor(_observations(4))[TOKENS])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def _batch(actor: OpenVLAActor) -> TensorDict:
    with torch.no_grad():
        data = actor(_observations(4))
    data["advantage"] = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    data["value_target"] = torch.ones(4, 1)
    return data


def test_clip_ppo_loss_and_its_gradient() -> None:
    actor = _actor()
    data = _batch(actor)
    loss = ClipPPOLoss(actor, None, entropy_bonus=False)
    out = loss(data)
    # Nothing has changed since the rollout: the ratio is 1 and the objective minus the mean advantage.
    torch.testing.assert_close(out["loss_objective"], torch.tensor(0.0), atol=1e-6, rtol=0)
    assert out["kl_approx"] == 0 and out["clip_fraction"] == 0
    out["loss_objective"].backward()
    grads = {name: parameter.grad for name, parameter in actor.named_parameters()}
    head = grads["module.0.model.language_model.lm_head.weight"]
    rows = actor.backbone.model.config.action_token_begin
    assert head[rows : rows + 256].abs().sum() > 0 and head[:rows].abs().sum() == 0
    assert grads["module.0.model.projector.fc1.weight"].abs().sum() > 0
    # By hand: at ratio 1 the gradient is that of - mean(advantage * log_prob).
    other = _actor()
    surrogate = -(data["advantage"][..., None] * other.get_dist(data.copy()).log_prob(data[TOKENS])).mean()
    surrogate.backward()
    weight = other.backbone.model.language_model.lm_head.weight
    torch.testing.assert_close(head, weight.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("loss_class", [ClipPPOLoss, A2CLoss, ReinforceLoss])
def test_stock_losses_with_the_value_head(loss_class: type, functional: bool) -> None:
    actor = _actor(log_prob_level="chunk")
    operator = make_value_operator(actor, ValueHead(64, (16, 8)))
    loss = loss_class(actor, operator if loss_class is A2CLoss else operator[-1], functional=functional)
    loss.set_keys(action=TOKENS, sample_log_prob=LOG_PROBS)
    data = _batch(actor)
    assert data[LOG_PROBS].shape == (4,)
    forwards: list[object] = []
    actor.backbone.model.projector.register_forward_hook(lambda *args: forwards.append(args))
    out = loss(data)
    if not functional:
        assert len(forwards) == (2 if loss_class is A2CLoss else 1)
    sum(value.sum() for name, value in out.items() if name.startswith("loss_")).backward()
    for module in (actor, operator[-1]):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_reinforce_on_whole_chunks_by_hand() -> None:
    actor = _actor(log_prob_level="chunk")
    data = _batch(actor)
    log_prob = actor.get_dist(data.copy()).log_prob(data[TOKENS])
    assert log_prob.shape == (4,) and torch.equal(log_prob, data[LOG_PROBS])
    per_token = _actor().get_dist(data.copy()).log_prob(data[TOKENS])
    torch.testing.assert_close(log_prob, per_token.sum((-1, -2)))
    operator = make_value_operator(actor, ValueHead(64, (16, 8)))
    loss = ReinforceLoss(actor, operator[-1])
    loss.set_keys(action=TOKENS)
    torch.testing.assert_close(loss(data.copy())["loss_actor"], -(data["advantage"][:, 0] * log_prob).mean())
    assert _actor(log_prob_level="action")(_observations(4))[LOG_PROBS].shape == (4, 2)


def _episodes(actor: OpenVLAActor, operator: torch.nn.Module) -> tuple[TensorDict, torch.Tensor]:
    """Two episodes of three decisions, the first ending in success, and the values of their four observations."""
    episode = _observations(2, 4)
    values = operator(episode.copy())["state_value"].detach()
    data = episode[:, :3].clone()
    data["next"] = episode[:, 1:].clone()
    data["next", "reward"] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])[..., None]
    data["next", "done"] = torch.tensor([[False, False, True]] * 2)[..., None]
    data["next", "terminated"] = torch.tensor([[False, False, True], [False] * 3])[..., None]
    return data, values


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("options", [{}, {"deactivate_vmap": True}, {"shifted": True}], ids=str)
def test_stock_gae_with_the_value_operator(options: dict, accelerated: bool) -> None:
    """As it comes, by vmap over observations and following ones; against the recursion by hand."""
    actor = _actor(instructions=dict(enumerate(TASKS)))
    operator = make_value_operator(actor, ValueHead(64, (16, 8)))
    assert isinstance(operator[-1], ValueOperator) and operator[-1].in_keys == [("vla_action", "hidden")]
    assert operator[0] is actor.backbone
    data, values = _episodes(actor, operator)
    assert values.shape == (2, 4, 1) and values.std() > 1e-3
    if accelerated:
        actor.backbone.model.accelerate(compile_layers=False)
    gamma, lmbda = 0.9, 0.8
    advantage, following = torch.zeros(2, 3, 1), torch.zeros(2, 1)
    for step in (2, 1, 0):
        goes_on = ~data["next", "terminated"][:, step]
        delta = data["next", "reward"][:, step] + gamma * values[:, step + 1] * goes_on - values[:, step]
        following = delta + gamma * lmbda * following * ~data["next", "done"][:, step]
        advantage[:, step] = following
    GAE(gamma=gamma, lmbda=lmbda, value_network=operator, **options)(data)
    torch.testing.assert_close(data["advantage"], advantage, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(data["value_target"], advantage + values[:, :3], atol=1e-5, rtol=1e-4)
    # The policy is as it was, and learns.
    actor.get_dist(_observations(2)).log_probs.sum().backward()
    assert all(p.requires_grad for p in actor.parameters())


def test_values_under_vmap_over_parameters_and_observations() -> None:
    """As a loss with target parameters estimates values; the gradient is the plain network's."""
    actor = _actor(instructions=dict(enumerate(TASKS)))
    operator = make_value_operator(actor, ValueHead(64, (16, 8)))
    data = _observations(2, 3).exclude("language_instruction")
    weight, gradients = actor.backbone.model.projector.fc1.weight, []
    for values in (torch.vmap(lambda data: operator(data)["state_value"])(data.copy()), operator(data)["state_value"]):
        gradients += torch.autograd.grad(values.sum(), weight)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)

    def value(params: TensorDict, data: TensorDict) -> torch.Tensor:
        with params.to_module(operator):
            return operator(data)["state_value"]

    params = TensorDict.from_module(operator).data
    both = torch.stack([params, params.apply(lambda x: x * 1.1 if x.is_floating_point() else x)])
    found = torch.vmap(value, (0, None))(both, data.copy())
    assert (found[0] - found[1]).abs().max() > 1e-3
    for index in range(2):
        torch.testing.assert_close(found[index], value(both[index], data.copy()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("reads_ids", [False, True])
def test_a_weight_that_is_not_finite_is_refused(reads_ids: bool, greedy: bool, number: float) -> None:
    actor = _actor(instructions=dict(enumerate(TASKS)) if reads_ids else None)
    with torch.no_grad():
        actor.backbone.model.language_model.model.norm.weight[3] = number
    kind = ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM
    with set_exploration_type(kind), pytest.raises(NonFiniteError) as error:
        actor(_observations(2, 3))
    text = str(error.value)
    assert "the policy's logits are not finite in 6 of 6 decisions" in text and TASKS[0] in text and TASKS[1] in text
    assert "its state was finite" in text and ("task_id 0" in text) == reads_ids


def test_the_task_whose_logits_are_not_finite_is_named() -> None:
    """A token that the other task's prompt has not."""
    actor = _actor(instructions=dict(enumerate(TASKS)))
    word = actor.backbone.processor.tokenizer.convert_tokens_to_ids("bowl")
    with torch.no_grad():
        actor.backbone.model.language_model.model.embed_tokens.weight[word] = float("nan")
    with pytest.raises(NonFiniteError, match=r"in 2 of 5 decisions \(task_id 1, 'put the black bowl"):
        actor(_observations(5))
    actor(_observations(5)[::2])


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_a_state_that_is_not_finite_is_refused_by_name(number: float) -> None:
    actor = _actor(instructions=dict(enumerate(TASKS)))
    data = _observations(2, 3)
    data["observation", "state"][1, 0, 4] = number
    for call in (actor, actor.get_dist, make_value_operator(actor, ValueHead(64))):
        with pytest.raises(NonFiniteError, match=r"observation.state is not finite in 1 of 6 .*decision 3 \(task_id 1"):
            call(data.copy())


def test_an_l1_action_that_is_not_finite_is_refused() -> None:
    config = small_openvla_config()
    model = OpenVLA(config, use_l1_head=True)
    tokenizer = build_tokenizer(TASKS, vocab_size=config.tokenizer_vocab_size)
    actor = make_l1_actor(model, OpenVLAProcessor(tokenizer, ActionTokenizer(), image_size=28, backend="fast"))
    assert actor(_observations(2))["action"].isfinite().all()
    with torch.no_grad():
        model.action_head.model.fc2.bias[2] = float("nan")
    with pytest.raises(NonFiniteError, match="the policy's actions are not finite in 2 of 2 decisions"):
        actor(_observations(2))


def test_hidden_state_is_the_mean_over_the_action_rows() -> None:
    actor = _actor()
    outputs: list = []
    actor.backbone.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    hidden = actor.backbone(_observations(2, 3))["vla_action", "hidden"]
    assert outputs[0].hidden_states.shape == (6, 14, 64)
    torch.testing.assert_close(hidden, outputs[0].hidden_states.mean(1).view(2, 3, 64))


def test_rollout_keeps_neither_logits_nor_hidden_states() -> None:
    actor = _actor()
    env = SerialEnv(2, FrameEnv)
    rollout = env.rollout(3, actor, break_when_any_done=False)
    keys = {key for key in rollout.keys(True, True) if "vla_action" in key}
    assert keys == {TOKENS, LOG_PROBS}
    assert torch.equal(actor.get_dist(rollout[:, 0]).log_prob(rollout[:, 0][TOKENS]), rollout[:, 0][LOG_PROBS])


@pytest.mark.processes
def test_collector_in_another_process() -> None:
    actor = _actor()
    collector = Collector(
        FrameEnv, actor, frames_per_batch=3, total_frames=6, backend="process", num_workers=1, sync=True
    )
    try:
        for batch in collector:
            # Old and, after the update, new weights.
            score = actor.get_dist(batch.copy()).log_prob(batch[TOKENS])
            torch.testing.assert_close(score, batch[LOG_PROBS], atol=1e-5, rtol=0)
            with torch.no_grad():
                actor.backbone.model.language_model.lm_head.weight.mul_(0.5)
            collector.update_policy_weights_()
    finally:
        collector.shutdown()


def test_copies() -> None:
    actor = _actor()
    data = _observations(2)
    best = actor.get_dist(data.copy()).logits
    for copied in (copy.deepcopy(actor), pickle.loads(pickle.dumps(actor))):
        assert torch.equal(copied.get_dist(data.copy()).logits, best)
        assert next(copied.parameters()) is not next(actor.parameters())


def test_the_model_is_shared_and_statistics_are_saved() -> None:
    actor = _actor()
    assert make_actor(actor.backbone.model, actor.backbone.processor).backbone.model is actor.backbone.model
    assert any(name.endswith("action_tokenizer.proprio_q01") for name in actor.state_dict())


def test_parts_that_do_not_fit() -> None:
    actor = _actor()
    model, processor = actor.backbone.model, actor.backbone.processor
    with pytest.raises(ValueError, match="images of 56 pixels, the model takes 28"):
        make_actor(model, OpenVLAProcessor(processor.tokenizer, ActionTokenizer(), image_size=56))
    with pytest.raises(ValueError, match="100 bins, the model 256"):
        make_actor(model, processor, ActionTokenizer(n_bins=100))
    with pytest.raises(ValueError, match="temperature must be finite"):
        make_actor(model, processor, temperature=float("nan"))
    with pytest.raises(ValueError, match="log_prob_level must be one of token, action, chunk, got 'step'"):
        make_actor(model, processor, log_prob_level="step")
    with pytest.raises(ValueError, match="ends prompts with token 3, the model expects 5"):
        make_actor(_actor(empty_token_id=5).backbone.model, processor)
