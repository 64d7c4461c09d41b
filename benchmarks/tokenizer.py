"""A tokenizer for a model that has none: other people's benchmarks speak text, and random weights know no words.

Byte-pair encoding over printable ASCII, as large as the model's vocabulary. Most tokens are a space and a made-up word
of two or three syllables, so random tokens become text that is read as the same tokens again, and every token of an
answer is text at once. Numbers are read two digits at a time, other words by the letter.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path

from sglang_vtensor.tiny_model import CHAT_TEMPLATE

#: As ByteLevel writes them: what is printed, a newline and a space.
NEWLINE, SPACE = "Ċ", "Ġ"
BYTES = [chr(code) for code in range(ord("!"), ord("~") + 1)] + [NEWLINE, SPACE]
DIGITS = [one + other for one, other in itertools.product(string.digits, repeat=2)]
#: Enough for 169,455 words of up to three.
SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnp" for vowel in "aeiou"]
ROLES = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
#: Words of two syllables: every vocabulary of a real model's size has them as tokens.
WORDS = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]


def write(folder: Path, vocabulary: int, bos: int, eos: int) -> None:
    """Write the tokenizer's files into `folder`: `vocabulary` tokens, of which `bos` and `eos` (ids) are special, and
    the chat template of the tiny model. Raises `ValueError` if the vocabulary is smaller than what every text needs, or
    larger than there are words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [SPACE + "".join(parts) for count in (1, 2, 3) for parts in itertools.product(SYLLABLES, repeat=count)]
    pieces = [*BYTES, *DIGITS, *SYLLABLES, *ROLES]
    room = vocabulary - len(pieces) - 2
    if not 0 <= room <= len(words):
        least, most = len(pieces) + 2, len(pieces) + 2 + len(words)
        raise ValueError(f"a tokenizer of {vocabulary} tokens cannot be made: only {least} to {most}")
    names = iter([*pieces, *words[:room]])
    special = {bos: "<|begin_of_text|>", eos: "<|end_of_text|>"}
    vocab = {special.get(number) or next(names): number for number in range(vocabulary)}
    merges = [(pair[0], pair[1]) for pair in [*DIGITS, *SYLLABLES]]
    merges += [(word[:-2], word[-2:]) for word in words[:room]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[bos],
        eos_token=special[eos],
        additional_special_tokens=ROLES,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.replace("<s>", special[bos]),
    ).save_pretrained(folder)
