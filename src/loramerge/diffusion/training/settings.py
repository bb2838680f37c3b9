"""How a LoRA is trained; the defaults are those of diffusers' example script for SDXL."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ...errors import OptionError
from ...merging.methods import Range, Seed
from ...merging.methods.options import misfits

RateSchedule = Literal["constant", "linear", "cosine"]
Targets = Literal["attention", "transformers", "all"]
Count = Annotated[int, Range(1)]
Size = Annotated[float, Range(0, open_high=True)]
Above = Annotated[float, Range(0, open_low=True, open_high=True)]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMERS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

UNET: Mapping[Targets, tuple[str, ...]] = {
    "attention": ATTENTION,
    "transformers": TRANSFORMERS,
    "all": (*TRANSFORMERS, *RESNETS),
}
"""Ends of the names of the modules that are trained: what diffusers' scripts, kohya's LoRA and kohya's LoCon change."""

TEXT: Mapping[Targets, tuple[str, ...]] = {
    "attention": TEXT_ATTENTION,
    "transformers": (*TEXT_ATTENTION, "fc1", "fc2"),
    "all": (*TEXT_ATTENTION, "fc1", "fc2"),
}
"""The same of text encoders, where these are trained."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train.

    The defaults are those of ``train_text_to_image_lora_sdxl.py`` of diffusers as its guide runs it: AdamW with betas
    0.9 and 0.999 and ε 10⁻⁸, factors that begin as PEFT's ``gaussian``, alpha = rank.

    Raises:
        OptionError: A value is unknown, out of range, or of no effect beside the others.
    """

    rank: Count = 8
    alpha: Above | None = None
    """The LoRA's scale is alpha / rank; None is the rank."""
    steps: Annotated[int, Range(0)] = 400
    batch_size: Count = 1
    """Pictures in a pass of the model, in each process."""
    accumulate: Count = 1
    """Passes whose gradients make one step."""
    learning_rate: Above = 1e-4
    schedule: RateSchedule = "constant"
    """How the learning rate goes on after the warm-up: to the end of all steps ``linear`` and ``cosine`` fall to 0."""
    warm_up: Annotated[int, Range(0)] = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: Size = 1e-2
    max_grad_norm: Above | None = 1.0
    """Longer gradients, of all factors together, are shortened to this; None leaves them."""
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    """Share of the factors' inputs that is left out at random."""
    targets: Targets = "attention"
    """attention: the projections of all attentions.  transformers: feed-forward layers and the projections in and out
    as well.  all: the convolutions and time projections of the ResNet blocks, and the samplers, too."""
    resolution: Count | None = None
    """Side of the square that each picture is cut to, in pixels; None is the model's own."""
    flip: bool = True
    """Whether to mirror half of the examples."""
    snr_gamma: Above | None = None
    """Weigh examples by min-SNR with this γ, such as 5; None weighs all alike."""
    prior: str | Path | None = None
    """Prior preservation (DreamBooth): a folder of pictures of the whole class, of which each pass sees as many."""
    prior_prompt: str | None = None
    """For pictures of the class that have no caption."""
    prior_weight: Size = 1.0
    """How much the class counts."""
    seed: Seed = 42

    def __post_init__(self) -> None:
        wrong = [*misfits(self), *self._of_no_effect()]
        if wrong:
            raise OptionError(f"Training: {'; '.join(wrong)}.")

    @property
    def scale(self) -> float:
        """What the factors' product is multiplied by: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def rate(self, step: int) -> float:
        """The learning rate of a step.

        Args:
            step: From 0.
        """
        if step < self.warm_up:
            return self.learning_rate * step / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        left = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.learning_rate * left[self.schedule]

    def described(self) -> dict[str, Any]:
        """The settings for metadata: of the class's pictures no path, but what `Images.description` says."""
        return {name: value for name, value in asdict(self).items() if name != "prior"}

    def identity(self) -> dict[str, Any]:
        """What a state must agree in with the run that goes on from it; at a constant rate more steps are no other run."""
        free = ("steps",) if self.schedule == "constant" else ()
        return {name: value for name, value in self.described().items() if name not in free}

    def _of_no_effect(self) -> list[str]:
        wrong = []
        if self.prior is None and (self.prior_prompt is not None or self.prior_weight != 1.0):
            wrong.append("prior_prompt and prior_weight need prior, a folder of pictures of the class")
        if isinstance(self.warm_up, int) and isinstance(self.steps, int) and self.warm_up > self.steps > 0:
            wrong.append(f"warm_up must end within the {self.steps} steps, got {self.warm_up}")
        return wrong
