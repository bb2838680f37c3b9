"""The training loop: forward passes, gradients, AdamW steps, checkpoints."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...devices import within_memory
from ...errors import DeviceMemoryError, NumberError, OptionError
from ...files.lora import LoRA
from ...files.storage.paths import path_of, printable
from ...learned.attach import fingerprints
from ...learned.batches import join, seen
from ...learned.calibration import Progress
from ...learned.state import State, check_together, resumed, save_state
from ..apply import fingerprint
from ..denoiser import Denoiser
from ..examples import Images, from_images
from ..processes import Team, team
from .beside import beside as alongside, leave
from .metadata import described
from .order import Order
from .peft_layers import Injected, architecture_of, injected, seeded
from .settings import TrainSettings


@dataclass(frozen=True)
class TrainStep:
    """The result of a training step."""

    step: int
    """From 1."""
    total: int
    loss: float
    """Mean over the step's examples, in all processes."""
    learning_rate: float


def train_lora(
    denoiser: Denoiser,
    folder: str | Path,
    *,
    settings: TrainSettings | None = None,
    prompt: str | None = None,
    checkpoint: Path | None = None,
    every: int = 100,
    on_step: Callable[[TrainStep], bool | None] | None = None,
    name: str | None = None,
    trigger: str | None = None,
    beside: LoRA | None = None,
    off_rows: bool = False,
    progress: Progress | None = None,
) -> LoRA:
    """Train a LoRA on pictures with captions.

    Latents and prompts are encoded once, before the first step; of a picture's latents the mean is taken, not a sample.
    Where text encoders learn too (``load(text_encoders=True)``), prompts are encoded in every pass.  In several
    processes, started by ``accelerate launch`` or ``torchrun``, each takes its share of every step's examples.

    Args:
        denoiser: The model; it is restored afterwards.
        folder: Pictures with captions, see `loramerge.scoring.captions`.
        settings: Rank, steps, learning rate and so on.
        prompt: For pictures without a caption.
        checkpoint: File of the training state; if it exists, training resumes from it: on the CPU to the same bits.
        every: Steps between checkpoints; there is also one at the beginning and one at the end.
        on_step: Called after every step, once its state is saved; training stops if it returns False.
        name: The LoRA's title; the folder's name by default.
        trigger: The trigger word, for the metadata.
        beside: A LoRA that acts, unchanged, while this one is trained, so that this one learns only what the other
            doesn't do, and the sum of both is their merge.
        off_rows: True leaves ``beside`` out, and keeps the rows of every ``down`` at right angles to its rows, so that
            the sum of both does to the other's inputs what the other does alone.
        progress: Called with the number of pictures encoded and of all.

    Returns:
        The LoRA, float32, in diffusers' dialect for the model, with metadata that say how it was made.

    Raises:
        FileError: The folder, a picture, a caption or the checkpoint is missing or unreadable.
        OptionError: A setting does not fit the model, the checkpoint is of another run, or ``beside`` has no module that
            is trained.
        MergeError: ``beside`` doesn't fit the model.
        NumberError: The loss or a gradient became NaN or infinite; the last good state is in the checkpoint.
        DeviceMemoryError: The memory does not suffice: what to lower.
        MissingExtraError: PEFT or accelerate is not installed.
    """
    chosen = settings or TrainSettings()
    if every < 1:
        raise OptionError(f"Training: every is a number from 1, got {every}.")
    together = team(cpu=denoiser.device.type == "cpu")
    mixed = _mixed(denoiser)
    side = chosen.resolution or denoiser.resolution
    rows = chosen.batch_size * (1 if chosen.prior is None else 2)
    with _nothing_lost(checkpoint), within_memory(side, rows, 1):
        images = _images(mixed, folder, chosen, prompt, progress)
        about = {
            **mixed.identity,
            "fingerprint": fingerprint(denoiser.pipe),
            "prediction": "flow" if denoiser.family.flow else denoiser.pipe.scheduler.config.prediction_type,
            "data": dict(images.description),
            "processes": together.size,
        }
        if beside is not None:
            about["beside"] = {"name": beside.name, "fingerprint": fingerprints([beside])[0], "off_rows": off_rows}
        with alongside(mixed, beside, off_rows=off_rows) as spans, injected(mixed, chosen) as inside:
            run = Run(mixed, inside, Order(images, chosen.seed), chosen, together, spans)
            run.train(checkpoint, about, every, on_step)
            layers = inside.taken()
    title = name or printable(path_of(folder).resolve().name)
    architecture = architecture_of(denoiser, layers)
    return LoRA(
        name=title,
        architecture=architecture,
        dialect="diffusers-peft" if denoiser.family.flow else "diffusers",
        layouts=layers,
        metadata=described(chosen, about, architecture, run.reached, title, trigger),
    )


def _mixed(denoiser: Denoiser) -> Denoiser:
    """Return the model with autocast in its own dtype, since the LoRA's factors are float32.

    Raises:
        OptionError: LoRAs can't be trained on it here.
    """
    if denoiser.family.flow and denoiser.text_encoders:
        raise OptionError(
            f"The base model is a {type(denoiser.pipe).__name__}, whose text encoders aren't trained here. Way out: the "
            "denoiser alone (no --text-encoders)."
        )
    predicted = denoiser.pipe.scheduler.config.get("prediction_type")
    if denoiser.family.flow is None and predicted not in ("epsilon", "v_prediction"):
        raise OptionError(f"The base model predicts {predicted!r}; wanted 'epsilon' or 'v_prediction'.")
    if torch.float16 in (denoiser.dtype, denoiser.autocast) and denoiser.device.type == "cpu":
        raise OptionError("Training in fp16 needs CUDA. Ways out on the CPU: fp32, or bf16.")
    narrow = denoiser.autocast or (None if denoiser.dtype == torch.float32 else denoiser.dtype)
    return replace(denoiser, autocast=narrow)


def _images(
    denoiser: Denoiser, folder: str | Path, settings: TrainSettings, prompt: str | None, progress: Progress | None
) -> Images:
    """Make examples of the training pictures, and of the class's for prior preservation."""
    prior = [] if settings.prior is None else [settings.prior]
    return from_images(
        denoiser,
        [folder, *prior],
        prompts=[prompt, settings.prior_prompt][: 1 + len(prior)],
        resolution=settings.resolution,
        flip=settings.flip,
        snr_gamma=settings.snr_gamma,
        progress=progress,
    )


@contextmanager
def _nothing_lost(checkpoint: Path | None) -> Iterator[None]:
    """Add the checkpoint's path to errors."""
    try:
        yield
    except (DeviceMemoryError, NumberError) as error:
        if checkpoint is None or not checkpoint.exists():
            raise
        on = "a run with other settings takes another checkpoint"
        if isinstance(error, DeviceMemoryError):
            on = "the same run goes on from there"
        raise type(error)(f"{error} What was learned is in {checkpoint}; {on}.") from error


@dataclass
class LossScale:
    """The factor on the loss that keeps gradients from underflowing in float16: the largest that doesn't overflow.

    Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740, section 3.2, with PyTorch's numbers.
    """

    value: float = 1.0
    sound: float = 0
    """Steps since the last change."""
    patience: float = math.inf

    @classmethod
    def of(cls, denoiser: Denoiser) -> "LossScale":
        """Return the initial scale for a model: 1 unless it computes in float16."""
        half = torch.float16 in (denoiser.dtype, denoiser.autocast)
        return cls(65536.0, patience=2000) if half else cls()

    def stepped(self) -> None:
        """Count a step with finite gradients; after ``patience`` of them double the scale."""
        self.sound += 1
        if self.sound >= self.patience:
            self.value, self.sound = 2 * self.value, 0

    def lower(self) -> bool:
        """Halve the scale after a step that overflowed; return False if it can't get smaller."""
        if self.value <= 1:
            return False
        self.value, self.sound = self.value / 2, 0
        return True


class Run:
    """One run of training."""

    def __init__(
        self,
        denoiser: Denoiser,
        inside: Injected,
        order: Order,
        settings: TrainSettings,
        together: Team,
        rows: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.denoiser, self.order, self.settings, self.together = denoiser, order, settings, together
        self.parameters = inside.parameters
        self.rows = {module: span for module, span in rows.items() if module in inside.layers}
        """The rows to stay off, by module."""
        if rows and not self.rows:
            raise OptionError(
                f"Training off the rows of a LoRA: it has none of the trained modules, such as {next(iter(inside.layers))}. "
                "Ways out: other targets, or without off_rows."
            )
        self.optimizer = torch.optim.AdamW(self.parameters.values(), weight_decay=settings.weight_decay, fused=True)
        self.scale = LossScale.of(denoiser)
        self.reached = 0

    def train(
        self,
        checkpoint: Path | None,
        about: Mapping[str, Any],
        every: int,
        on_step: Callable[[TrainStep], bool | None] | None,
    ) -> None:
        """Do the remaining steps."""
        identity = {**about, "settings": self.settings.identity()} if checkpoint else {}
        self._resume(checkpoint, identity)

        def keep() -> None:
            if checkpoint and self.together.writes:
                scales = [self.scale.value, self.scale.sound]
                generator = torch.Generator()  # unused: examples depend on the seed and their number alone
                save_state(checkpoint, identity, self.reached, self.parameters, self.optimizer, generator, scales)

        if not self.reached:
            keep()  # so a path that can't be written fails before the first step
        while self.reached < self.settings.steps:
            done = self._step()
            if done is None:
                keep()
                raise NumberError(
                    f"Training: the loss or a gradient is not finite at step {self.reached + 1}. Ways out: a smaller "
                    f"learning rate than {self.settings.learning_rate:g}, bf16 or fp32 instead of fp16."
                )
            if self.reached % every == 0 and self.reached < self.settings.steps:
                keep()
            if on_step and on_step(done) is False:
                break
        keep()

    def _resume(self, checkpoint: Path | None, identity: Mapping[str, Any]) -> None:
        state = resumed(checkpoint, identity, self.settings.steps)
        if state:
            self._restore(state)
        else:
            leave(self.parameters, self.rows)
        check_together(self.reached, self.together.reduce, "a checkpoint on a disk that all processes see")

    def _restore(self, state: State) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state.tensors[name])
        state.restore(self.optimizer, torch.Generator())
        self.scale.value, self.scale.sound = state.scales
        self.reached = state.step

    def _step(self) -> TrainStep | None:
        """Do one step; return None if its gradients aren't finite."""
        rate = self.settings.rate(self.reached)
        while True:
            loss, norm = self._gradients()
            if math.isfinite(norm) and math.isfinite(loss):
                break
            if not self.scale.lower():
                return None
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        leave(self.parameters, self.rows)
        self.scale.stepped()
        self.reached += 1
        return TrainStep(self.reached, self.settings.steps, loss, rate)

    def _gradients(self) -> tuple[float, float]:
        """Compute gradients; return the loss and the gradients' norm before clipping."""
        given, parameters = self.settings, list(self.parameters.values())
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for part in range(given.accumulate):
            first = (self.reached * given.accumulate + part) * self.together.size + self.together.shard
            with self._chance(first):
                loss = self._loss(range(first * given.batch_size, (first + 1) * given.batch_size)) / given.accumulate
                cast(Any, loss * self.scale.value).backward()
            total += loss.detach().cpu()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.together.reduce([total, *gradients])
        for gradient in gradients:
            gradient /= self.scale.value
        norm = nn.utils.clip_grad_norm_(parameters, given.max_grad_norm or math.inf)
        return float(total), float(norm)

    def _chance(self, number: int) -> Any:
        """Seed the dropout of a pass by its number."""
        return (
            seeded(self.settings.seed + 1_000_003 * number, self.denoiser.device)
            if self.settings.dropout
            else nullcontext()
        )

    def _loss(self, numbers: Sequence[int]) -> Tensor:
        """Return the mean squared error of the examples with these numbers, plus that of as many of the class."""
        counts = [1.0] if self.settings.prior is None else [1.0, self.settings.prior_weight]
        parts = [self.order.batch(folder, numbers) for folder in range(len(counts))]
        batch, target = join([batch for batch, _ in parts]), torch.cat([target for _, target in parts])
        weight = torch.tensor(counts).repeat_interleave(len(numbers)) * batch.get("weight", 1.0)
        predicted = self.denoiser.run(seen(batch)).float()
        errors = (predicted - target.to(predicted)).square().flatten(1).mean(1)
        return (errors * weight.to(errors)).sum() / len(numbers)
