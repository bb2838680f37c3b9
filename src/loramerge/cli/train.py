"""``loramerge train``: a LoRA from pictures."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, need
from . import model_options as given
from .options import Output, Quiet, To, TrustRemoteCode, named
from .output import Pace, note_left_out, progress

if TYPE_CHECKING:
    from ..diffusion import Denoiser, Team, TrainSettings, TrainStep

OWN = [
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
]
"""Settings with an option of their own."""


def train(
    folder: Annotated[Path, typer.Argument(help="Pictures with captions: .txt beside each, or metadata.jsonl.")],
    output: Output,
    base: given.Base,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="For pictures without a caption.")] = None,
    trigger: Annotated[
        str | None, typer.Option("--trigger", help="The word for what is learned; it is kept in the file.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Of every module.")] = 8,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="The scale is alpha / rank; the rank by default.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps in all.")] = 400,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures in a pass, in each process.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="Of AdamW.")] = 1e-4,
    seed: Annotated[int, typer.Option("--seed", help="Of the first factors, the pictures' order and the noise.")] = 42,
    targets: Annotated[
        str, typer.Option("--targets", help="attention; transformers: all linear layers there; all: ResNets too.")
    ] = "attention",
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE for the others, such as schedule=cosine.")
    ] = None,
    resolution: given.Resolution = None,
    flip: given.Flip = True,
    snr_gamma: given.SnrGamma = None,
    prior: Annotated[
        Path | None, typer.Option("--prior", help="Prior preservation: a directory of pictures of the whole class.")
    ] = None,
    prior_prompt: Annotated[
        str | None, typer.Option("--prior-prompt", help="For pictures of the class without a caption.")
    ] = None,
    text_encoders: Annotated[bool, typer.Option("--text-encoders", help="Train them too.")] = False,
    precision: given.Precision = None,
    autocast: given.Autocast = None,
    checkpointing: given.Checkpointing = False,
    variant: given.Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    device: given.Device = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Keep the state here. By default beside the output, until that is written."),
    ] = None,
    every: given.Every = 100,
    validate: Annotated[
        list[str] | None, typer.Option("--validate", help="Draw this prompt on the way, beside the output.")
    ] = None,
    validate_every: Annotated[int, typer.Option("--validate-every", min=1, help="Steps between two drawings.")] = 100,
    validate_steps: Annotated[int, typer.Option("--validate-steps", min=1, help="Sampling steps of a drawing.")] = 30,
    name: Annotated[str | None, typer.Option("--name", help="Its title; the output's name by default.")] = None,
    to: To = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, the default, float16 or bfloat16.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train a LoRA on pictures with captions: Stable Diffusion 1, 2 and XL, through diffusers and PEFT.

    The same command goes on with a run that was interrupted.

    Example: loramerge train photos/ -b stabilityai/stable-diffusion-xl-base-1.0 -o person.safetensors
    --resolution 512 --trigger psq-person --gradient-checkpointing
    """
    need("Training", "diffusers", "transformers", "peft", "accelerate")
    from ..diffusion import load, team
    from ..files.dialects.write import check_writable
    from ..files.writing import check_target
    from ..scoring.captions import captioned

    own = {
        "rank": rank,
        "alpha": alpha,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "targets": targets,
        "resolution": resolution,
        "flip": flip,
        "snr_gamma": snr_gamma,
        "prior": prior,
        "prior_prompt": prior_prompt,
    }
    settings = settings_of(own, setting or [])
    check_writable(to or "diffusers", "diffusers")
    place = check_target(output, to or "diffusers")
    captioned(folder, prompt)
    if prior is not None:
        captioned(prior, prior_prompt)
    if not quiet:
        note_left_out(Path(each).expanduser() for each in (folder, prior) if each is not None)
    together = team(cpu=device == "cpu")
    denoiser = load(
        base,
        device=device or together.device,
        dtype=precision,
        autocast=autocast,
        checkpointing=checkpointing,
        text_encoders=text_encoders,
        variant=variant,
        trust_remote_code=trust_remote_code,
    )
    job = _Job(
        folder=folder,
        prompt=prompt,
        trigger=trigger,
        name=name or place.stem,
        checkpoint=checkpoint or place.with_name(f"{place.stem}.state.safetensors"),
        every=every,
        drawing=_Drawing(denoiser, validate or (), place, validate_every, validate_steps, settings.resolution),
        quiet=quiet or not together.writes,
    )
    lora = job.run(denoiser, settings, together)
    if together.writes:
        given.write(lora, output, to, dtype, quiet)
        if checkpoint is None:
            job.checkpoint.unlink(missing_ok=True)


def settings_of(own: dict[str, Any], others: Sequence[str]) -> "TrainSettings":
    """Settings from options, and from NAME=VALUE for those that have none.

    Raises:
        OptionError: A setting is unknown, or a value is out of range.
    """
    from dataclasses import fields

    from ..diffusion import TrainSettings

    defaults = {field.name: field.default for field in fields(TrainSettings) if field.name not in OWN}
    changes: dict[str, Any] = {}
    for name, text in named("setting", others):
        if name in OWN:
            raise OptionError(f"The setting {name} has an option of its own: --{name.replace('_', '-')}.")
        if name not in defaults:
            raise OptionError(f"Unknown setting {name!r}. Available: {', '.join(defaults)}.")
        changes[name] = given.parsed(name, text, defaults[name])
    return TrainSettings(**own, **changes)


@dataclass(frozen=True)
class _Drawing:
    """Pictures on the way."""

    denoiser: "Denoiser"
    prompts: Sequence[str]
    output: Path
    every: int
    steps: int
    resolution: int | None

    def __call__(self, step: "TrainStep") -> None:
        """Draw, if it is time."""
        from ..diffusion.training import draw

        if self.prompts and (step.step % self.every == 0 or step.step == step.total):
            draw(
                self.denoiser,
                self.prompts,
                self.output,
                step.step,
                sampling_steps=self.steps,
                resolution=self.resolution,
            )


@dataclass(frozen=True)
class _Job:
    """What is trained on, and what is shown of it."""

    folder: Path
    prompt: str | None
    trigger: str | None
    name: str
    checkpoint: Path
    every: int
    drawing: _Drawing
    quiet: bool

    def run(self, denoiser: "Denoiser", settings: "TrainSettings", together: "Team") -> Any:
        """Train; leave the program with a word on how to go on where the user interrupts."""
        from ..diffusion import train_lora

        self._hint(denoiser, settings.resolution)
        progressing = _Progressing(
            None if self.quiet else Pace(self.checkpoint), self.drawing if together.writes else None
        )
        try:
            with _asked(progressing, alone=together.size == 1), progress("Encoding images", self.quiet) as report:
                lora = train_lora(
                    denoiser,
                    self.folder,
                    settings=settings,
                    prompt=self.prompt,
                    checkpoint=self.checkpoint,
                    every=self.every,
                    on_step=progressing,
                    name=self.name,
                    trigger=self.trigger,
                    progress=report,
                )
        except KeyboardInterrupt:
            progressing.stopped = True
        if progressing.stopped:
            self._leave(progressing.losses, together.writes)
        if not self.quiet:
            print(given.loss_table([(self.name, progressing.losses)]))
        return lora

    def _hint(self, denoiser: "Denoiser", resolution: int | None) -> None:
        from ..diffusion.training.checks import hints

        if self.quiet:
            return
        for hint in hints(denoiser, self.folder, prompt=self.prompt, trigger=self.trigger, resolution=resolution):
            print(f"Hint: {hint}", file=sys.stderr)

    def _leave(self, losses: Sequence[float], writes: bool) -> None:
        if writes:
            kept = given.kept_in(self.checkpoint)
            print(f"\nInterrupted after {len(losses)} steps of this run.{kept}", file=sys.stderr)
        raise typer.Exit(130)


@dataclass
class _Progressing:
    """What happens after every step."""

    pace: Pace | None
    drawing: _Drawing | None
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
    """Have the first Ctrl-C end the run after its step, and the second at once.

    Of several processes each would end after a step of its own, so there the first one counts.
    """
    if not alone:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if progressing.stopped:
            raise KeyboardInterrupt
        progressing.stopped = True
        print("\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
