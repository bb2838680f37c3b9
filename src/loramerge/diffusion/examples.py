"""Training examples of each LoRA, kept on the CPU: its noised pictures, or latents that it generates from prompts."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..files.lora import LoRA
from ..learned.attach import attach
from ..learned.batches import Batch
from ..learned.calibration import Progress
from ..scoring.captions import Picture, captioned, cropped, digest
from .denoiser import Denoiser, below
from .families import Size
from .schedules import Schedule, shift


@dataclass(frozen=True)
class Conditions:
    """The model's inputs for a LoRA's examples, besides latents and timesteps."""

    texts: Mapping[str, Tensor]
    """Conditions of the distinct prompts; empty if prompts are encoded in every pass."""
    which: Tensor
    """Index of each example's prompt, ``(examples,)``."""
    places: Mapping[str, Tensor]
    """Conditions of each example, ``(examples, …)``."""

    def batch(self, sample: Tensor, timesteps: Tensor, chosen: Tensor) -> dict[str, Any]:
        """Assemble the model's inputs for the examples ``chosen``."""
        which = self.which[chosen]
        given = {name: value[which] for name, value in self.texts.items()}
        given |= {name: value[chosen] for name, value in self.places.items()}
        numbers = {} if self.texts else {"prompt": which}
        return {"sample": sample, "timestep": timesteps, "conditions": given, **numbers}


@dataclass(frozen=True)
class Images:
    """A ``draw`` function over pictures: picture, flip, timestep and noise are random."""

    latents: tuple[Tensor, ...]
    """Per LoRA, ``(pictures, 2, …)``: unflipped and flipped."""
    conditions: tuple[Conditions, ...]
    schedule: Schedule
    flip: bool
    snr_gamma: float | None
    description: Mapping[str, Any]
    """The source of the examples."""

    def __call__(self, lora: int, generator: torch.Generator, count: int) -> Batch:
        held = self.latents[lora]
        chosen = torch.randint(len(held), (count,), generator=generator)
        flipped = torch.randint(2, (count,), generator=generator) * int(self.flip)
        latents = held[chosen, flipped]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = self.schedule.timesteps(count, generator)
        sample = self.schedule.noised(latents, noise, timesteps)
        found = self.conditions[lora].batch(sample, timesteps, chosen)
        return found | weight(self.schedule, timesteps, self.snr_gamma)


@dataclass(frozen=True)
class Trajectories:
    """A ``draw`` function over the latents that the model saw while each LoRA made images of prompts."""

    samples: tuple[Tensor, ...]
    """Per LoRA, ``(states, …)``."""
    timesteps: tuple[Tensor, ...]
    conditions: tuple[Conditions, ...]
    schedule: Schedule
    snr_gamma: float | None
    description: Mapping[str, Any]
    """The source of the examples."""

    def __call__(self, lora: int, generator: torch.Generator, count: int) -> Batch:
        chosen = torch.randint(len(self.samples[lora]), (count,), generator=generator)
        timesteps = self.timesteps[lora][chosen]
        found = self.conditions[lora].batch(self.samples[lora][chosen], timesteps, chosen)
        return found | weight(self.schedule, timesteps, self.snr_gamma)


def weight(schedule: Schedule, timesteps: Tensor, gamma: float | None) -> dict[str, Tensor]:
    """Return a batch's entry ``weight`` by min-SNR; empty without γ."""
    return {} if gamma is None else {"weight": schedule.weights(timesteps, gamma)}


def from_images(
    denoiser: Denoiser,
    folders: Sequence[str | Path],
    *,
    prompts: Sequence[str | None] = (),
    resolution: int | None = None,
    flip: bool = True,
    snr_gamma: float | None = None,
    progress: Progress | None = None,
) -> Images:
    """Make examples from the pictures that each LoRA was trained on.

    Args:
        denoiser: The model.
        folders: One per LoRA, see `loramerge.scoring.captions`.
        prompts: One per LoRA, for pictures without a caption.
        resolution: Side of the square that each picture is cut to, in pixels; the model's by default.
        flip: Whether to mirror half of the examples.
        snr_gamma: Weigh examples by min-SNR with this γ, such as 5; None weighs all alike.
        progress: Called with the number of pictures done and of all.

    Raises:
        FileError: A folder, a picture or a caption is missing or unreadable.
        OptionError: The resolution does not fit the model.
    """
    side = resolution or denoiser.resolution
    denoiser.latent_shape(side)
    _check_gamma(denoiser, side, snr_gamma)
    if prompts and len(prompts) != len(folders):
        raise OptionError(f"Prompts given: {len(prompts)}, folders of images: {len(folders)}.")
    found = [captioned(f, p) for f, p in zip(folders, prompts or [None] * len(folders), strict=True)]
    texts = _Texts(denoiser, (picture.caption for pictures in found for picture in pictures))
    one_more = _counter(progress, sum(map(len, found)))
    latents, conditions = [], []
    for mine in found:
        encoded = [_encoded(denoiser, picture, side, one_more) for picture in mine]
        latents.append(torch.stack([pair for pair, _ in encoded]))
        places = denoiser.placed_at([size for _, size in encoded])
        conditions.append(texts.of([picture.caption for picture in mine], places))
    described = {
        "images": [{"count": len(mine), "sha256": digest(mine)} for mine in found],
        "resolution": side,
        "flip": flip,
        "snr_gamma": snr_gamma,
    }
    return Images(tuple(latents), tuple(conditions), denoiser.schedule(side), flip, snr_gamma, described)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return a function to call after each finished item."""
    numbers = count(1)

    def one_more() -> None:
        done = next(numbers)
        if progress:
            progress(done, total)

    return one_more


def _encoded(denoiser: Denoiser, picture: Picture, side: int, done: Callable[[], None]) -> tuple[Tensor, Size]:
    """Encode a picture and its mirror image into latents, ``(2, …)``."""
    square = cropped(picture.path, side)
    pixels = torch.from_numpy(square.pixels)
    both = denoiser.encoded_image(torch.stack([pixels, pixels.flip(-1)]))
    done()
    return both, (square.original, square.corner, side)


class _Texts:
    """Conditions of captions, each encoded once; only numbered if LoRAs act in the text encoders."""

    def __init__(self, denoiser: Denoiser, captions: Iterable[str]) -> None:
        every = list(dict.fromkeys(captions))
        start = len(denoiser.prompts) if denoiser.text_encoders else 0
        self.numbers = {caption: start + i for i, caption in enumerate(every)}
        self.values: Mapping[str, Tensor] = {}
        if denoiser.text_encoders:
            denoiser.prompts += every
        else:
            self.values = denoiser.encoded(every)

    def of(self, captions: Sequence[str], places: Mapping[str, Tensor]) -> Conditions:
        """Return the conditions of examples with these captions."""
        return Conditions(self.values, torch.tensor([self.numbers[caption] for caption in captions]), places)


def from_prompts(
    denoiser: Denoiser,
    loras: Sequence[LoRA],
    prompts: Sequence[str | Sequence[str]],
    *,
    steps: int = 12,
    trajectories: int = 4,
    guidance: float | None = None,
    resolution: int | None = None,
    snr_gamma: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trajectories:
    """Make examples without pictures: the latents that the model sees while each LoRA alone draws its prompts.

    Args:
        denoiser: The model.
        loras: The LoRAs to merge.
        prompts: One or several per LoRA, with its trigger word.
        steps: Sampling steps per image, each of which gives one example.
        trajectories: Images per LoRA; prompts take turns.
        guidance: Scale of the classifier-free guidance; the family's usual by default, 1 for none.
        resolution: Side of the images in pixels; the model's by default.
        snr_gamma: As for `from_images`.
        seed: Seed of the images.
        progress: Called with the number of steps done and of all.

    Raises:
        MergeError: The LoRAs don't fit the model.
        OptionError: A prompt is missing, or the resolution does not fit the model.
    """
    given = [[p] if isinstance(p, str) else list(p) for p in prompts]
    if len(given) != len(loras) or not all(given):
        raise OptionError(
            f"LoRAs: {len(loras)}, prompts given for {sum(map(bool, given))}. Wanted at least one prompt per LoRA."
        )
    if steps < 1 or trajectories < 1:
        raise OptionError(f"Steps and trajectories are numbers from 1, got {steps} and {trajectories}.")
    side = resolution or denoiser.resolution
    _check_gamma(denoiser, side, snr_gamma)
    sampler = _Sampler(denoiser, side, steps, denoiser.family.guidance if guidance is None else guidance)
    texts = _Texts(denoiser, (prompt for mine in given for prompt in mine))
    generator = torch.Generator().manual_seed(seed)
    samples, timesteps, conditions = [], [], []
    one_more = _counter(progress, len(loras) * trajectories * steps)
    with torch.no_grad(), attach(denoiser.models, loras) as attachment:
        for i, mine in enumerate(given):
            attachment.only(torch.full((sampler.rows,), i, device=denoiser.device))
            captions = [mine[k % len(mine)] for k in range(trajectories)]
            seen = [sampler.run(texts.of([c], sampler.place(1)), generator, one_more) for c in captions]
            samples.append(torch.cat([x for x, _ in seen]))
            timesteps.append(torch.cat([t for _, t in seen]))
            each = [caption for caption, (_, t) in zip(captions, seen, strict=True) for _ in t]
            conditions.append(texts.of(each, sampler.place(len(each))))
    described = {
        "prompts": given,
        "steps": steps,
        "trajectories": trajectories,
        "guidance": sampler.guidance,
        "resolution": side,
        "snr_gamma": snr_gamma,
        "seed": seed,
    }
    schedule = denoiser.schedule(side)
    return Trajectories(tuple(samples), tuple(timesteps), tuple(conditions), schedule, snr_gamma, described)


def _check_gamma(denoiser: Denoiser, side: int, gamma: float | None) -> None:
    if gamma is None:
        return
    if not gamma > 0:
        raise OptionError(f"snr_gamma is a number above 0, got {gamma!r}.")
    denoiser.schedule(side).weights(torch.zeros(1), gamma)


class _Sampler:
    """Samples images with the pipeline's own scheduler and records the denoiser's inputs."""

    def __init__(self, denoiser: Denoiser, side: int, steps: int, guidance: float) -> None:
        self.denoiser, self.side, self.steps, self.guidance = denoiser, side, steps, guidance
        self.shape = denoiser.latent_shape(side)
        self.tokens = denoiser.tokens(side)

    @property
    def rows(self) -> int:
        """Return the number of rows per pass: guidance adds one without the prompt."""
        return 1 if self.guidance == 1 else 2

    def place(self, count: int) -> Mapping[str, Tensor]:
        """Return the conditions of uncropped pictures."""
        return self.denoiser.placed_at([((self.side, self.side), (0, 0), self.side)] * count)

    def run(self, given: Conditions, generator: torch.Generator, done: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Sample an image; return the latents ``(steps, …)`` and timesteps ``(steps,)`` of its steps."""
        states = []
        for state in self._states(given, generator):
            states.append(state)
            done()
        return torch.cat([x for x, _ in states]), torch.stack([t for _, t in states])

    def _states(self, given: Conditions, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the latents ``(1, …)`` and the timestep of every step."""
        scheduler = copy.deepcopy(self.denoiser.pipe.scheduler)
        self._begin(scheduler)
        if self.rows == 2:
            given = self._both(given)
        latents = torch.randn((1, *self.shape), generator=generator)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
        for timestep in scheduler.timesteps:
            seen = scaled(latents, timestep)
            yield seen, timestep
            rows = torch.arange(self.rows)
            batch = given.batch(seen.expand(self.rows, *self.shape), timestep.expand(self.rows), rows)
            found = self.denoiser.predict(batch).float().cpu()
            if self.rows == 2:
                found = self._guided(found[:1], found[1:])
            step = scheduler.step(found, timestep, latents, **self._random(scheduler, generator))
            latents = step.prev_sample

    def _guided(self, prompt: Tensor, empty: Tensor) -> Tensor:
        """Go from the prediction without the prompt beyond the one with it."""
        found = empty + self.guidance * (prompt - empty)
        flow = self.denoiser.family.flow
        if flow is None or not flow.rescaled:
            return found
        return found * prompt.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)

    def _both(self, given: Conditions) -> Conditions:
        """Stack the conditions of the prompt on those of the empty prompt."""
        if given.texts:
            texts = below([{name: value[given.which] for name, value in given.texts.items()}, self.empty])
        else:  # LoRAs act in the text encoders
            texts = self.denoiser.with_empty(self.denoiser.prompts[int(given.which)])
        return Conditions(texts, torch.arange(2), self.place(2))

    @cached_property
    def empty(self) -> Mapping[str, Tensor]:
        """Return the conditions of the empty prompt."""
        return self.denoiser.unconditional()

    def _begin(self, scheduler: Any) -> None:
        """Set the timesteps, as the family's pipeline does."""
        given: dict[str, Any] = {}
        flow = self.denoiser.family.flow
        if flow and (mu := shift(self.denoiser.pipe, self.tokens, self.steps)) is not None:
            given["mu"] = mu
        if flow and flow.even:
            given["sigmas"] = torch.linspace(1, 1 / self.steps, self.steps).tolist()
        scheduler.set_timesteps(self.steps, **given)

    @staticmethod
    def _random(scheduler: Any, generator: torch.Generator) -> dict[str, torch.Generator]:
        """Return the generator as an argument for the schedulers that add noise."""
        takes = inspect.signature(scheduler.step).parameters
        return {"generator": generator} if "generator" in takes else {}
