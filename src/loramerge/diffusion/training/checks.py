"""Warnings about suspicious training data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...scoring.captions import Picture, captioned, size
from ..denoiser import Denoiser

RARE = 0.8
"""A single-token word is rare if its id lies in this last part of the vocabulary, which is sorted by frequency."""


def hints(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    prompt: str | None = None,
    trigger: str | None = None,
    resolution: int | None = None,
) -> list[str]:
    """Return warnings, as sentences for the user; none if nothing is unusual.

    Args:
        denoiser: The model, for its tokenizer and its resolution.
        folder: Pictures with captions.
        prompt: For pictures without a caption.
        trigger: The word that every caption should have.
        resolution: Side of the square that pictures are cut to; the model's by default.

    Raises:
        FileError: The folder is missing or holds no picture, a caption is missing, or a picture can't be read.
    """
    found = captioned(folder, prompt)
    said = [_about_trigger(found, trigger) if trigger else _about_words(found, denoiser.pipe.tokenizer)]
    return [hint for hint in [*said, _about_sizes(found, resolution or denoiser.resolution)] if hint]


def _about_trigger(found: Sequence[Picture], trigger: str) -> str:
    lacking = [picture for picture in found if trigger not in picture.caption]
    if not lacking:
        return ""
    return (
        f"{len(lacking)} of {len(found)} captions lack the trigger {trigger!r}, such as that of "
        f"{lacking[0].path.name}: {lacking[0].caption[:60]!r}."
    )


def _about_words(found: Sequence[Picture], tokenizer: Any) -> str:
    common = set.intersection(*({word.strip(".,;:!?\"'()") for word in p.caption.lower().split()} for p in found))
    if any(_rare(word, tokenizer) for word in common if word):
        return ""
    return (
        f"No rare word is in all {len(found)} captions, so no word triggers the learned concept. Way out: a trigger "
        "such as 'psq-person' in every caption."
    )


def _rare(word: str, tokenizer: Any) -> bool:
    pieces = tokenizer(word, add_special_tokens=False).input_ids
    return len(pieces) > 1 or any(piece >= RARE * len(tokenizer) for piece in pieces)


def _about_sizes(found: Sequence[Picture], side: int) -> str:
    small = [picture.path.name for picture in found if min(size(picture.path)) < side]
    if not small:
        return ""
    return f"{len(small)} of {len(found)} pictures are smaller than {side} × {side} and will be enlarged, such as {small[0]}."
