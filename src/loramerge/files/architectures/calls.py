"""The parts of a pipeline's call of a transformer that predicts a flow that can't be read off diffusers' code."""

from dataclasses import dataclass
from typing import Literal

Latents = Literal["image", "frames", "tokens", "list"]
Clock = Literal["timestep", "sigma", "signal"]


@dataclass(frozen=True, kw_only=True)
class FlowCall:
    """The call of a denoiser that predicts the velocity from data to noise."""

    pipelines: tuple[str, ...]
    """Classes of diffusers that draw from a prompt alone."""
    text: tuple[str, ...] = ("encoder_hidden_states",)
    """The denoiser's arguments for what ``encode_prompt`` returns, in its order; ``""`` for one that it doesn't take."""
    sample: str = "hidden_states"
    """Its argument for the latents."""
    latents: Latents = "image"
    """Their form: ``image``, ``(batch, channels, height, width)``; ``frames``, ``(batch, channels, 1, height, width)``;
    ``tokens``, ``(batch, places, channels)``, 2 × 2 latents to a token; ``list``, one ``(channels, 1, height, width)``
    per row, with a list of texts of their own lengths."""
    time: str = "timestep"
    """Its argument for the time."""
    clock: Clock = "timestep"
    """The value that it is given as the time: the scheduler's timestep in [0, 1000], the share σ of noise, or 1 − σ."""
    reversed: bool = False
    """True if it predicts the velocity from noise to data."""
    patch: int = 2
    """Side of the square of latents that becomes one token."""
    side: int = 128
    """Side of the pictures that it was made for, in latents, where its configuration doesn't say."""
    guidance: float = 1.0
    """Scale of the classifier-free guidance that pictures are usually made with; 1 for none."""
    rescaled: bool = False
    """True if guidance keeps each token's norm as the prompt alone gives it."""
    even: bool = False
    """True if the pipeline spaces σ evenly from 1 to 1 / steps, before the shift; otherwise the scheduler does."""
