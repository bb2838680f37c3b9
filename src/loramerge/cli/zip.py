"""``loramerge zip``: coefficients learned on the base model, by gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .model_options import (
    Base,
    Checkpointing,
    Data,
    Every,
    Learning,
    Prompt,
    SnrGamma,
    identity,
    interruptible,
    loss_table,
    parsed,
)
from .options import Output, named
from .output import Pace, say
from .settings import command

if TYPE_CHECKING:
    from ..learned.columns import Learned, Settings, Step


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
    """The options of ``loramerge zip``."""

    output: Output
    base: Base
    prompt: Prompt = None
    data: Data = None
    preset: Annotated[str, typer.Option("--preset", help="default, paper, lora.rar, mkshing or mole.")] = "default"
    setting: Annotated[list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE, such as steps=20.")] = None
    weight: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="How much each LoRA counts, in order.")
    ] = None
    coefficients: Annotated[
        Path | None, typer.Option("--coefficients", help="Write them too, for 'merge --weights'.")
    ] = None
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Keep the state here; go on from it if it is there.")
    ] = None
    every: Every = 10
    checkpointing: Checkpointing = False
    snr_gamma: SnrGamma = None


@command
def run(given: Options) -> None:
    """Merge LoRAs by coefficients learned on the base model (ZipLoRA): an ordinary LoRA comes out.

    With --preset mole one weight per LoRA and block (MoLE's gates); with --set gates=input too they follow the picture,
    and OUTPUT has the gates, for 'generate --compose mole -O gates=OUTPUT'.

    Example: loramerge zip person.safetensors jersey.safetensors -b stabilityai/stable-diffusion-xl-base-1.0
    -p "a psq-person" -p "a barca24_jersey" -o zipped.safetensors
    """
    chosen = settings_of(given.preset, given.setting or [])
    if given.precision == "fp16" or given.autocast == "fp16":
        raise OptionError("In fp16 gradients underflow, so nothing can be learned. Way out: --precision bf16, or fp32.")
    if given.coefficients and (not chosen.by_column or chosen.gates == "input"):
        parametrised = f"The parametrisation {chosen.parametrisation!r} learns"
        what = "Gates of the input are" if chosen.by_column else parametrised
        raise OptionError(f"{what} no coefficients. Way out: no --coefficients.")
    if chosen.gates == "input" and given.text_encoders:
        raise OptionError("Gates of the input are the denoiser's. Way out: no --text-encoders.")
    given.check(given.snr_gamma)
    _learn(given, chosen)


def settings_of(preset: str, items: Sequence[str]) -> "Settings":
    """Read settings from a preset and NAME=VALUE."""
    from ..learned.presets import settings

    kept = settings(preset)
    changes: dict[str, Any] = {}
    for name, text in named("setting", items):
        changes[name] = parsed(name, text, getattr(kept, name, ""))
    return settings(preset, **changes)


def _learn(given: Options, chosen: "Settings") -> None:
    from ..diffusion import team, within_memory
    from ..learned.columns import mole, shares_of, ziplora
    from ..learned.gates import BlockGates

    shares = shares_of(given.weight, len(given.files))
    planned = given.plan()
    together = team(cpu=given.device == "cpu")
    given = replace(given, quiet=given.quiet or not together.writes)
    denoiser = given.load(given.base, together, checkpointing=given.checkpointing)
    denoiser.check(planned.loras)
    names = [lora.name for lora in planned.loras]
    losses = Losses(names, given.checkpoint, quiet=given.quiet)
    state = together.own(given.checkpoint) if given.checkpoint else None
    with within_memory(given.resolution or denoiser.resolution, chosen.batch_size, len(planned.loras)):
        draw = given.examples(denoiser, planned.loras, seed=chosen.seed, snr_gamma=given.snr_gamma)
        denoiser.release()
        with interruptible(state if together.writes else None):
            learned = (mole if chosen.gates == "input" else ziplora)(
                denoiser.predict,
                denoiser.models,
                planned.loras,
                draw,
                chosen,
                weights=shares,
                checkpoint=state,
                every=given.every,
                on_step=losses,
                reduce=together.reduce,
                shard=together.shard,
                identity=identity(denoiser, draw.description, together.size),
            )
    if together.writes:
        if not given.quiet:
            say(loss_table(list(zip(names, losses.fits, strict=True))))
        if isinstance(learned, BlockGates):
            learned.save(given.output)
            say(f"→ {given.output} (gates for 'generate --compose mole')") if not given.quiet else None
        else:
            given.write(learned.lora)
            _write_coefficients(learned, given.coefficients, given.quiet)


def _write_coefficients(learned: "Learned", path: Path | None, quiet: bool) -> None:
    if path and learned.coefficients:
        learned.coefficients.save(path)
        if not quiet:
            say(f"→ {path} (coefficients)")


class Losses:
    """Keeps the losses of every step, and shows them."""

    def __init__(self, names: Sequence[str], state: Path | None, *, quiet: bool) -> None:
        self.names = names
        self.quiet = quiet
        self.fits: list[list[float]] = [[] for _ in names]
        self.pace = Pace(state)

    def __call__(self, step: "Step") -> None:
        """Show a step."""
        for kept, fit in zip(self.fits, step.fits, strict=True):
            kept.append(fit)
        if self.quiet:
            return
        fits = "  ".join(f"{name} {fit:.4g}" for name, fit in zip(self.names, step.fits, strict=True))
        self.pace.show(step.step, step.total, f"loss {step.loss:.4g}  {fits}")
