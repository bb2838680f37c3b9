"""Training settings; the defaults are those of diffusers' example script for SDXL."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ...errors import OptionError

RateSchedule = Literal["constant", "linear", "cosine"]
Targets = Literal["attention", "transformers", "all"]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMERS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

UNET: Mapping[Targets, tuple[str, ...]] = {
    "attention": ATTENTION,
    "transformers": TRANSFORMERS,
    "all": (*TRANSFORMERS, *RESNETS),
}
"""Name endings of the modules to train: those of diffusers' scripts, kohya's LoRA and kohya's LoCon."""

TEXT: Mapping[Targets, tuple[str, ...]] = {
    "attention": TEXT_ATTENTION,
    "transformers": (*TEXT_ATTENTION, "fc1", "fc2"),
    "all": (*TEXT_ATTENTION, "fc1", "fc2"),
}
"""Name endings of the modules of text encoders to train."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a training run.

    The defaults are those of ``train_text_to_image_lora_sdxl.py`` of diffusers as its guide runs it: AdamW with betas
    0.9 and 0.999 and ε 10⁻⁸, factors that begin as PEFT's ``gaussian``, alpha = rank.

    Raises:
        OptionError: A value is unknown, out of range, or has no effect with the others.
    """

    rank: int = 8
    alpha: float | None = None
    """The LoRA's scale is alpha / rank; None means alpha = rank."""
    steps: int = 400
    batch_size: int = 1
    """Pictures per forward pass in each process."""
    accumulate: int = 1
    """Passes whose gradients are averaged for one step."""
    learning_rate: float = 1e-4
    schedule: RateSchedule = "constant"
    """Learning rate after the warm-up: ``linear`` and ``cosine`` fall to 0 at the last step."""
    warm_up: int = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 1e-2
    max_grad_norm: float | None = 1.0
    """The norm of all gradients together is clipped to this; None doesn't clip."""
    dropout: float = 0.0
    """Share of the factors' inputs that is dropped at random."""
    targets: Targets = "attention"
    """attention: the projections of all attention layers.  transformers: also feed-forward layers and the projections
    in and out.  all: also the convolutions and time projections of the ResNet blocks, and the samplers."""
    resolution: int | None = None
    """Side of the square that each picture is cut to, in pixels; None is the model's own."""
    flip: bool = True
    """Whether to mirror half of the examples."""
    snr_gamma: float | None = None
    """Weigh examples by min-SNR with this γ, such as 5; None weighs all alike."""
    prior: str | Path | None = None
    """Prior preservation (DreamBooth): a folder of pictures of the class; half of each pass is drawn from it."""
    prior_prompt: str | None = None
    """Caption of the class's pictures that have none."""
    prior_weight: float = 1.0
    """Weight of the class's loss."""
    seed: int = 42

    def __post_init__(self) -> None:
        wrong = [*self._out_of_range(), *self._of_no_effect()]
        if wrong:
            raise OptionError(f"Training: {'; '.join(wrong)}.")

    @property
    def scale(self) -> float:
        """Return the factor on the factors' product: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def rate(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: Number of the step, from 0.
        """
        if step < self.warm_up:
            return self.learning_rate * step / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.learning_rate * left[self.schedule]

    def described(self) -> dict[str, Any]:
        """Return the settings for metadata, without the path of ``prior``, which `Images.description` covers."""
        return {name: value for name, value in asdict(self).items() if name != "prior"}

    def identity(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share; at a constant rate the number of steps may change."""
        free = ("steps",) if self.schedule == "constant" else ()
        return {name: value for name, value in self.described().items() if name not in free}

    def _out_of_range(self) -> list[str]:
        wrong = []
        for name, known in (("schedule", RateSchedule), ("targets", Targets)):
            if getattr(self, name) not in get_args(known):
                wrong.append(f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}")
        for name, least in (
            ("rank", 1),
            ("steps", 0),
            ("batch_size", 1),
            ("accumulate", 1),
            ("warm_up", 0),
            ("seed", 0),
        ):
            if not _number(getattr(self, name), int) or getattr(self, name) < least:
                wrong.append(f"{name} must be a whole number from {least}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "max_grad_norm", "alpha", "snr_gamma"):
            value = getattr(self, name)
            optional = name != "learning_rate" and value is None
            if not optional and not (_number(value, float) and value > 0):
                wrong.append(f"{name} must be a number above 0, got {value!r}")
        for name in ("weight_decay", "prior_weight"):
            value = getattr(self, name)
            if not _number(value, float) or value < 0:
                wrong.append(f"{name} must be a number from 0, got {value!r}")
        if not _number(self.dropout, float) or not 0 <= self.dropout < 1:
            wrong.append(f"dropout must be a number from 0 and below 1, got {self.dropout!r}")
        if self.resolution is not None and not (_number(self.resolution, int) and self.resolution > 0):
            wrong.append(f"resolution must be a whole number from 1, got {self.resolution!r}")
        return wrong

    def _of_no_effect(self) -> list[str]:
        wrong = []
        if self.prior is None and (self.prior_prompt is not None or self.prior_weight != 1.0):
            wrong.append("prior_prompt and prior_weight need prior, a folder of pictures of the class")
        if _number(self.warm_up, int) and _number(self.steps, int) and self.warm_up > self.steps > 0:
            wrong.append(f"warm_up must end within the {self.steps} steps, got {self.warm_up}")
        return wrong


def _number(value: Any, kind: type[int] | type[float]) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
