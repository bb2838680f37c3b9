"""A small tokenizer of CLIP's form, learned from captions."""

import json
import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

MAX_LENGTH = 77
SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""CLIP's regular expression."""
SYMBOLS = string.ascii_lowercase + string.digits + string.punctuation


def learn(captions: Iterable[str], *, size: int = 400) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn vocabulary and merges by byte-pair encoding.

    Every symbol is in the vocabulary both within a word and at its end, so that any identifier can be spelled and
    nothing is unknown: CLIP's unknown token is its end of text, and would cut a prompt short.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        end_of_word_suffix="</w>",
        initial_alphabet=list(SYMBOLS),
        min_frequency=20,
        show_progress=False,
    )
    at_the_end = [symbol for symbol in SYMBOLS for _ in range(25)]
    tokenizer.train_from_iterator([*captions, *at_the_end], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    return {token: i for i, token in enumerate([*learned, "<|startoftext|>", "<|endoftext|>"])}, merges


def tokenizers(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Make SDXL's two tokenizers: the same words, but the second pads with "!"."""
    shared = {"vocab": vocabulary, "merges": merges, "model_max_length": MAX_LENGTH}
    return CLIPTokenizer(**shared), CLIPTokenizer(**shared, pad_token="!")
