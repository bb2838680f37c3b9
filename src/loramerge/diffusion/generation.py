"""Generate pictures of settings × prompts × seeds, and write each one's recipe into its file.

A setting is the base model with some LoRAs, or with a composition of them.  A picture depends on its own recipe only:
its noise comes from a generator of its own on the CPU, whatever else is drawn beside it.  What is there
already, with the same recipe, is not drawn again.

from loramerge.diffusion import Sampling, Use, generate

settings = {"none": [], "both": [Use(person, 0.7), Use(jersey, 0.5)]}
generate(pipe, settings, ["a psq-person wearing a barca24_jersey"], 8, "out", sampling=Sampling(steps=30))
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..devices import memory_for
from ..errors import FileError, NumberError, OptionError, check_callable
from ..files.storage.paths import path_of
from ..files.storage.scratch import make_folder
from ..files.storage.texts import as_json, parsed
from ..files.storage.writer import Progress
from ..scoring.png import recipe_in, save_png
from ..tensors import Array
from .apply import applied, check_loads, fingerprint
from .composing.base import Use
from .composing.running import Composed, check_words, composed
from .drawing import Sampling, drawn, settled
from .pipelines import name_of

LEGIBLE = 40
"""Number of a prompt's characters in a file's name."""
Setting: TypeAlias = Sequence[Use] | Composed
"""LoRAs that are added up, or composed."""

WAYS_OUT = "Ways out: fewer at a time (--batch), float16, a smaller size (--size). What was drawn is kept; the same call goes on."


@dataclass(frozen=True)
class Drawn:
    """A picture on the disk."""

    setting: str
    prompt: str
    seed: int
    path: Path
    reused: bool
    """True if the picture existed already."""


def generate(
    pipe: Any,
    settings: Mapping[str, Setting],
    prompts: Sequence[str],
    seeds: int | Sequence[int],
    output: str | os.PathLike[str],
    *,
    sampling: Sampling | None = None,
    batch: int = 4,
    base: str | None = None,
    progress: Progress | None = None,
) -> list[Drawn]:
    """Draw every prompt with every seed in every setting, into ``output/SETTING/PROMPT-SEED.png``.

    A pipeline for videos draws one frame unless `Sampling.frames` says more, which become an animated PNG.

    Every LoRA is loaded once before the first picture, so that one that doesn't fit fails at once.

    Args:
        pipe: A text-to-image pipeline of diffusers that loads LoRAs, on the device to compute on.
        settings: LoRAs by name of the setting, added up or `Composed`; an empty list is the base alone.
        prompts: At least one; no duplicates.
        seeds: A number of seeds, counted from 0, or the seeds themselves.
        output: A directory; it is created if it is missing.
        sampling: Steps, guidance, size.
        batch: Pictures per pass, all of the same setting.
        base: The model's name in recipes; by default the name that the pipeline was loaded from.
        progress: Called with the number of pictures done and of all.

    Returns:
        Every picture, by setting, prompt and seed.

    Raises:
        OptionError: There is nothing to draw, a setting's name can't be a folder's, the pipeline has LoRAs already, it
            draws from more than a prompt, or diffusers loads no LoRAs into it.
        FileError: A picture of that name wasn't made by loramerge, or can't be written.
        MergeError: A LoRA changes modules that the model doesn't have, or diffusers can't load it whole.
        DialectError: diffusers' file format can't hold a layer.
        NumberError: A weight or a value of a LoRA is NaN or infinite, the model gave NaN, or its safety checker made a
            picture black.
        DeviceMemoryError: The memory does not suffice: what to lower.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    check_callable(progress=progress)
    check(settings, prompts, numbers, batch)
    common = _common(pipe, sampling or Sampling(), base)
    folder = path_of(output)
    places = [
        _Place(name, prompt, seed, folder / name / f"{slug(prompt)}-{seed}.png", recipe)
        for name, setting in settings.items()
        for prompt in prompts
        for seed in numbers
        for recipe in [_recipe(common, setting, prompt, seed)]
    ]
    missing = {place for place in places if not place.there()}
    waiting = {place.setting for place in missing}
    _check_works(pipe, [setting for name, setting in settings.items() if name in waiting], prompts)
    done = len(places) - len(missing)
    for name, setting in settings.items():
        todo = [place for place in places if place.setting == name and place in missing]
        for part in _drawn(pipe, setting, todo, common["sampling"], batch):
            done += part
            if progress:
                progress(done, len(places))
    return [Drawn(p.setting, p.prompt, p.seed, p.path, p not in missing) for p in places]


def _check_works(pipe: Any, settings: Sequence[Setting], prompts: Sequence[str]) -> None:
    """Refuse settings whose LoRAs the pipeline can't take, and compositions that don't fit the prompts."""
    plain = [use.lora for setting in settings if not isinstance(setting, Composed) for use in setting]
    check_loads(pipe, list({lora.sha256: lora for lora in plain}.values()))
    for setting in settings:
        if isinstance(setting, Composed):
            check_words(pipe, setting, prompts)
            with _at_work(pipe, setting):
                pass


def _at_work(pipe: Any, setting: Setting) -> AbstractContextManager[None]:
    if isinstance(setting, Composed):
        return composed(pipe, setting.uses, setting.composition, **setting.options)
    return applied(pipe, [(use.lora, use.weight) for use in setting])


def slug(prompt: str) -> str:
    """Make a file's name from the beginning of a prompt and six hexadecimal digits of its hash."""
    words = re.sub(r"[^a-z0-9_]+", "-", prompt.lower()).strip("-")[:LEGIBLE].rstrip("-")
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}".lstrip("-")


@dataclass(frozen=True, eq=False)
class _Place:
    """A picture's path and recipe."""

    setting: str
    prompt: str
    seed: int
    path: Path
    recipe: Mapping[str, Any]

    def there(self) -> bool:
        """Return whether the picture exists with the same recipe.

        Raises:
            FileError: There is a picture that loramerge didn't make.
        """
        if not self.path.exists():
            return False
        found = recipe_in(self.path)
        if found is None:
            raise FileError(f"{self.path} is there, and not made by loramerge. Choose another directory, or remove it.")
        return found == self.recipe


def check(settings: Mapping[str, Setting], prompts: Sequence[str], seeds: int | Sequence[int], batch: int = 1) -> None:
    """Check the arguments of `generate` that need no pipeline.

    Raises:
        OptionError: There is nothing to draw, something is given twice, a weight isn't finite, or a name can't be a
            folder's.
    """
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    if isinstance(prompts, str) or not (settings and prompts and seeds) or batch < 1:
        raise OptionError(
            f"Nothing to draw: {len(settings)} settings, prompts {prompts!r}, {len(seeds)} seeds, {batch} at a time."
        )
    for what, given in (("prompt", prompts), ("seed", seeds)):
        if len(set(given)) < len(given):
            raise OptionError(f"A {what} is given twice: {given}.")
    if min(seeds) < 0:
        raise OptionError(f"Seeds are 0 or more, got {min(seeds)}.")
    for name, setting in settings.items():
        for use in setting:
            if not math.isfinite(use.weight):
                raise OptionError(
                    f"The setting {name!r}: {use.lora.name} has the weight {use.weight}; wanted a number."
                )
        if not name or name[0] in ".-" or set(name) & set('/\\:*?"<>|') or len(name.encode(errors="replace")) > 255:
            raise OptionError(f"The setting {name!r} is no name for a folder.")
    if len({name.lower() for name in settings}) < len(settings):
        raise OptionError(f"Two settings have the same folder: {', '.join(settings)}.")


def _common(pipe: Any, sampling: Sampling, base: str | None) -> dict[str, Any]:
    """Return the recipe entries that all pictures share."""
    return {
        "sampling": settled(pipe, sampling),
        "scheduler": {"name": type(pipe.scheduler).__name__, **_plain(pipe.scheduler.config)},
        "base": {
            "name": base or name_of(pipe),
            "pipeline": type(pipe).__name__,
            "fingerprint": fingerprint(pipe),
            "dtype": str(pipe.dtype).removeprefix("torch."),
        },
        "device": pipe.device.type,
        "versions": _versions(),
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a scheduler's configuration to what JSON gives back."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return parsed(as_json(kept, default=str), "the scheduler's configuration")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from .._version import __version__

    others = ("diffusers", "transformers", "peft", "torch")
    return {"loramerge": __version__, **{name: version(name) for name in others}}


def _recipe(common: Mapping[str, Any], setting: Setting, prompt: str, seed: int) -> dict[str, Any]:
    loras = [{"name": use.lora.name, "sha256": use.lora.sha256, "weight": float(use.weight)} for use in setting]
    recipe = {"prompt": prompt, "seed": seed, "loras": loras, **common}
    return recipe | setting.recipe() if isinstance(setting, Composed) else recipe


def _drawn(
    pipe: Any, setting: Setting, todo: Sequence[_Place], sampling: Mapping[str, Any], batch: int
) -> Iterator[int]:
    """Draw and save the pictures of one setting, yielding the number saved after each batch."""
    if not todo:
        return
    make_folder(todo[0].path.parent)
    with _at_work(pipe, setting):
        for start in range(0, len(todo), batch):
            part = todo[start : start + batch]
            for place, frames in zip(part, _images(pipe, part, sampling), strict=True):
                save_png(frames[0], place.path, place.recipe, more=frames[1:])
            yield len(part)


def _images(pipe: Any, part: Sequence[_Place], sampling: Mapping[str, Any]) -> list[list[Any]]:
    """Draw a batch; return the frames of each picture, of which most have one."""
    import torch
    from PIL import Image

    generators = [torch.Generator("cpu").manual_seed(place.seed) for place in part]
    with memory_for(f"{len(part)} pictures at a time", WAYS_OUT):
        pictures, hidden = drawn(pipe, [place.prompt for place in part], generators, sampling)
    _refuse_hidden(hidden, part)
    return [
        [Image.fromarray(frame) for frame in _bytes(frames, place)]
        for frames, place in zip(pictures, part, strict=True)
    ]


def _bytes(values: Array, place: _Place) -> Array:
    """Round values in [0, 1] to bytes, as diffusers does."""
    import numpy as np

    if not np.isfinite(values).all():
        raise NumberError(
            f"The model drew NaN for {place.path.name} of {place.setting}. In float16 some autoencoders overflow: "
            "take bfloat16 or float32, or a LoRA at a smaller weight."
        )
    return (values * 255).round().astype("uint8")


def _refuse_hidden(hidden: Sequence[bool], part: Sequence[_Place]) -> None:
    for place, black in zip(part, hidden, strict=False):
        if black:
            raise NumberError(
                f"The pipeline's safety checker made {place.path.name} of {place.setting} black, which no score can use. "
                "Load the pipeline with safety_checker=None, or take another prompt or seed."
            )
