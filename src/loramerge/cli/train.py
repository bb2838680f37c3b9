"""``loramerge train``: a LoRA from pictures."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, need
from ..files.storage.paths import path_of
from .model_options import (
    Base,
    Checkpointing,
    Every,
    OnModel,
    SnrGamma,
    kept_in,
    loss_table,
    parsed,
    save_learned,
)
from .options import Output, Quiet, To, named
from .output import Pace, note_left_out, progress, say
from .settings import command

if TYPE_CHECKING:
    from ..diffusion import Denoiser, Team, TrainSettings, TrainStep
    from ..files.lora import LoRA

OWN = (
    "rank",
    "alpha",
    "steps",
    "batch_size",
    "learning_rate",
    "seed",
    "targets",
    "resolution",
    "flip",
    "snr_gamma",
    "prior",
    "prior_prompt",
)
"""Settings that have an option of their own, of the same name."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The options of the LoRA that ``loramerge train`` writes."""

    name: Annotated[str | None, typer.Option("--name", help="Title of the LoRA; the output's name by default.")] = None
    to: To = None
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, the default, float16 or bfloat16.")] = None
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class Options(OnModel, Saved):
    """The options of ``loramerge train``."""

    folder: Annotated[Path, typer.Argument(help="Pictures with captions: .txt beside each, or metadata.jsonl.")]
    output: Output
    base: Base
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="For pictures without a caption.")] = None
    trigger: Annotated[
        str | None, typer.Option("--trigger", help="The word for what is learned; it is kept in the file.")
    ] = None
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of every module.")] = 8
    alpha: Annotated[float | None, typer.Option("--alpha", help="The scale is alpha / rank; the rank by default.")] = (
        None
    )
    steps: Annotated[int, typer.Option("--steps", help="Steps in all.")] = 400
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures per pass in each process.")] = 1
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Learning rate of AdamW.")] = 1e-4
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the first factors, the pictures' order and the noise.")
    ] = 42
    targets: Annotated[
        str, typer.Option("--targets", help="attention; transformers: all linear layers there; all: ResNets too.")
    ] = "attention"
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE for the others, such as schedule=cosine.")
    ] = None
    snr_gamma: SnrGamma = None
    prior: Annotated[
        Path | None, typer.Option("--prior", help="Prior preservation: a directory of pictures of the whole class.")
    ] = None
    prior_prompt: Annotated[
        str | None, typer.Option("--prior-prompt", help="For pictures of the class without a caption.")
    ] = None
    beside: Annotated[
        str | None,
        typer.Option("--beside", help="A LoRA that acts, unchanged, while this one learns: their sum is the merge."),
    ] = None
    off_rows: Annotated[
        bool, typer.Option("--off-rows", help="Stay off the inputs that --beside acts on, instead of training with it.")
    ] = False
    text_encoders: Annotated[bool, typer.Option("--text-encoders", help="Train them too.")] = False
    checkpointing: Checkpointing = False
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Keep the state here; by default beside the output, until that is written."),
    ] = None
    every: Every = 100
    validate: Annotated[
        list[str] | None, typer.Option("--validate", help="A prompt to draw during training, beside the output.")
    ] = None
    validate_every: Annotated[int, typer.Option("--validate-every", min=1, help="Steps between two drawings.")] = 100
    validate_steps: Annotated[int, typer.Option("--validate-steps", min=1, help="Sampling steps of a drawing.")] = 30


@command
def run(given: Options) -> None:
    """Train a LoRA on pictures with captions, through diffusers and PEFT.

    The same command goes on with a run that was interrupted.

    Example: loramerge train photos/ -b stabilityai/stable-diffusion-xl-base-1.0 -o person.safetensors
    --resolution 512 --trigger psq-person --gradient-checkpointing
    """
    need("Training", "diffusers", "transformers", "peft", "accelerate")
    from ..diffusion import team
    from ..files.dialects.write import check_writable
    from ..files.reading import load
    from ..files.writing import check_target
    from ..scoring.captions import captioned

    if given.off_rows and given.beside is None:
        raise OptionError("--off-rows needs --beside, the LoRA whose inputs are left alone.")
    settings = settings_of({name: getattr(given, name) for name in OWN}, given.setting or [])
    check_writable(given.to or "diffusers", "diffusers")
    place = check_target(given.output, given.to or "diffusers")
    captioned(given.folder, given.prompt)
    if given.prior is not None:
        captioned(given.prior, given.prior_prompt)
    if not given.quiet:
        note_left_out(filter(None, (given.folder, given.prior)))
    together = team(cpu=given.device == "cpu")
    given = replace(given, quiet=given.quiet or not together.writes)
    first = None if given.beside is None else load(given.beside)
    denoiser = given.load(given.base, together, checkpointing=given.checkpointing)
    job = _Job(given, settings, place, denoiser, first)
    lora = job.run(together)
    if together.writes:
        save_learned(lora, given.output, given.to, given.dtype, given.quiet)
        if given.checkpoint is None:
            job.checkpoint.unlink(missing_ok=True)


def settings_of(own: dict[str, Any], others: Sequence[str]) -> "TrainSettings":
    """Read settings from options, and from NAME=VALUE for those without an option.

    Raises:
        OptionError: A setting is unknown, or a value is out of range.
    """
    from ..diffusion import TrainSettings

    defaults = {field.name: field.default for field in fields(TrainSettings) if field.name not in OWN}
    changes: dict[str, Any] = {}
    for name, text in named("setting", others):
        if name in OWN:
            raise OptionError(f"The setting {name} has an option of its own: --{name.replace('_', '-')}.")
        if name not in defaults:
            raise OptionError(f"Unknown setting {name!r}. Available: {', '.join(defaults)}.")
        changes[name] = parsed(name, text, defaults[name])
    return TrainSettings(**own, **changes)


@dataclass(frozen=True)
class _Job:
    """A run: its options and settings, the place of its result, and the model."""

    given: Options
    settings: "TrainSettings"
    place: Path
    denoiser: "Denoiser"
    beside: "LoRA | None"

    @property
    def name(self) -> str:
        """The title of the LoRA."""
        return self.given.name or self.place.stem

    @property
    def checkpoint(self) -> Path:
        """The file that holds the state."""
        return self.given.checkpoint or path_of(self.place.with_name(f"{self.place.stem}.state.safetensors"))

    def run(self, together: "Team") -> Any:
        """Train; on Ctrl-C, print how to resume and exit."""
        from ..diffusion import train_lora

        given = self.given
        self._hint()
        pace = None if given.quiet else Pace(self.checkpoint)
        progressing = _Progressing(pace, self._draw if given.validate and together.writes else None)
        try:
            with _asked(progressing, alone=together.size == 1), progress("Encoding images", given.quiet) as report:
                lora = train_lora(
                    self.denoiser,
                    given.folder,
                    settings=self.settings,
                    prompt=given.prompt,
                    checkpoint=self.checkpoint,
                    every=given.every,
                    on_step=progressing,
                    name=self.name,
                    trigger=given.trigger,
                    beside=self.beside,
                    off_rows=given.off_rows,
                    progress=report,
                )
        except KeyboardInterrupt:
            progressing.stopped = True
        if progressing.stopped:
            self._leave(progressing.losses, together.writes)
        if not given.quiet:
            say(loss_table([(self.name, progressing.losses)]))
        return lora

    def _hint(self) -> None:
        from ..diffusion.training.checks import hints

        given = self.given
        if given.quiet:
            return
        for hint in hints(
            self.denoiser,
            given.folder,
            prompt=given.prompt,
            trigger=given.trigger,
            resolution=self.settings.resolution,
        ):
            say(f"Hint: {hint}", file=sys.stderr)

    def _draw(self, step: "TrainStep") -> None:
        """Draw validation images, if it is time."""
        from ..diffusion.training import draw

        given = self.given
        if step.step % given.validate_every == 0 or step.step == step.total:
            draw(
                self.denoiser,
                given.validate or (),
                self.place,
                step.step,
                sampling_steps=given.validate_steps,
                resolution=self.settings.resolution,
            )

    def _leave(self, losses: Sequence[float], writes: bool) -> None:
        if writes:
            kept = kept_in(self.checkpoint)
            say("", f"Interrupted after {len(losses)} steps of this run.{kept}", file=sys.stderr)
        raise typer.Exit(130)


@dataclass
class _Progressing:
    """Runs after every step: records the loss, shows it, and draws."""

    pace: Pace | None
    drawing: Callable[["TrainStep"], None] | None
    losses: list[float] = field(default_factory=list)
    stopped: bool = False

    def __call__(self, step: "TrainStep") -> bool:
        self.losses.append(step.loss)
        if self.pace:
            self.pace.show(step.step, step.total, f"loss {step.loss:.4g}")
        if self.drawing and not self.stopped:
            self.drawing(step)
        self.stopped = self.stopped and step.step < step.total
        return not self.stopped


@contextmanager
def _asked(progressing: _Progressing, *, alone: bool) -> Iterator[None]:
    """Make the first Ctrl-C stop the run after the current step, and the second at once.

    Several processes would each stop after a different step, so there the first one stops at once.
    """
    if not alone:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if progressing.stopped:
            raise KeyboardInterrupt
        progressing.stopped = True
        say("", "Stopping after this step; Ctrl-C again stops at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
