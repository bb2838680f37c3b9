"""Validation images: the pipeline draws with the LoRA that is being trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ...files.storage.paths import path_of
from ...scoring.png import save_png
from ..denoiser import Denoiser
from ..drawing import Sampling, drawn as pictures, settled


def draw(
    denoiser: Denoiser,
    prompts: Sequence[str],
    output: str | Path,
    step: int,
    *,
    seed: int = 0,
    sampling_steps: int = 30,
    guidance: float | None = None,
    resolution: int | None = None,
) -> list[Path]:
    """Draw prompts with the model as it is now, into ``OUTPUT-000100-0.png``; call it in ``on_step``.

    Training doesn't depend on it.

    Args:
        denoiser: The model, with its VAE and text encoders.
        prompts: One picture each.
        output: Path of the LoRA; pictures are written next to it.
        step: Number of the step, for the files' names.
        seed: Seed of each picture's noise.
        sampling_steps: Steps of the pipeline's scheduler.
        guidance: The pipeline's scale of guidance; the family's usual by default.
        resolution: Side of the pictures in pixels; the model's by default.

    Raises:
        OptionError: The VAE or the text encoders are gone.
        FileError: A picture can't be written.
    """
    place = path_of(output)
    side = resolution or denoiser.resolution
    scale = denoiser.family.guidance if guidance is None and denoiser.family.flow is None else guidance
    sampling = Sampling(steps=sampling_steps, guidance=scale, height=side, width=side)
    drawn = []
    # The LoRA's factors are float32, and the model may be bfloat16.
    mixed = torch.autocast(denoiser.device.type, torch.bfloat16, enabled=denoiser.dtype == torch.bfloat16)
    with denoiser.whole() as pipe, torch.no_grad(), mixed, _silent(pipe), _without_dropout(denoiser):
        for i, prompt in enumerate(prompts):
            noise = torch.Generator("cpu").manual_seed(seed)
            [[frame]], _ = pictures(pipe, [prompt], [noise], settled(pipe, sampling))
            image = Image.fromarray((frame * 255).round().astype("uint8"))
            path = place.with_name(f"{place.stem}-{step:06d}-{i}.png")
            save_png(image, path, {"prompt": prompt, "seed": seed, "step": step, "sampling": {"steps": sampling_steps}})
            drawn.append(path)
    return drawn


@contextmanager
def _without_dropout(denoiser: Denoiser) -> Iterator[None]:
    """Switch off the LoRA's dropout inside the block: the pictures are those of the file."""
    active = [
        m for model in denoiser.models.values() for m in model.modules() if isinstance(m, nn.Dropout) and m.training
    ]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """Switch off a pipeline's progress bar inside the block."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
