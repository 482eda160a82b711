"""Base OpenVLA's actor: upstream's golden tokens and actions, shapes, sampling, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_openvla import decided_model, small_openvla_config
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_vla.checkpoints.openvla_format import load_openvla
from torchrl_vla.modules import (
    ActionTokenizer,
    OpenVLAAutoregressiveActor,
    OpenVLAProcessor,
    build_tokenizer,
    load_tokenizer,
    make_autoregressive_actor,
)

DATA = Path(__file__).parents[1] / "data" / "openvla"
TOKENS = ("vla_action", "tokens")
GOLDEN_INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"
INSTRUCTIONS = {4: "open the top drawer", 7: "put the black bowl on the plate and open the top drawer"}


class GivenPixels:
    """In the place of the image pipeline, which has tests of its own: upstream's golden pixel values."""

    def __init__(self, pixel_values: torch.Tensor) -> None:
        self.pixel_values, self.image_size = pixel_values, pixel_values.shape[-1]

    def __call__(self, frames: torch.Tensor, device: torch.device) -> torch.Tensor:
        return self.pixel_values.expand(len(frames), -1, -1, -1).to(device)


@pytest.fixture(scope="module")
def base(copy_release: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Upstream's tiny checkpoint as base OpenVLA: no heads, statistics in config.json."""
    folder = copy_release(tmp_path_factory.mktemp("release") / "base")
    for path in [*folder.glob("*.pt"), folder / "dataset_statistics.json"]:
        path.unlink()
    return folder


def small_actor(temperature: float = 0.0, **overrides: object) -> OpenVLAAutoregressiveActor:
    config = small_openvla_config(**{"use_proprio": False, **overrides})
    model = decided_model(config)
    tokenizer = build_tokenizer(INSTRUCTIONS.values(), vocab_size=config.tokenizer_vocab_size)
    actions = ActionTokenizer(vocab_size=config.tokenizer_vocab_size)
    processor = OpenVLAProcessor(tokenizer, actions, image_size=28, backend="fast")
    return make_autoregressive_actor(model, processor, temperature=temperature, instructions=INSTRUCTIONS)


def observations(*batch: int) -> TensorDict:
    torch.manual_seed(1)
    image = torch.randint(256, (*batch, 3, 32, 32), dtype=torch.uint8)
    count = torch.Size(batch).numel()
    tasks = torch.tensor([4, 7, 7, 4, 7, 4])[:count].view(*batch, 1)
    return TensorDict(observation=TensorDict(image=image, batch_size=batch), task_id=tasks, batch_size=batch)


def test_tokens_and_action_are_upstreams(base: Path) -> None:
    data = load_file(DATA / "openvla_ar.safetensors")
    model = load_openvla(base)
    actions = ActionTokenizer(model.config.statistics["bridge_orig"])
    processor = OpenVLAProcessor(load_tokenizer(base), actions, image_size=56)
    processor.images = GivenPixels(data["pixel_values"])  # type: ignore[assignment]
    actor = make_autoregressive_actor(model, processor)
    frames = torch.zeros(3, 64, 64, dtype=torch.uint8)
    decision = actor(
        TensorDict(observation=TensorDict(image=frames), language_instruction=GOLDEN_INSTRUCTION, state=torch.zeros(8))
    )
    assert decision[TOKENS].shape == (1, 7) and decision["action"].shape == (7,)
    assert torch.equal(actions.bins_to_ids(decision[TOKENS]), data["generated_ids"])
    existing = model.generate_autoregressive(data["pixel_values"], data["input_ids"], data["attention_mask"])
    assert torch.equal(actions.bins_to_ids(decision[TOKENS]), existing)
    # Upstream's action has the data set's units; LIBERO turns its gripper round: 0.478 is closed, +1.
    expected = data["actions"].float()
    assert 0.4 < expected[-1] < 0.5
    torch.testing.assert_close(decision["action"][:6], expected[:6], atol=1e-7, rtol=0)
    assert decision["action"][6] == 1


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_batch_is_what_its_elements_are(batch: tuple[int, ...]) -> None:
    actor = small_actor()
    data = observations(*batch) if batch else observations(1)[0]
    whole = actor(data.clone())
    assert whole[TOKENS].shape == (*batch, 1, 7) and whole["action"].shape == (*batch, 7)
    assert torch.equal(actor.action_tokenizer.bins_to_env(whole[TOKENS]).squeeze(-2), whole["action"])
    for index in range(whole.numel()):
        element = data.reshape(-1)[index]
        assert torch.equal(actor(element.clone())[TOKENS], whole.reshape(-1)[index][TOKENS])


def test_exploration_decides_between_greedy_and_sampling() -> None:
    actor, data = small_actor(temperature=1.0), observations(6)
    greedy = small_actor()(data.clone())[TOKENS]
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(actor(data.clone())[TOKENS], greedy)
    with set_exploration_type(ExplorationType.RANDOM):
        first, second = (actor(data.clone())[TOKENS] for _ in range(2))
        assert not torch.equal(first, second) and not torch.equal(first, greedy)
        assert torch.equal(small_actor()(data.clone())[TOKENS], greedy)


@pytest.mark.parametrize(("rows", "bin_"), [((5, 6), 0), ((520, 521), 255)], ids=["text", "padding"])
def test_a_token_that_is_no_action_becomes_the_nearest_one(rows: tuple[int, int], bin_: int) -> None:
    """Upstream clips: text tokens, whose ids are below, give the highest action; padding rows give the lowest."""
    actor = small_actor(temperature=1.0)
    head = actor.model.language_model.lm_head.weight.data
    # Whatever a state's first entry is, one of the two rows is the largest logit, and no other row differs from zero.
    head.zero_()
    head[rows[0], 0], head[rows[1], 0] = 1.0, -1.0
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert (actor(observations(6))[TOKENS] == bin_).all()
    # Sampling takes action tokens alone: here each of them is as likely as the others.
    assert len(actor(observations(6))[TOKENS].unique()) > 20


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="reads the robot's state.*decode its tokens in parallel"):
        small_actor(use_proprio=True)
    with pytest.raises(ValueError, match="temperature must be finite and >= 0 .0 is greedy., got -1"):
        small_actor(temperature=-1.0)
    actor = small_actor()
    processor = OpenVLAProcessor(actor.processor.tokenizer, ActionTokenizer(), image_size=28)
    with pytest.raises(ValueError, match="has 32000 tokens, the model's 512: make it with vocab_size=512"):
        make_autoregressive_actor(actor.model, processor)


def test_a_decisions_seed_decides_its_tokens() -> None:
    actor = small_actor(temperature=1.0)
    data = observations(4).set("decision_seed", torch.tensor([[3], [4], [5], [3]]))
    torch.manual_seed(0)
    tokens = actor(data.clone())[TOKENS]
    torch.manual_seed(1)
    assert torch.equal(actor(data.clone())[TOKENS], tokens)
    assert torch.equal(actor(data[1:3].clone())[TOKENS], tokens[1:3])
    assert torch.equal(actor(data[2].clone())[TOKENS], tokens[2])
    assert not torch.equal(actor(data.exclude("decision_seed"))[TOKENS], tokens)
