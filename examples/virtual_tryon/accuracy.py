"""Measure how many of a caption's attributes a base draws, attribute by attribute."""

from collections.abc import Sequence

import numpy as np
from diffusers import StableDiffusionXLPipeline

from . import model
from .judge import ATTRIBUTES, Judge
from .world import Picture, draw, full_caption, labels, sample

Shares = dict[str, float]


def attribute_accuracy(
    pipeline: StableDiffusionXLPipeline, judge: Judge, *, count: int = 512, seed: int = 7, batch: int = 64
) -> tuple[Shares, Shares]:
    """Return the share of a caption's attributes that the judge finds, in generated pictures and in drawn ones.

    The second is the judge's own reliability, an upper bound of the first.
    """
    random = np.random.default_rng([seed, 3])
    pictures = [sample(random) for _ in range(count)]
    texts = [full_caption(picture, random) for picture in pictures]
    made = [model.generate(pipeline, texts[at : at + batch], seed=seed + at) for at in range(0, count, batch)]
    drawn = np.stack([draw(picture, pipeline.vae.config.sample_size) for picture in pictures])
    return shares_right(judge.attributes(np.concatenate(made)), pictures), shares_right(
        judge.attributes(drawn), pictures
    )


def shares_right(found: Sequence[dict[str, str]], pictures: Sequence[Picture]) -> Shares:
    """Return each attribute's share of correct answers, over the pictures in which it can be seen."""
    truths = [labels(picture) for picture in pictures]
    right: Shares = {}
    for name in ATTRIBUTES:
        seen = [(f[name], truth[name]) for f, truth in zip(found, truths, strict=True) if truth[name] is not None]
        if len({truth for _, truth in seen}) > 1:
            right[name] = sum(f == truth for f, truth in seen) / len(seen)
    return right
