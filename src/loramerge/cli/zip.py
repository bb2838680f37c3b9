"""``loramerge zip``: coefficients learned on the base model, by gradient."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from . import model_options as given
from .options import Dtype, Files, Output, Quiet, To, TrustRemoteCode, named
from .output import Pace

if TYPE_CHECKING:
    from ..learned.columns import Learned, Settings, Step


def zip_loras(
    files: Files,
    output: Output,
    base: given.Base,
    prompt: given.Prompt = None,
    data: given.Data = None,
    preset: Annotated[str, typer.Option("--preset", help="default, paper, lora.rar or mkshing.")] = "default",
    setting: Annotated[list[str] | None, typer.Option("--set", "-s", help="NAME=VALUE, such as steps=20.")] = None,
    weight: Annotated[list[float] | None, typer.Option("--weight", "-w", help="How much each one counts.")] = None,
    coefficients: Annotated[
        Path | None, typer.Option("--coefficients", help="Write them too, for 'merge --weights'.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Keep the state here; go on from it if it is there.")
    ] = None,
    every: given.Every = 10,
    resolution: given.Resolution = None,
    precision: given.Precision = None,
    autocast: given.Autocast = None,
    checkpointing: given.Checkpointing = False,
    text_encoders: given.TextEncoders = False,
    variant: given.Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    device: given.Device = None,
    snr_gamma: given.SnrGamma = None,
    flip: given.Flip = True,
    sampling_steps: given.SamplingSteps = 12,
    trajectories: given.Trajectories_ = 4,
    guidance: given.Guidance = None,
    to: To = None,
    dtype: Dtype = None,
    architecture: given.Arch = None,
    quiet: Quiet = False,
) -> None:
    """Merge LoRAs by coefficients learned on the base model (ZipLoRA): an ordinary LoRA comes out.

    Example: loramerge zip person.safetensors jersey.safetensors -b stabilityai/stable-diffusion-xl-base-1.0
    -p "a psq-person" -p "a barca24_jersey" -o zipped.safetensors
    """
    chosen = settings_of(preset, setting or [])
    if precision == "fp16" or autocast == "fp16":
        raise OptionError("In fp16 gradients underflow, so nothing can be learned. Way out: --precision bf16, or fp32.")
    if coefficients and chosen.parametrisation == "down":
        raise OptionError("The parametrisation 'down' learns no coefficients. Way out: no --coefficients.")
    asked = given.Given(
        files=files,
        base=base,
        prompts=prompt or (),
        data=data or (),
        resolution=resolution,
        precision=precision,
        autocast=autocast,
        device=device,
        text_encoders=text_encoders,
        variant=variant,
        trust_remote_code=trust_remote_code,
        sampling_steps=sampling_steps,
        trajectories=trajectories,
        guidance=guidance,
        architecture=architecture,
        quiet=quiet,
        checkpointing=checkpointing,
        flip=flip,
        snr_gamma=snr_gamma,
        seed=chosen.seed,
    )
    asked.check()
    _run(asked, chosen, output, coefficients, checkpoint, every, weight, to, dtype)


def settings_of(preset: str, items: Sequence[str]) -> "Settings":
    """Settings from a preset and NAME=VALUE."""
    from ..learned.columns import settings

    kept = settings(preset)
    changes: dict[str, Any] = {}
    for name, text in named("setting", items):
        changes[name] = given.parsed(name, text, getattr(kept, name, ""))
    return settings(preset, **changes)


def _run(
    asked: given.Given,
    chosen: "Settings",
    output: Path,
    coefficients: Path | None,
    checkpoint: Path | None,
    every: int,
    weights: Sequence[float] | None,
    to: str | None,
    dtype: str | None,
) -> None:
    from ..diffusion import team, within_memory
    from ..learned.columns import shares_of, ziplora

    shares = shares_of(weights, len(asked.files))
    planned = given.plan_of(asked.files, asked.architecture, output, to)
    together = team(cpu=asked.device == "cpu")
    quiet = asked.quiet or not together.writes
    asked = replace(asked, quiet=quiet)
    denoiser = given.denoiser_of(asked, together, planned.loras)
    names = [lora.name for lora in planned.loras]
    state = together.own(checkpoint) if checkpoint else None
    with within_memory(asked.resolution or denoiser.resolution, chosen.batch_size, len(planned.loras)):
        draw = given.examples_of(asked, denoiser, planned.loras)
        denoiser.release()
        with given.interruptible(state if together.writes else None):
            learned = ziplora(
                denoiser.predict,
                denoiser.models,
                planned.loras,
                draw,
                chosen,
                weights=shares,
                checkpoint=state,
                every=every,
                on_step=None if quiet else Losses(names, checkpoint),
                reduce=together.reduce,
                shard=together.shard,
                identity=given.identity(denoiser, draw.description, together.size),
            )
    if together.writes:
        if not quiet:
            fits = [[step.fits[i] for step in learned.history] for i in range(len(names))]
            print(given.loss_table(list(zip(names, fits, strict=True))))
        given.write(learned.lora, output, to, dtype, quiet)
        _write_coefficients(learned, coefficients, quiet)


def _write_coefficients(learned: "Learned", path: Path | None, quiet: bool) -> None:
    if path and learned.coefficients:
        learned.coefficients.save(path)
        if not quiet:
            print(f"→ {path} (coefficients)")


class Losses:
    """The losses of every step."""

    def __init__(self, names: Sequence[str], state: Path | None) -> None:
        self.names = names
        self.pace = Pace(state)

    def __call__(self, step: "Step") -> None:
        """Show a step."""
        fits = "  ".join(f"{name} {fit:.4g}" for name, fit in zip(self.names, step.fits, strict=True))
        self.pace.show(step.step, step.total, f"loss {step.loss:.4g}  {fits}")
