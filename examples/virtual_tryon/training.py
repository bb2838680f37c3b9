"""Train the miniature: UNet and both text encoders together, on latents that stay on the device."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from . import model, muon

EMA = 0.999
EVERY = 4
"""Steps between updates of the moving average."""
LOG = 50
TEXT_RATE = 0.5
"""Learning rate of the text encoders, as a share of the UNet's."""
ADAM_RATE = 0.1
"""Learning rate of what Adam trains, as a share of Muon's."""
EMPTY = 0.1
"""Share of prompts replaced by zeros, for classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a training run."""

    batch: int
    minutes: float = math.inf
    """Minutes of training; the learning rate falls to nothing at the end."""
    samples: float = math.inf
    """Number of pictures to see; training ends with whichever comes first."""
    rate: float = 0.02
    """Muon's learning rate."""
    decay_from: float = 0.35
    warm_up: int = 200
    seed: int = 0
    bf16: bool = False


@dataclass(kw_only=True)
class Progress:
    """The progress of a training."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def share(self, settings: Settings) -> float:
        """Return the share done, in [0, 1]."""
        return min(1.0, max(self.seconds / (60 * settings.minutes), self.samples / settings.samples))


def rate_factor(step: int, share: float, settings: Settings) -> float:
    """Return the learning rate's factor: warm-up, plateau, and a cosine to 1 %."""
    warm = min(1.0, (step + 1) / settings.warm_up)
    fallen = max(0.0, share - settings.decay_from) / (1 - settings.decay_from)
    return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * fallen)) / 2)


class Training:
    """The networks, their moving average and the optimiser; one process of one or several.

    Args:
        pipeline: What to train, from its present values on.
        latents: Shape ``(n, channels, height, width)``, float16.
        tokens: Shape ``(n, captions, 2, length)``.
        settings: How.
        device: ``"cpu"`` or ``"cuda"``.
        rank: Number of this process.
        world: Number of processes; with more than one, gradients are averaged by ``torch.distributed``.
        compiled: Compile the UNet.
    """

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        latents: np.ndarray,
        tokens: np.ndarray,
        settings: Settings,
        *,
        device: str = "cpu",
        rank: int = 0,
        world: int = 1,
        compiled: bool = False,
    ) -> None:
        self.settings, self.device, self.rank, self.world = settings, device, rank, world
        self.progress, self.clock = Progress(), 0.0
        self.losses: list[Tensor] = []
        self.history: list[dict[str, float]] = []
        self.networks = (
            nn.ModuleList([pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet]).to(device).train()
        )
        self.average = copy.deepcopy(self.networks).eval().requires_grad_(False)
        self.parameters = list(self.networks.parameters())
        self.optimizer = optimizer(self.networks, rank, world)
        self.unet: Callable[..., Any] = torch.compile(self.networks[2]) if compiled else self.networks[2]
        self.latents = torch.from_numpy(np.array(latents)).to(device)
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.signal = pipeline.scheduler.alphas_cumprod.float().to(device)
        size = pipeline.vae.config.sample_size
        self.sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=device)
        self.random = torch.Generator(device).manual_seed(1000 * settings.seed + rank)
        self.pipeline = pipeline

    def step(self) -> None:
        """Train on one batch."""
        started = time.monotonic()
        self.set_rate()
        loss = self.loss(*self.batch())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.progress.seconds = self.average_gradients() if self.world > 1 else self.clock
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.losses.append(loss.detach())
        self.progress.step += 1
        self.progress.samples += self.settings.batch * self.world
        if self.progress.step % EVERY == 0:
            self.follow()
        if self.progress.step % LOG == 0:
            self.log()
        self.clock += time.monotonic() - started

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return latents and token ids of random pictures."""
        chosen = self.integers(len(self.latents))
        told = self.integers(self.tokens.shape[1])
        return self.latents[chosen].float(), self.tokens[chosen, told].long()

    def loss(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Return the mean squared error of the velocity at uniform times."""
        noise = torch.randn(latents.shape, generator=self.random, device=self.device)
        times = self.integers(len(self.signal), count=len(latents))
        kept = torch.rand(len(latents), generator=self.random, device=self.device) >= EMPTY
        with self.autocast():
            states, projection = model.encode(self.networks[0], self.networks[1], tokens[:, 0], tokens[:, 1])
            return velocity_error(
                self.unet,
                latents,
                noise,
                times,
                self.signal,
                states * kept[:, None, None],
                projection * kept[:, None],
                self.sizes,
            )

    def integers(self, high: int, *, count: int | None = None) -> Tensor:
        return torch.randint(0, high, (count or self.settings.batch,), generator=self.random, device=self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16) if self.settings.bf16 else nullcontext()

    def set_rate(self) -> None:
        factor = rate_factor(self.progress.step, self.progress.share(self.settings), self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["usual"] * factor * self.settings.rate

    @torch.no_grad()
    def average_gradients(self) -> float:
        """Average over all processes; all use the first one's clock, so that their learning rate and end agree."""
        clock = torch.tensor([self.clock if self.rank == 0 else 0.0])
        flat = torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in self.parameters] + [clock]
        )
        torch.distributed.all_reduce(flat)
        at = 0
        for parameter in self.parameters:
            parameter.grad = (flat[at : at + parameter.numel()] / self.world).view_as(parameter)
            at += parameter.numel()
        return float(flat[-1])

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the networks."""
        step = self.progress.step
        kept = min(EMA, (1 + step) / (10 + step)) ** EVERY
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in self.parameters], 1 - kept)

    def log(self) -> None:
        """Record the mean loss since the last record.

        Raises:
            FloatingPointError: It isn't finite.
        """
        if not self.losses:
            return
        loss = float(torch.stack(self.losses).mean())
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {self.progress.step}. Lower the rate ({self.settings.rate})."
            )
        self.losses = []
        self.history.append(
            {
                "step": self.progress.step,
                "samples": self.progress.samples,
                "seconds": round(self.progress.seconds, 1),
                "loss": round(loss, 4),
            }
        )

    def averaged(self) -> StableDiffusionXLPipeline:
        """Return the pipeline with the averaged networks, on the device."""
        parts = self.pipeline.components | dict(
            zip(("text_encoder", "text_encoder_2", "unet"), self.average, strict=True)
        )
        return model.assemble(**parts).to(self.device)

    def random_states(self) -> list[Tensor]:
        """Return the random states of every process, in order."""
        own = self.random.get_state()
        if self.world == 1:
            return [own]
        states = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(states, own)
        return states

    def state(self) -> dict[str, Any]:
        """Return all that :meth:`restore` needs. Every process must call it."""
        return {
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random_states(),
            "progress": vars(self.progress).copy(),
            "history": self.history,
            "losses": [float(loss) for loss in self.losses],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state` exactly.

        Raises:
            ValueError: It was saved by another number of processes.
        """
        if len(state["random"]) != self.world:
            raise ValueError(
                f"The checkpoint is of {len(state['random'])} processes, this run has {self.world}: use as many, or --fresh."
            )
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"][self.rank].cpu())
        self.progress = Progress(**state["progress"])
        self.clock = self.progress.seconds
        self.history = list(state["history"])
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]


def optimizer(networks: nn.ModuleList, rank: int, world: int) -> muon.Muon:
    """Make the optimiser; each group's usual rate is a share of the UNet's."""
    shares = (TEXT_RATE, TEXT_RATE, 1.0)
    groups = [
        group
        for network, share in zip(networks, shares, strict=True)
        for group in muon.groups(network, rate=share, adam_rate=ADAM_RATE * share, ends=("conv_in", "conv_out"))
    ]
    return muon.Muon(groups, rank=rank, world=world)


def velocity_error(
    unet: Callable[..., Any],
    latents: Tensor,
    noise: Tensor,
    times: Tensor,
    signal: Tensor,
    states: Tensor,
    projection: Tensor,
    sizes: Tensor,
) -> Tensor:
    """Return ‖v̂(√ā x + √(1 - ā) ε) - (√ā ε - √(1 - ā) x)‖², mean over all entries (Salimans and Ho, 2022)."""
    kept = signal[times].sqrt()[:, None, None, None]
    lost = (1 - signal[times]).sqrt()[:, None, None, None]
    conditions = {"text_embeds": projection, "time_ids": sizes.expand(len(latents), -1)}
    found = unet(kept * latents + lost * noise, times, states, added_cond_kwargs=conditions).sample
    return F.mse_loss(found.float(), kept * noise - lost * latents)


@torch.no_grad()
def held_out_loss(
    pipeline: StableDiffusionXLPipeline,
    latents: np.ndarray,
    tokens: np.ndarray,
    *,
    captions: str = "own",
    size: int = 128,
) -> float:
    """Return the loss on pictures never trained on, at fixed times and noise: equal networks give equal numbers.

    Args:
        pipeline: What to measure.
        latents: Shape ``(n, channels, height, width)``.
        tokens: Shape ``(n, captions, 2, length)``.
        captions: ``"own"``, ``"other"``: those of the next picture, or ``"none"``: zeros.
        size: Pictures at once.
    """
    device = pipeline.unet.device
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=random)
    times = torch.arange(len(latents)) * 997 % len(pipeline.scheduler.alphas_cumprod)
    ids = torch.from_numpy(tokens[:, 0].astype(np.int64))
    ids = ids.roll(1, 0) if captions == "other" else ids
    side = pipeline.vae.config.sample_size
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device)
    signal = pipeline.scheduler.alphas_cumprod.float().to(device)
    total = 0.0
    for at in range(0, len(latents), size):
        part = slice(at, at + size)
        states, projection = model.encode(
            pipeline.text_encoder, pipeline.text_encoder_2, *ids[part].to(device).unbind(1)
        )
        states, projection = (value * (captions != "none") for value in (states, projection))
        z = torch.from_numpy(np.array(latents[part])).float().to(device)
        error = velocity_error(
            pipeline.unet, z, noise[part].to(device), times[part].to(device), signal, states, projection, sizes
        )
        total += float(error) * len(z)
    return total / len(latents)


def save_state(state: dict[str, Any], file: Path) -> None:
    """Write a state whole or not at all."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)
