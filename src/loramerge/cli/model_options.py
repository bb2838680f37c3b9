"""What ``zip``, ``calibrate`` and ``train`` share: options, the base model, the examples, where the result goes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, need
from .output import note_left_out, progress, table, written

if TYPE_CHECKING:
    from ..diffusion import Denoiser, Images, Team, Trajectories
    from ..files.lora import LoRA
    from ..merging.plans import Plan

Base = Annotated[str, typer.Option("--base", "-b", help="The model: a directory that diffusers saved, or a Hub name.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="One a file, with its trigger word; several of one file with | between."),
]
Data = Annotated[
    list[Path] | None, typer.Option("--data", help="One directory of images a file, with captions; else see --prompt.")
]
Resolution = Annotated[int | None, typer.Option("--resolution", help="Side of the images; the model's by default.")]
Precision = Annotated[str | None, typer.Option("--precision", help="The model's: bf16 (on CUDA) or fp32; or fp16.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")]
Flip = Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the images.")]
SnrGamma = Annotated[float | None, typer.Option("--snr-gamma", help="Min-SNR weights, such as 5.")]
Every = Annotated[int, typer.Option("--every", min=1, help="Steps between two states.")]
Autocast = Annotated[str | None, typer.Option("--autocast", help="Compute in bf16 while weights stay as they are.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute; cuda where there is one.")]
TextEncoders = Annotated[
    bool, typer.Option("--text-encoders", help="Have LoRAs act there too; otherwise their modules there are summed.")
]
Variant = Annotated[str | None, typer.Option("--variant", help="Which of the model's files, such as fp16.")]
SamplingSteps = Annotated[int, typer.Option("--sampling-steps", min=1, help="Without --data: steps of each image.")]
Trajectories_ = Annotated[int, typer.Option("--trajectories", min=1, help="Without --data: images of each LoRA.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Without --data: guidance; 1 for none.")]
Arch = Annotated[str | None, typer.Option("--architecture", help="The LoRAs' family, where the files leave it open.")]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user gave."""

    files: Sequence[str]
    base: str
    prompts: Sequence[str]
    data: Sequence[Path]
    resolution: int | None
    precision: str | None
    autocast: str | None
    device: str | None
    text_encoders: bool
    variant: str | None
    sampling_steps: int
    trajectories: int
    guidance: float | None
    architecture: str | None
    quiet: bool
    trust_remote_code: bool = False
    checkpointing: bool = False
    flip: bool = True
    snr_gamma: float | None = None
    seed: int = 0

    @property
    def texts(self) -> list[list[str]]:
        """The prompts of each file."""
        return [[text.strip() for text in prompt.split("|")] for prompt in self.prompts]

    @property
    def captions(self) -> list[str | None]:
        """For the images of each file that have none."""
        return [texts[0] for texts in self.texts] or [None] * len(self.data)

    def described(self) -> dict[str, Any]:
        """What is known of the examples without the model, as their own description has it."""
        from ..scoring.captions import captioned, digest

        chosen = {"resolution": self.resolution, "guidance": None if self.data else self.guidance}
        known: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        if self.data:
            found = [captioned(folder, caption) for folder, caption in zip(self.data, self.captions, strict=False)]
            images = [{"count": len(mine), "sha256": digest(mine)} for mine in found]
            return known | {"images": images, "flip": self.flip}
        if self.prompts:
            known |= {"prompts": self.texts, "steps": self.sampling_steps, "trajectories": self.trajectories}
        return known

    def check(self) -> None:
        """Refuse what can't work before anything large is read."""
        from ..scoring.captions import captioned

        if len(self.files) < 2:
            raise OptionError("Two LoRAs or more are merged; got one.")
        if not self.prompts and not self.data:
            raise OptionError(
                "What are the LoRAs for? Give one --prompt a file, with its trigger word, or one --data directory a file."
            )
        for name, values in (("--prompt", self.prompts), ("--data", self.data)):
            if values and len(values) != len(self.files):
                more = "; several prompts of one file stand with | between" if name == "--prompt" else ""
                raise OptionError(
                    f"{name} given: {len(values)}, LoRAs: {len(self.files)}. One a file, in their order{more}."
                )
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise OptionError(f"--snr-gamma is a number above 0, got {self.snr_gamma:g}.")
        if self.resolution is not None and self.resolution < 1:
            raise OptionError(f"--resolution is a number of pixels from 1, got {self.resolution}.")
        need("Learning on a model", "diffusers", "transformers", "accelerate")
        for folder, caption in zip(self.data, self.captions, strict=False):
            captioned(folder, caption)
        if not self.quiet:
            note_left_out(folder.expanduser() for folder in self.data)


def parsed(name: str, text: str, before: Any) -> Any:
    """A value in the type of the one that it replaces."""
    try:
        if isinstance(before, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(before)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(before)]
        raise OptionError(f"The setting {name} is {kind}, got {text!r}.") from None


def plan_of(files: Sequence[str], architecture: str | None, output: Path, to: str | None) -> "Plan":
    """The sum of the LoRAs, which says what the result's modules, dialect and dtype are."""
    from ..files.dialects.write import check_writable
    from ..files.reading import load
    from ..files.writing import check_target
    from ..merging.verbs import plan

    loras = [load(file, architecture=architecture) for file in files]
    planned = plan(loras, weights=[1.0] * len(loras))
    check_writable(to or planned.dialect, planned.dialect)
    check_target(output, to or planned.dialect)
    return planned


def denoiser_of(given: Given, team: "Team", loras: "Sequence[LoRA]") -> "Denoiser":
    """The base model."""
    from ..diffusion import load

    found = load(
        given.base,
        device=given.device or team.device,
        dtype=given.precision,
        autocast=given.autocast,
        checkpointing=given.checkpointing,
        text_encoders=given.text_encoders,
        variant=given.variant,
        trust_remote_code=given.trust_remote_code,
    )
    found.check(loras)
    return found


def examples_of(given: Given, denoiser: "Denoiser", loras: "Sequence[LoRA]") -> "Images | Trajectories":
    """Examples of every LoRA, from its pictures or of its own making."""
    from ..diffusion import from_images, from_prompts

    if not given.quiet:
        _hint(loras, given.texts)
    if given.data:
        with progress("Encoding images", given.quiet) as report:
            return from_images(
                denoiser,
                given.data,
                prompts=given.captions,
                resolution=given.resolution,
                flip=given.flip,
                snr_gamma=given.snr_gamma,
                progress=report,
            )
    with progress("Sampling", given.quiet) as report:
        return from_prompts(
            denoiser,
            loras,
            given.texts,
            steps=given.sampling_steps,
            trajectories=given.trajectories,
            guidance=given.guidance,
            resolution=given.resolution,
            snr_gamma=given.snr_gamma,
            seed=given.seed,
            progress=report,
        )


def _hint(loras: "Sequence[LoRA]", prompts: Sequence[Sequence[str]]) -> None:
    """Say so where no prompt has the words that a LoRA's own metadata name."""
    for lora, mine in zip(loras, prompts, strict=False):
        phrase = lora.metadata.get("modelspec.trigger_phrase", "")
        words = [word.strip() for word in phrase.split(",") if word.strip()]
        if words and not any(word in prompt for prompt in mine for word in words):
            print(f"Hint: {lora.name} says that its trigger is {phrase!r}; no prompt of it has that.", file=sys.stderr)


def identity(denoiser: "Denoiser", data: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """What a merge is learned on, for its metadata, and for checkpoints to agree in."""
    from ..diffusion.apply import fingerprint

    weights = fingerprint(denoiser.pipe)  # two bases may have one name
    return {**denoiser.identity, "fingerprint": weights, "data": dict(data), "processes": processes}


def kept_in(state: Path | None) -> str:
    """What one who interrupts a run is told of its state."""
    there = state is not None and state.exists()
    return f" The state is in {state}; the same command goes on from there." if there else ""


@contextmanager
def interruptible(state: Path | None) -> Iterator[None]:
    """Leave the program with a word on how to go on where the user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nInterrupted.{kept_in(state)}", file=sys.stderr)
        raise typer.Exit(130) from None


def loss_table(losses: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Means of the first losses and of the last; by name where there are several."""
    steps = len(losses[0][1])
    if not steps:
        return "No step was left to do."
    count = max(1, steps // 10, min(5, steps // 2))  # one step alone is mostly noise
    head = ["file", f"loss, first {count}", f"last {count}"]
    rows = [[name, *(f"{sum(end) / count:.4g}" for end in (mine[:count], mine[-count:]))] for name, mine in losses]
    return table(head, rows) if len(losses) > 1 else table(head[1:], [rows[0][1:]])


def write(lora: "LoRA", output: Path, to: str | None, dtype: str | None, quiet: bool) -> None:
    """Save a learned merge."""
    from ..files.writing import save

    path = save(lora, output, dialect=to, dtype=dtype)
    if not quiet:
        print(f"→ {written(path, to or lora.dialect)}")
