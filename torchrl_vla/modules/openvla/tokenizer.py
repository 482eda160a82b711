"""Prompts and their tokens: the checkpoint's own tokenizer, and a small one for the tiny preset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Punctuation, Sequence, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from torchrl_vla.errors import UserError

PROMPT = "In: What action should the robot take to {instruction}?\nOut:"

EMPTY_TOKEN = "▁"
"""The piece that every prompt ends with: 29871 in Llama's vocabulary, 3 in the small one."""

_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", EMPTY_TOKEN)


def build_tokenizer(
    instructions: Iterable[str], *, vocab_size: int = 512, n_bins: int = 256
) -> PreTrainedTokenizerFast:
    """Make a small word-level tokenizer laid out as OpenVLA's vocabulary is.

    Ids: ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, the empty token 3, the words of the prompt and of the instructions in
    alphabetical order; action tokens in the last ``n_bins`` ids below ``vocab_size``; ``<PAD>`` at ``vocab_size``, the
    first padding row of the embedding. Case is ignored. Words not in ``instructions`` become ``<unk>``.

    Args:
        instructions: every instruction the policy may be given.
        vocab_size: size of the vocabulary without padding rows (``OpenVLAConfig.tokenizer_vocab_size``).
        n_bins: number of action tokens.

    Raises:
        ValueError: if there are no instructions, or the words do not fit below the action tokens.

    Examples:
        >>> tokenizer = build_tokenizer(["open the drawer", "close the drawer"])
        >>> encode_prompt(tokenizer, "open the drawer")[-5:] == tokenizer.convert_tokens_to_ids(
        ...     ["drawer", "?", "out", ":", "▁"])
        True
    """
    # Punctuation by the sign: "drawer?" and "drawer)?" share their tokens.
    pre_tokenizer, normalizer = Sequence([Whitespace(), Punctuation()]), Lowercase()
    instructions = list(instructions)
    if not instructions:
        raise UserError("a tokenizer cannot be built from no instructions; give those of every task to be run.")
    text = normalizer.normalize_str(PROMPT.format(instruction=" ".join(instructions)))
    words = [*_SPECIAL_TOKENS, *sorted({word for word, _ in pre_tokenizer.pre_tokenize_str(text)})]
    begin = vocab_size - n_bins
    if len(words) > begin:
        raise UserError(
            f"The instructions have {len(words)} words, prompt and special tokens included, but vocab_size "
            f"{vocab_size} leaves {begin} ids below the {n_bins} action tokens; raise it to {len(words) + n_bins}."
        )
    vocab = {word: index for index, word in enumerate(words)}
    vocab.update({f"<action_{index}>": begin + index for index in range(n_bins)})
    vocab["<PAD>"] = vocab_size

    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder, Llama's or a small one.

    Raises:
        ValueError: if the folder has no tokenizer, or it does not fit OpenVLA's prompt.
    """
    try:
        # A checkpoint's code is never run. An empty config keeps transformers from reading the model's.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=PreTrainedConfig(), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of a damaged file the libraries raise whatever they stumble over
        raise UserError(
            f"No tokenizer can be loaded from {folder}. A checkpoint folder needs tokenizer.json and "
            "tokenizer_config.json beside the weights, undamaged; copy them from the release it comes from."
        ) from error
    encode_prompt(tokenizer, "open the drawer")
    return tokenizer


def empty_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the empty token (29871 in Llama's vocabulary).

    Raises:
        ValueError: if the vocabulary has none.
    """
    index = tokenizer.convert_tokens_to_ids(EMPTY_TOKEN)
    if not isinstance(index, int) or index == tokenizer.unk_token_id:
        raise UserError(
            f"The tokenizer has no token {EMPTY_TOKEN!r} (29871 in Llama's vocabulary), which OpenVLA's prompt ends "
            "with; use the tokenizer that the checkpoint was released with."
        )
    return index


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """Token ids of OpenVLA's prompt for an instruction: BOS first, the empty token appended where it is not last.

    Args:
        tokenizer: of Llama, or from :func:`build_tokenizer`.
        instruction: the task in words; its case is ignored.

    Raises:
        ValueError: if the instruction is blank, or the tokenizer puts anything but BOS before or anything but the
            empty token after the prompt.

    Source: OpenVLA's ``predict_action``, whose checkpoints saw the empty token there in training.
    """
    if not instruction.strip():
        raise UserError("language_instruction is blank; give the task in words, e.g. 'open the middle drawer'.")
    last = empty_token_id(tokenizer)
    ids: list[int] = tokenizer(PROMPT.format(instruction=instruction.lower())).input_ids
    if ids[0] != tokenizer.bos_token_id:
        raise UserError(f"The tokenizer starts a prompt with {ids[0]}, not with BOS ({tokenizer.bos_token_id}).")
    if ids[-1] != last:
        ids = [*ids, last]
    if ids[-2] in tokenizer.all_special_ids:
        raise UserError(
            f"The tokenizer ends a prompt with the special token {ids[-2]}, so that {last} does not follow the text; "
            "load it with add_eos_token=False."
        )
    return ids


def unknown_words(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[str]:
    """Words of an instruction that a tokenizer has no token for; Llama's spells them, so that it has none.

    Args:
        tokenizer: of Llama, or from :func:`build_tokenizer`.
        instruction: the task in words; its case is ignored.

    Examples:
        >>> unknown_words(build_tokenizer(["open the drawer"]), "Open the fridge")
        ['fridge']
    """
    text = instruction.lower()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if tokenizer.unk_token_id not in encoded.input_ids:
        return []
    if not tokenizer.is_fast:
        return [text]
    spans = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    return [text[begin:end] for index, (begin, end) in spans if index == tokenizer.unk_token_id]
