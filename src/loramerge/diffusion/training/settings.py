"""Training settings; the defaults are those of diffusers' example script for SDXL."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ...errors import OptionError
from ...merging.methods import Range, Seed
from ...merging.methods.options import Count, NonNegative, Positive, misfits

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

FLOW_ATTENTION = (*ATTENTION, "to_qkv_mlp_proj")
"""Name endings of the attentions' projections in transformers; FLUX.2 joins some with those of its feed-forward."""

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

    rank: Count = 8
    alpha: Positive | None = None
    """The LoRA's scale is alpha / rank; None means alpha = rank."""
    steps: Annotated[int, Range(0)] = 400
    batch_size: Count = 1
    """Pictures per forward pass in each process."""
    accumulate: Count = 1
    """Passes whose gradients are averaged for one step."""
    learning_rate: Positive = 1e-4
    schedule: RateSchedule = "constant"
    """Learning rate after the warm-up: ``linear`` and ``cosine`` fall to 0 at the last step."""
    warm_up: Annotated[int, Range(0)] = 0
    """Steps in which the learning rate rises from 0."""
    weight_decay: NonNegative = 1e-2
    max_grad_norm: Positive | None = 1.0
    """The norm of all gradients together is clipped to this; None doesn't clip."""
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    """Share of the factors' inputs that is dropped at random."""
    targets: Targets = "attention"
    """attention: the projections of all attention layers.  transformers: also feed-forward layers and the projections
    in and out; of a transformer every linear layer in its blocks.  all: also the convolutions and time projections of the
    ResNet blocks, and the samplers."""
    resolution: Count | None = None
    """Side of the square that each picture is cut to, in pixels; None is the model's own."""
    flip: bool = True
    """True mirrors half of the examples."""
    snr_gamma: Positive | None = None
    """Weigh examples by min-SNR with this γ, such as 5; None weighs all alike."""
    prior: str | Path | None = None
    """Prior preservation (DreamBooth): a folder of pictures of the class; half of each pass is drawn from it."""
    prior_prompt: str | None = None
    """Caption of the class's pictures that have none."""
    prior_weight: NonNegative = 1.0
    """Weight of the class's loss."""
    seed: Seed = 42

    def __post_init__(self) -> None:
        wrong = [*misfits(self), *self._of_no_effect()]
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

    def _of_no_effect(self) -> list[str]:
        wrong = []
        if self.prior is None and (self.prior_prompt is not None or self.prior_weight != 1.0):
            wrong.append("prior_prompt and prior_weight need prior, a folder of pictures of the class")
        if isinstance(self.warm_up, int) and isinstance(self.steps, int) and self.warm_up > self.steps > 0:
            wrong.append(f"warm_up must end within the {self.steps} steps, got {self.warm_up}")
        return wrong
