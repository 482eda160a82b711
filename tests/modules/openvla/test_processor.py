import warnings

import pytest
import torch

from torchrl_vla.modules.action_tokenizer import ActionTokenizer
from torchrl_vla.modules.openvla.image_pipeline import ImagePipeline
from torchrl_vla.modules.openvla.processor import OpenVLAProcessor
from torchrl_vla.modules.openvla.prompt_table import PromptTable
from torchrl_vla.modules.openvla.tokenizer import build_tokenizer, encode_prompt

SHORT, LONG = "open the drawer", "put the bowl on the plate and open the drawer"
STATISTICS = {
    "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7},
    "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8},
}


def _processor(**options: object) -> OpenVLAProcessor:
    options = {"image_size": 28, "backend": "fast", **options}
    return OpenVLAProcessor(build_tokenizer([SHORT, LONG]), ActionTokenizer(STATISTICS), **options)


def _frames(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_one_camera_with_state() -> None:
    processor = _processor()
    state = torch.full((2, 8), 1.0)
    state[1] = 5.0
    inputs = processor(_frames(2), [SHORT, SHORT], state)
    assert torch.equal(inputs.pixel_values, ImagePipeline(28, backend="fast")(_frames(2)))
    expected = torch.tensor([encode_prompt(processor.tokenizer, SHORT)] * 2)
    assert torch.equal(inputs.input_ids, expected) and inputs.attention_mask is None
    # (1 - -2) / 4 is three quarters of the way from -1 to 1; 5 is clipped.
    assert inputs.proprio is not None and inputs.proprio.dtype == torch.float32
    torch.testing.assert_close(inputs.proprio, torch.tensor([[0.5] * 8, [1.0] * 8]))


def test_two_cameras_in_order_and_no_state() -> None:
    first, second = _frames(3), _frames(3, seed=1)
    inputs = _processor()([first, second], [SHORT] * 3)
    pipeline = ImagePipeline(28, backend="fast")
    assert inputs.pixel_values.shape == (3, 12, 28, 28) and inputs.proprio is None
    assert torch.equal(inputs.pixel_values[:, :6], pipeline(first))
    assert torch.equal(inputs.pixel_values[:, 6:], pipeline(second))


def test_prompts_of_different_length_are_padded_on_the_right() -> None:
    processor = _processor()
    inputs = processor(_frames(2), [SHORT, LONG])
    short, long = (encode_prompt(processor.tokenizer, text) for text in (SHORT, LONG))
    padding = len(long) - len(short)
    assert inputs.input_ids.tolist() == [short + [512] * padding, long]
    assert inputs.attention_mask is not None
    assert inputs.attention_mask.tolist() == [[1] * len(short) + [0] * padding, [1] * len(long)]


def test_prompts_share_a_bucket() -> None:
    processor = _processor(prompt_multiple=8)
    for texts in ([SHORT, SHORT], [SHORT, LONG], [LONG]):
        ids, mask = processor.encode_instructions(texts)
        prompts = [encode_prompt(processor.tokenizer, text) for text in texts]
        length = 8 * -(-max(map(len, prompts)) // 8)
        assert mask is not None
        for row, real, prompt in zip(ids.tolist(), mask.tolist(), prompts, strict=True):
            assert row == prompt + [512] * (length - len(prompt))
            assert real == [1] * len(prompt) + [0] * (length - len(prompt))
    with pytest.raises(ValueError, match="prompt_multiple must be at least 1"):
        _processor(prompt_multiple=0)


def test_an_instruction_is_tokenized_once() -> None:
    processor = _processor()
    expected = processor.encode_instructions([SHORT, LONG])[0]
    processor.tokenizer = None  # any further use would fail
    with pytest.raises(AttributeError):
        processor.encode_instructions(["something new"])
    assert torch.equal(processor.encode_instructions([SHORT] * 2)[0], expected[:1, :17].expand(2, -1))


def test_options_reach_the_pipeline() -> None:
    processor = _processor(backend="exact", center_crop=False)
    expected = ImagePipeline(28, center_crop=False)(_frames(1))
    assert torch.equal(processor(_frames(1), [SHORT]).pixel_values, expected)
    with pytest.raises(ValueError, match="one of exact, fast"):
        _processor(backend="other")


def test_bad_input() -> None:
    processor = _processor()
    with pytest.raises(ValueError, match=r"of one batch size, got \[2\] images, 1 instructions and no states"):
        processor(_frames(2), [SHORT])
    with pytest.raises(ValueError, match=r"got \[2, 3\] images, 2 instructions and 2 states"):
        processor([_frames(2), _frames(3)], [SHORT] * 2, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="blank"):
        processor(_frames(1), [""])
    with pytest.raises(ValueError, match=r"state must be \[..., 8\], got \[1, 7\]"):
        processor(_frames(1), [SHORT], torch.zeros(1, 7))
    with pytest.raises(ValueError, match="images must be uint8"):
        processor(_frames(1).float(), [SHORT])


def test_unknown_words_are_said_once_and_one_prompt_for_two_tasks_is_refused() -> None:
    processor = _processor()
    with pytest.warns(UserWarning, match=r"does not know 'fridge', 'now' in 'open the fridge now'.* reads <unk>"):
        processor.encode_instructions(["open the fridge now"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.encode_instructions(["put the fridge on the bowl", SHORT, "Open  the drawer"])
        with pytest.raises(ValueError, match="'put the now on the bowl' and 'put the fridge on the bowl' have"):
            processor.encode_instructions(["put the now on the bowl"])
    with (
        pytest.warns(UserWarning, match="does not know 'shelf'"),
        pytest.raises(ValueError, match=r"'open the shelf' and 'open the fridge' have the same prompt.*leave one"),
    ):
        PromptTable(_processor(), {0: SHORT, 1: "open the fridge", 2: "open the shelf"})


def test_prompts_are_looked_up_by_task_id() -> None:
    processor = _processor()
    table = PromptTable(processor, {90: SHORT, 4: LONG, 7: SHORT})  # as LIBERO-90 has it: one instruction, two scenes
    ids, mask, unknown = table.look_up(torch.tensor([7, 4, 5, 90, -1, 91]), torch.device("cpu"))
    expected, expected_mask = processor.encode_instructions([SHORT, LONG, SHORT, SHORT])
    assert unknown.tolist() == [False, False, True, False, True, True]
    assert torch.equal(ids[~unknown], expected[:3]) and mask is not None and expected_mask is not None
    assert torch.equal(mask[~unknown], expected_mask[:3])
    _, no_mask, _ = PromptTable(processor, {0: SHORT}).look_up(torch.tensor([0, 0]), torch.device("cpu"))
    assert no_mask is None
    with pytest.raises(ValueError, match="instructions is empty"):
        PromptTable(processor, {})
