"""Wrap a diffusion model as the function that loramerge learns on."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..devices import check_device
from ..errors import MergeError, OptionError, need
from ..files.lora import LoRA
from ..files.storage.paths import path_of, printable
from ..learned.batches import Batch
from . import flows
from .families import Conditions, Family, Size, family_of
from .pipelines import name_of, opened
from .schedules import Schedule, schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Denoiser:
    """A pipeline's denoiser, with the encoders and the schedule that make examples for it.

    A batch has ``sample``, the noised latents; ``timestep``; and ``conditions``, or ``prompt``: indices
    into `prompts`, which are then encoded in every pass, so that LoRAs act in the text encoders.
    """

    pipe: Any
    family: Family
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    text_encoders: bool = False
    """True if LoRAs act in the text encoders too; otherwise their modules are summed."""
    source: str = ""
    """The directory or the Hub name that the model was loaded from."""
    prompts: list[str] = field(default_factory=list)

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Return the components that LoRAs act in, by name."""
        components = {self.family.denoiser: self.model}
        if self.text_encoders:
            components |= {name: _named(model) for name, model in self.encoders.items()}
        return components

    @property
    def model(self) -> Any:
        """Return the UNet or the transformer."""
        return getattr(self.pipe, self.family.denoiser)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders, by name."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return {name: model for name in names if (model := getattr(self.pipe, name, None)) is not None}

    @property
    def resolution(self) -> int:
        """Return the side of the square images that the model was made for, in pixels."""
        flow = self.family.flow
        side: int = getattr(self.model.config, "sample_size", flow.side if flow else 0)
        return side * self._pixels

    @property
    def _pixels(self) -> int:
        """Return the side of the square of pixels that a latent covers."""
        name = next(n for n in ("vae_scale_factor", "vae_scale_factor_spatial") if hasattr(self.pipe, n))
        return int(getattr(self.pipe, name))

    @property
    def _patch(self) -> int:
        """Return the side of the square of latents that is one token."""
        return self.family.flow.patch if self.family.flow else 1

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Return the shape of an image's latents, as the denoiser takes them.

        Raises:
            OptionError: The resolution isn't a multiple of the pixels that a token covers.
        """
        step = self._pixels * self._patch
        if resolution % step or resolution <= 0:
            raise OptionError(f"The resolution must be a multiple of {step}, got {resolution}.")
        side, channels = resolution // self._pixels, int(self.model.config.in_channels)
        flow = self.family.flow
        return flows.shape(flow, channels, side) if flow else (channels, side, side)

    def schedule(self, resolution: int) -> Schedule:
        """Return the noise schedule that the model was trained with."""
        return schedule(self.pipe, self.family.flow is not None, self.tokens(resolution))

    def tokens(self, resolution: int) -> int:
        """Count the tokens of an image of this side, for denoisers that are transformers."""
        return (resolution // self._pixels // self._patch) ** 2

    def predict(self, batch: Batch) -> Tensor:
        """Predict noise, velocity or flow from a batch.

        Raises:
            OptionError: Gradients are asked for in float16.
        """
        if torch.float16 in (self.dtype, self.autocast) and torch.is_grad_enabled():
            raise OptionError("In fp16 gradients underflow, so nothing can be learned. Way out: bf16, or fp32.")
        return self.run(batch)

    def run(self, batch: Batch) -> Tensor:
        """Predict as `predict` does, but allow gradients in float16: the caller must scale its loss."""
        placed = self._placed(batch)
        with self._autocast():
            given = dict(placed.get("conditions", {}))
            if "prompt" in placed:
                prompts = [self.prompts[i] for i in placed["prompt"].tolist()]
                given |= self.family.encode(self.pipe, prompts, self.device)
            return self.family.call(self.pipe, placed["sample"], placed["timestep"], given)

    def _placed(self, batch: Batch) -> dict[str, Any]:
        """Move a batch to the device, and cast the model's inputs to its dtype."""
        found: dict[str, Any] = {}
        for name, value in batch.items():
            if isinstance(value, Mapping):
                found[name] = self._placed(value)
            else:
                floating = value.is_floating_point() and name not in ("timestep", "time_ids")
                found[name] = value.to(self.device, self.dtype if floating else None)
        return found

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def encoded(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts into conditions, on the CPU in float32; texts are padded at their end to the longest."""
        with torch.no_grad(), self._at_work(*self.encoders.values()):
            rows = [self.family.encode(self.pipe, [prompt], self.device) for prompt in prompts]
        return below({name: _kept(value) for name, value in row.items()} for row in rows)

    def unconditional(self) -> dict[str, Tensor]:
        """Return the conditions of the empty prompt, which are zeros for some models."""
        found = self.encoded([""])
        return {name: torch.zeros_like(value) for name, value in found.items()} if self._zeros else found

    def with_empty(self, prompt: str) -> dict[str, Tensor]:
        """Return the conditions of a prompt and of the empty one, encoded in one batch with the LoRAs that act now."""
        with torch.no_grad(), self._at_work(*self.encoders.values()), self._autocast():
            found = self.family.encode(self.pipe, [prompt, ""], self.device)
        kept = {name: _kept(value) for name, value in found.items()}
        return {name: value.index_fill(0, torch.tensor(1), 0) for name, value in kept.items()} if self._zeros else kept

    @property
    def _zeros(self) -> bool:
        return bool(self.pipe.config.get("force_zeros_for_empty_prompt", False))

    def encoded_image(self, pixels: Tensor) -> Tensor:
        """Encode images into latents, ``(count, …)``, on the CPU in float32.

        Args:
            pixels: ``(count, 3, side, side)`` in [-1, 1].
        """
        vae = self.pipe.vae
        if vae is None:
            raise OptionError("Images need the pipeline's VAE, and it has none. Way out: prompts instead of images.")
        dtype, video = vae.dtype, any(weight.ndim == 5 for weight in vae.parameters())
        with torch.no_grad(), self._at_work(vae):
            nn.Module.to(vae, torch.float32)  # SDXL's overflows in float16, and this is done once
            try:
                placed = pixels.to(self.device)
                found = vae.encode(placed[:, :, None] if video else placed).latent_dist.mode().cpu()
            finally:
                nn.Module.to(vae, dtype)
        latents = _normalised(found[:, :, 0] if video else found, vae.config)
        arranged = flows.arranged(self.family.flow, latents) if self.family.flow else latents
        norm = getattr(vae, "bn", None)  # of tokens, where the VAE has no statistics of latents
        if norm is None:
            return arranged
        return (arranged - norm.running_mean.cpu()) / (norm.running_var.cpu() + vae.config.batch_norm_eps).sqrt()

    def placed_at(self, sizes: Sequence[Size]) -> Conditions:
        """Return the conditions that say how each example was cropped out of its picture."""
        return self.family.place(sizes)

    @property
    def identity(self) -> dict[str, Any]:
        """Describe the model and its precision for metadata, without the directories of this machine."""
        return {
            "base": called(self.source),
            "pipeline": type(self.pipe).__name__,
            "precision": _called(self.dtype),
            "autocast": _called(self.autocast),
            "text_encoders": self.text_encoders,
        }

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Give the pipeline with every component on the device, ready to draw."""
        if self.pipe.vae is None or not self.encoders:
            raise OptionError("The pipeline's VAE or text encoders are gone. Way out: release() only after drawing.")
        with self._at_work(self.pipe.vae, *self.encoders.values()):
            yield self.pipe

    @contextmanager
    def _at_work(self, *modules: nn.Module) -> Iterator[None]:
        """Move modules to the device inside the block, and back afterwards."""
        before = [next(module.parameters()).device for module in modules]
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module, device in zip(modules, before, strict=True):
                module.to(device)

    def release(self) -> None:
        """Drop the components that only make examples: the VAE and, unless LoRAs act in them, the text encoders."""
        names = ["vae", *([] if self.text_encoders else self.encoders)]
        self.pipe.register_modules(**dict.fromkeys(names))

    def check(self, loras: Sequence[LoRA]) -> None:
        """Refuse LoRAs of another model family.

        Raises:
            MergeError: One is for a family that the base model is not of.
        """
        for lora in loras:
            if lora.architecture and lora.architecture not in self.family.architectures:
                raise MergeError(
                    f"{lora.name} is a LoRA of {lora.architecture}, and the base model {self.source} is a "
                    f"{type(self.pipe).__name__}: wanted {' or '.join(self.family.architectures)}."
                )


def called(source: str) -> str:
    """Return the base model's name for metadata: its name on the Hub, or the last part of its directory."""
    local = path_of(source)
    return printable(local.name or local.resolve().name) if local.exists() else source


class _Nested(nn.Module):
    """Put ``text_model.`` in front of a text encoder's modules, which transformers 5 leaves out in one class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = model


def _named(model: nn.Module) -> nn.Module:
    bare = type(model).__name__ == "CLIPTextModel" and "text_model" not in dict(model.named_children())
    return _Nested(model) if bare else model


def dtype_called(name: str) -> str | None:
    """Return a dtype's name for metadata, such as ``"bfloat16"`` for the option ``"bf16"``.

    Raises:
        OptionError: It is unknown.
    """
    return _called(_dtype(name))


def _called(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _normalised(latents: Tensor, config: Any) -> Tensor:
    """Bring what a VAE gave, ``(count, channels, side, side)``, to the scale that the denoiser knows."""
    mean, std = (_statistic(config, name) for name in ("latents_mean", "latents_std"))
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is not None and std is not None:
        return (latents - mean) * scale / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * scale


def _statistic(config: Any, name: str) -> Tensor | None:
    values = getattr(config, name, None)
    return None if values is None else torch.tensor(values).reshape(1, -1, 1, 1)


def _kept(value: Tensor) -> Tensor:
    """Return a copy on the CPU, in float32 if it isn't of whole numbers."""
    return value.cpu().float() if value.is_floating_point() else value.cpu()


def below(rows: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put conditions below each other; texts are padded at their end, with zeros, to the longest."""
    found = list(rows)
    return {name: _padded([row[name] for row in found]) for name in found[0]}


def _padded(values: Sequence[Tensor]) -> Tensor:
    if values[0].ndim == 1:
        return torch.cat(list(values))
    return pad_sequence([row for value in values for row in value], batch_first=True)


def load(
    source: Any,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    autocast: str | None = None,
    checkpointing: bool = False,
    text_encoders: bool = False,
    variant: str | None = None,
    trust_remote_code: bool = False,
) -> Denoiser:
    """Load a diffusion model to learn on.

    Args:
        source: A pipeline of diffusers, a directory that diffusers saved, or a name on the Hugging Face Hub.
        device: Device to compute on; ``cuda`` by default if there is a GPU.
        dtype: The denoiser's dtype, ``"fp32"``, ``"bf16"`` or ``"fp16"``; by default ``bf16`` on CUDA, ``fp32``
            elsewhere, and a given pipeline's own.  With ``fp16`` coefficients can be calibrated but not learned.
        autocast: Compute in this dtype while the weights stay in theirs.
        checkpointing: Recompute activations instead of keeping them: less memory, a third more time.
        text_encoders: Whether LoRAs act in the text encoders too, whose outputs are then computed in every pass.
        variant: Which files of the repository, such as ``"fp16"``.
        trust_remote_code: Whether to run code that the model brings.

    Raises:
        FileError: The model is missing, or the Hub can't be reached.
        MissingExtraError: diffusers is not installed.
        OptionError: An option or the device is unknown, the pipeline is of a kind that can't be learned on here, or
            the model brings code that is not trusted.
    """
    need("Learning on a model", "diffusers", "transformers")
    place = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_device(place)
    chosen = torch.device(place)
    wanted = _dtype(dtype) or (torch.bfloat16 if chosen.type == "cuda" else torch.float32)
    narrow = _dtype(autocast)
    named = isinstance(source, str | os.PathLike)
    pipe = opened(source, dtype=wanted, variant=variant, trust_remote_code=trust_remote_code) if named else source
    family = family_of(pipe)
    model = getattr(pipe, family.denoiser)
    kept = None if named or dtype else model.dtype
    nn.Module.to(model, chosen, kept or wanted).eval()
    if checkpointing:
        model.enable_gradient_checkpointing()
    found = Denoiser(
        pipe,
        family,
        chosen,
        kept or wanted,
        narrow,
        text_encoders,
        os.fspath(source) if named else name_of(pipe),
    )
    for encoder in found.encoders.values():
        encoder.eval()
        if text_encoders:
            encoder.to(chosen)
    return found


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise OptionError(f"Unknown dtype {name!r}. Available: {', '.join(DTYPES)}.")
    return DTYPES[name]
