import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from torchrl_vla.modules.openvla.tokenizer import build_tokenizer, empty_token_id, encode_prompt, load_tokenizer

LLAMA = Path(__file__).parents[2] / "data" / "llama_tokenizer"  # the pieces of Llama-2's vocabulary that occur below
TASKS = ["pick up the black bowl", "turn on the stove and put the moka pot on it", "open the drawer (left)"]


def test_llama_prompts_have_upstreams_ids() -> None:
    tokenizer = load_tokenizer(LLAMA)
    task = "Pick up the black bowl between the plate and the ramekin and place it on the plate"
    words = [5839, 701, 278, 4628, 12580, 29880, 1546, 278, 15284, 322, 278, 364, 420, 9089, 322, 2058, 372, 373, 278]
    start = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304]
    assert encode_prompt(tokenizer, task) == [*start, *words, 15284, 29973, 13, 3744, 29901, 29871]
    assert empty_token_id(tokenizer) == 29871


def test_small_vocabulary_is_laid_out_as_the_real_one() -> None:
    tokenizer = build_tokenizer(TASKS)
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert empty_token_id(tokenizer) == 3
    assert tokenizer.convert_tokens_to_ids(["<action_0>", "<action_255>", "<PAD>"]) == [256, 511, 512]
    assert tokenizer.pad_token_id == 512
    words = {index for word, index in tokenizer.get_vocab().items() if not word.startswith("<")}
    assert max(words) < 256 and len(words) == len(set(words))


def test_small_prompts() -> None:
    tokenizer = build_tokenizer(TASKS)
    ids = encode_prompt(tokenizer, TASKS[1])
    text = "<s> in : what action should the robot take to turn on the stove and put the moka pot on it ? out : ▁"
    assert tokenizer.convert_ids_to_tokens(ids) == text.split()
    assert encode_prompt(tokenizer, TASKS[1].upper()) == ids
    # Parentheses and the question mark are tokens of their own, words not seen are <unk>.
    tail = encode_prompt(tokenizer, "open the fridge (left)")[10:]
    assert tokenizer.convert_ids_to_tokens(tail) == ["open", "the", "<unk>", "(", "left", ")", "?", "out", ":", "▁"]


def test_small_tokenizer_does_not_depend_on_the_order_of_tasks() -> None:
    assert build_tokenizer(TASKS).get_vocab() == build_tokenizer(TASKS[::-1] * 2).get_vocab()


def test_small_tokenizer_is_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TASKS)
    tokenizer.save_pretrained(tmp_path)
    # Upstream's config.json names code; loading a tokenizer neither runs it nor asks.
    config = {"model_type": "openvla", "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    for task in [*TASKS, "something else"]:
        assert encode_prompt(loaded, task) == encode_prompt(tokenizer, task)
    assert loaded.pad_token_id == 512 and loaded.get_vocab() == tokenizer.get_vocab()
    (tmp_path / "config.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_small_vocabulary_too_small() -> None:
    with pytest.raises(ValueError, match=r"have 32 words.* leaves 14 ids below the 256 action tokens; raise it to 288"):
        build_tokenizer(TASKS, vocab_size=270)
    assert encode_prompt(build_tokenizer(TASKS, vocab_size=288), TASKS[0])[-1] == 3
    with pytest.raises(ValueError, match="no instructions"):
        build_tokenizer([])


def test_blank_instruction() -> None:
    with pytest.raises(ValueError, match="language_instruction is blank"):
        encode_prompt(build_tokenizer(TASKS), "  ")


def test_a_tokenizer_that_does_not_put_the_empty_token_last() -> None:
    tokenizer = build_tokenizer(TASKS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(ValueError, match="ends a prompt with the special token 2, so that 3 does not follow"):
        encode_prompt(tokenizer, TASKS[0])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A ▁", special_tokens=[("▁", 3)])
    with pytest.raises(ValueError, match=r"not with BOS \(1\)"):
        encode_prompt(tokenizer, TASKS[0])


def test_the_empty_token_is_not_appended_twice() -> None:
    tokenizer = build_tokenizer(TASKS)
    expected = encode_prompt(tokenizer, TASKS[0])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A ▁", special_tokens=[("<s>", 1), ("▁", 3)]
    )
    assert encode_prompt(tokenizer, TASKS[0]) == expected


def test_folders_without_a_fitting_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No tokenizer can be loaded from .*needs tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizer = build_tokenizer(TASKS)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"]["other"] = saved["model"]["vocab"].pop("▁")
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no token '▁' .29871 in Llama's vocabulary"):
        load_tokenizer(tmp_path)
    for damaged in ("{}", "{", json.dumps(saved | {"model": {"type": "?"}})):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match="No tokenizer can be loaded from .*undamaged"):
            load_tokenizer(tmp_path)
