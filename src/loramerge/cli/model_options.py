"""Options and steps that ``zip``, ``calibrate`` and ``train`` share: base model, examples, and the result."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, need
from .options import ArchOfAll, Dtype, Files, Output, Quiet, To, TrustRemoteCode
from .output import Block, joined, note_left_out, progress, say, table, written

if TYPE_CHECKING:
    from ..diffusion import Denoiser, Images, Team, Trajectories
    from ..files.lora import LoRA
    from ..merging import Plan

Base = Annotated[str, typer.Option("--base", "-b", help="The model: a directory that diffusers saved, or a Hub name.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="One per file, with its trigger word; several of one file with | between."),
]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="One directory of images per file, with captions; else see --prompt."),
]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")]
SnrGamma = Annotated[float | None, typer.Option("--snr-gamma", help="Min-SNR weights, such as 5.")]
Every = Annotated[int, typer.Option("--every", min=1, help="Steps between two states.")]


@dataclass(frozen=True, kw_only=True)
class OnModel:
    """The options of every command that learns on a base model."""

    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Side of the images; the model's by default.")
    ] = None
    precision: Annotated[
        str | None, typer.Option("--precision", help="The model's: bf16 (on CUDA) or fp32; or fp16.")
    ] = None
    autocast: Annotated[
        str | None, typer.Option("--autocast", help="Compute in bf16 while weights stay as they are.")
    ] = None
    text_encoders: Annotated[
        bool,
        typer.Option("--text-encoders", help="Have LoRAs act there too; otherwise their modules there are summed."),
    ] = False
    variant: Annotated[str | None, typer.Option("--variant", help="Which of the model's files, such as fp16.")] = None
    trust_remote_code: TrustRemoteCode = False
    device: Annotated[str | None, typer.Option("--device", help="Where to compute; cuda where there is one.")] = None
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the images.")] = True

    def load(self, base: str, team: "Team", *, checkpointing: bool = False) -> "Denoiser":
        """Load the base model."""
        from ..diffusion import load

        return load(
            base,
            device=self.device or team.device,
            dtype=self.precision,
            autocast=self.autocast,
            checkpointing=checkpointing,
            text_encoders=self.text_encoders,
            variant=self.variant,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The options of examples that the LoRAs make themselves, and of the result."""

    sampling_steps: Annotated[
        int, typer.Option("--sampling-steps", min=1, help="Without --data: steps of each image.")
    ] = 12
    trajectories: Annotated[int, typer.Option("--trajectories", min=1, help="Without --data: images of each LoRA.")] = 4
    guidance: Annotated[float | None, typer.Option("--guidance", help="Without --data: guidance; 1 for none.")] = None
    to: To = None
    dtype: Dtype = None
    architecture: ArchOfAll = None
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class Learning(OnModel, Sampled):
    """The options of commands that merge LoRAs by what a base model does.

    Each command declares those again that its ``--help`` lists first.
    """

    files: Files
    output: Output
    base: str | None
    prompt: Prompt = None
    data: Data = None

    @property
    def prompts(self) -> list[list[str]]:
        """The prompts of each file."""
        return [[text.strip() for text in prompt.split("|")] for prompt in self.prompt or ()]

    @property
    def captions(self) -> list[str | None]:
        """The captions for images that have none, one per directory."""
        return [texts[0] for texts in self.prompts] or [None] * len(self.data or ())

    def described(self) -> dict[str, Any]:
        """Return what is known of the examples without the model, in the form of their own description."""
        from ..scoring.captions import captioned, digest

        chosen = {"resolution": self.resolution, "guidance": None if self.data else self.guidance}
        known: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        if self.data:
            found = [captioned(folder, caption) for folder, caption in zip(self.data, self.captions, strict=False)]
            images = [{"count": len(mine), "sha256": digest(mine)} for mine in found]
            return known | {"images": images, "flip": self.flip}
        if self.prompt:
            known |= {"prompts": self.prompts, "steps": self.sampling_steps, "trajectories": self.trajectories}
        return known

    def check(self, snr_gamma: float | None = None) -> None:
        """Refuse what can't work before anything large is read."""
        from ..scoring.captions import captioned

        if len(self.files) < 2:
            raise OptionError("Two LoRAs or more are merged; got one.")
        if not self.prompt and not self.data:
            raise OptionError(
                "What are the LoRAs for? Give one --prompt per file, with its trigger word, "
                "or one --data directory per file."
            )
        for name, values in (("--prompt", self.prompt), ("--data", self.data)):
            if values and len(values) != len(self.files):
                more = "; several prompts of one file stand with | between" if name == "--prompt" else ""
                raise OptionError(
                    f"{name} given: {len(values)}, LoRAs: {len(self.files)}. One per file, in their order{more}."
                )
        if snr_gamma is not None and not snr_gamma > 0:
            raise OptionError(f"--snr-gamma is a number above 0, got {snr_gamma:g}.")
        if self.resolution is not None and self.resolution < 1:
            raise OptionError(f"--resolution is a number of pixels from 1, got {self.resolution}.")
        need("Learning on a model", "diffusers", "transformers", "accelerate")
        for folder, caption in zip(self.data or (), self.captions, strict=False):
            captioned(folder, caption)
        if not self.quiet:
            note_left_out(self.data or ())

    def plan(self) -> "Plan":
        """Plan the sum of the LoRAs, which says what the result's modules, dialect and dtype are."""
        from ..files.dialects.write import check_writable
        from ..files.reading import load
        from ..files.writing import check_apart, check_target
        from ..merging.verbs import plan

        loras = [load(file, architecture=self.architecture) for file in self.files]
        planned = plan(loras, weights=[1.0] * len(loras))
        check_writable(self.to or planned.dialect, planned.dialect)
        target = check_target(self.output, self.to or planned.dialect)
        check_apart(self.files, target, "one of the LoRAs that are merged")
        return planned

    def examples(
        self, denoiser: "Denoiser", loras: "Sequence[LoRA]", *, seed: int, snr_gamma: float | None = None
    ) -> "Images | Trajectories":
        """Return examples of every LoRA, from its pictures or of its own making."""
        from ..diffusion import from_images, from_prompts

        if not self.quiet:
            _hint(loras, self.prompts)
        if self.data:
            with progress("Encoding images", self.quiet) as report:
                return from_images(
                    denoiser,
                    self.data,
                    prompts=self.captions,
                    resolution=self.resolution,
                    flip=self.flip,
                    snr_gamma=snr_gamma,
                    progress=report,
                )
        with progress("Sampling", self.quiet) as report:
            return from_prompts(
                denoiser,
                loras,
                self.prompts,
                steps=self.sampling_steps,
                trajectories=self.trajectories,
                guidance=self.guidance,
                resolution=self.resolution,
                snr_gamma=snr_gamma,
                seed=seed,
                progress=report,
            )

    def write(self, lora: "LoRA") -> None:
        """Save a learned merge."""
        save_learned(lora, self.output, self.to, self.dtype, self.quiet)


def parsed(name: str, text: str, before: Any) -> Any:
    """Read a value in the type of the one that it replaces."""
    try:
        if isinstance(before, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(before)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(before)]
        raise OptionError(f"The setting {name} is {kind}, got {text!r}.") from None


def _hint(loras: "Sequence[LoRA]", prompts: Sequence[Sequence[str]]) -> None:
    """Print a hint for each LoRA whose own metadata name trigger words that no prompt of it has."""
    for lora, mine in zip(loras, prompts, strict=False):
        phrase = lora.metadata.get("modelspec.trigger_phrase", "")
        words = [word.strip() for word in phrase.split(",") if word.strip()]
        if words and not any(word in prompt for prompt in mine for word in words):
            say(f"Hint: {lora.name} says that its trigger is {phrase!r}; no prompt of it has that.", file=sys.stderr)


def identity(denoiser: "Denoiser", data: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Return what a merge is learned on, for its metadata, and for checkpoints to be compared with."""
    from ..diffusion.apply import fingerprint

    weights = fingerprint(denoiser.pipe)  # two bases may have one name
    return {**denoiser.identity, "fingerprint": weights, "data": dict(data), "processes": processes}


def kept_in(state: Path | None) -> str:
    """Return the hint on how to resume that an interrupted run prints; empty if no state was written."""
    there = state is not None and state.exists()
    return f" The state is in {state}; the same command goes on from there." if there else ""


@contextmanager
def interruptible(state: Path | None) -> Iterator[None]:
    """On Ctrl-C, print how to resume and exit."""
    try:
        yield
    except KeyboardInterrupt:
        say("", f"Interrupted.{kept_in(state)}", file=sys.stderr)
        raise typer.Exit(130) from None


def loss_table(losses: Sequence[tuple[str, Sequence[float]]]) -> Block:
    """Return means of the first losses and of the last, with names where there are several series."""
    steps = len(losses[0][1])
    if not steps:
        return joined(["No step was left to do."])
    count = max(1, steps // 10, min(5, steps // 2))  # one step alone is mostly noise
    head = ["file", f"loss, first {count}", f"last {count}"]
    rows = [[name, *(f"{sum(end) / count:.4g}" for end in (mine[:count], mine[-count:]))] for name, mine in losses]
    return table(head, rows) if len(losses) > 1 else table(head[1:], [rows[0][1:]])


def save_learned(lora: "LoRA", output: Path, to: str | None, dtype: str | None, quiet: bool) -> None:
    """Save a LoRA that was learned, and say where it is."""
    from ..files.writing import save

    path = save(lora, output, dialect=to, dtype=dtype)
    if not quiet:
        say(f"→ {written(path, to or lora.dialect)}")
