"""Noise schedules: draw timesteps, add noise to latents, and compute the target of the prediction."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import OptionError


class Schedule(Protocol):
    """The way in which a model's training adds noise."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw timesteps at random, ``(count,)``."""

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noised latents, ``(count, …)``."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the model should predict, ``(count, …)``."""

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return each example's min-SNR weight, ``(count,)``."""


@dataclass(frozen=True)
class Diffusion:
    """Diffusion: x_t = √ᾱ x₀ + √(1 − ᾱ) ε."""

    alphas: Tensor
    """ᾱ by timestep."""
    velocity: bool
    """True if the model predicts v = √ᾱ ε − √(1 − ᾱ) x₀ instead of ε."""

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.alphas), (count,), generator=generator)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, sigma = self._parts(latents, timesteps)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not self.velocity:
            return noise
        signal, sigma = self._parts(latents, timesteps)
        return signal * noise - sigma * latents

    def _parts(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ and √(1 − ᾱ), shaped to broadcast over latents."""
        alpha = self.alphas[timesteps].reshape(-1, *(1,) * (latents.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, γ) / SNR, or over SNR + 1 for v: Hang et al., 2023, https://arxiv.org/abs/2303.09556."""
        alpha = self.alphas[timesteps.round().long().clamp(0, len(self.alphas) - 1)]
        snr = alpha / (1 - alpha)
        return snr.clamp(max=gamma) / (snr + 1 if self.velocity else snr.clamp_min(1e-8))


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x_t = (1 − σ) x₀ + σ ε."""

    shift: float
    """Shift of σ towards noise; 1 for none."""
    count: int = 1000

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(count, generator=generator).clamp(1e-3, 1.0)
        return self.count * self.shift * u / (1 + (self.shift - 1) * u)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = (timesteps / self.count).reshape(-1, *(1,) * (latents.ndim - 1))
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents

    def weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        raise OptionError(
            "Min-SNR weights are defined for diffusions, and this model is a flow. Way out: no snr_gamma."
        )


def schedule(pipe: Any, flow: bool, tokens: int) -> Schedule:
    """Read the noise schedule from a pipeline.

    Args:
        pipe: The pipeline; its scheduler's configuration is read.
        flow: Whether the model is a flow.
        tokens: Tokens of an image, on which the shift of some flows depends.
    """
    config = pipe.scheduler.config
    if flow:
        mu = shift(pipe, tokens)
        if mu is None:
            return Flow(_constant(pipe.scheduler), config.num_train_timesteps)
        linear = config.get("time_shift_type") == "linear"
        return Flow(mu if linear else math.exp(mu), config.num_train_timesteps)
    from diffusers import DDPMScheduler

    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise OptionError(
            f"The model predicts {config.prediction_type!r} (its scheduler's prediction_type); wanted epsilon or v_prediction."
        )
    alphas = DDPMScheduler.from_config(config).alphas_cumprod.float()
    return Diffusion(alphas, config.prediction_type == "v_prediction")


def _constant(scheduler: Any) -> float:
    """Return the shift that is the same for every picture."""
    config = scheduler.config
    if "shift" in config:
        return float(config.shift)
    if config.get("use_flow_sigmas"):
        return float(config.flow_shift)
    raise OptionError(
        f"The model predicts a flow, and its scheduler, {type(scheduler).__name__}, isn't one for flows. Wanted "
        "FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas."
    )


def shift(pipe: Any, tokens: int, steps: int = 50) -> float | None:
    """Return the log of the shift for an image of so many tokens; None if the shift is constant.

    Args:
        pipe: The pipeline; its scheduler's configuration is read.
        tokens: Tokens of an image.
        steps: Sampling steps, on which some pipelines' shift depends.
    """
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    own = getattr(sys.modules[type(pipe).__module__], "compute_empirical_mu", None)
    if own is not None:
        return float(own(tokens, steps))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    return float(config.get("base_shift", 0.5) + slope * (tokens - low))
