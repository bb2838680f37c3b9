"""``loramerge calibrate``: the least-squares merge, in closed form from what the base model's modules see."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from . import model_options as given
from .options import Dtype, Files, Output, Quiet, To, TrustRemoteCode
from .output import progress, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..learned.least_squares import Report
    from ..learned.moments import Kind, Moments
    from ..merging.plans import Plan


class Granularity(StrEnum):
    """What is solved for."""

    whole = "global"
    layer = "layer"
    rank = "rank"
    core = "core"
    column = "column"
    full = "full"


class Prior(StrEnum):
    """What directions get that no input has shown."""

    sum = "sum"
    mean = "mean"


def calibrate(
    files: Files,
    output: Output,
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="The model, unless --moments has its answers.")
    ] = None,
    prompt: given.Prompt = None,
    data: given.Data = None,
    granularity: Annotated[
        Granularity, typer.Option("--granularity", "-g", help="What is solved for.")
    ] = Granularity.core,
    ridge: Annotated[float | None, typer.Option("--ridge", min=0, help="Pull to the prior; by granularity.")] = None,
    prior: Annotated[Prior, typer.Option("--prior", help="What unseen directions get.")] = Prior.sum,
    moments: Annotated[
        Path | None, typer.Option("--moments", help="Keep what the modules saw; if it is there, no model is needed.")
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Of each LoRA.")] = 16,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples in a batch.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the examples.")] = 0,
    resolution: given.Resolution = None,
    precision: given.Precision = None,
    autocast: given.Autocast = None,
    text_encoders: given.TextEncoders = False,
    variant: given.Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    device: given.Device = None,
    flip: given.Flip = True,
    sampling_steps: given.SamplingSteps = 12,
    trajectories: given.Trajectories_ = 4,
    guidance: given.Guidance = None,
    to: To = None,
    dtype: Dtype = None,
    architecture: given.Arch = None,
    quiet: Quiet = False,
) -> None:
    """Merge LoRAs by least squares on what the base model's modules see: no gradients, an ordinary LoRA comes out.

    Example: loramerge calibrate person.safetensors jersey.safetensors -b stabilityai/stable-diffusion-xl-base-1.0
    -p "a psq-person" -p "a barca24_jersey" -o merged.safetensors
    """
    from ..learned.least_squares import lsq
    from ..learned.moments import Moments

    asked = given.Given(
        files=files,
        base=base or "",
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
        flip=flip,
        seed=seed,
    )
    planned = given.plan_of(files, architecture, output, to)
    if moments and moments.exists():
        kept = Moments.load(moments)
        _check_same(kept.identity, asked, batches, batch_size, moments)
        taken: Moments | None = kept
    else:
        kind: Kind = "gram" if granularity in ("column", "full") else "core"
        taken = _taken(asked, planned, kind, batches, batch_size, moments)
    if taken is None:
        return
    merged, report = lsq(planned.loras, taken, granularity=granularity.value, ridge=ridge, prior=prior.value)
    if not quiet:
        print(fit_table(report, planned.architecture))
    given.write(merged, output, to, dtype, quiet)


def _check_same(said: "Mapping[str, Any]", asked: given.Given, batches: int, batch_size: int, path: Path) -> None:
    """Refuse moments that were taken of something else, where --base asks for a calibration again.

    Raises:
        OptionError: The base model, the examples or their number are others.
    """
    from ..diffusion.denoiser import called

    if not asked.base or "base" not in said:
        return
    calibration = {"batches": batches, "batch_size": batch_size, "seed": asked.seed}
    wanted = {"base": called(asked.base), "text_encoders": asked.text_encoders, "calibration": calibration}
    found = {**said, **said["data"]}
    others = [name for name, value in (wanted | asked.described()).items() if found.get(name) != value]
    if others:
        raise OptionError(
            f"The moments in {path} were taken with other {' and '.join(others)}. Ways out: another file for --moments, "
            "or no --base, which takes them as they are."
        )


def _taken(
    asked: given.Given, planned: "Plan", kind: "Kind", batches: int, batch_size: int, path: Path | None
) -> "Moments | None":
    """Moments of what the model's modules see; None in processes that leave the rest to the first."""
    from ..diffusion import team, within_memory
    from ..learned.calibration import calibrate

    if not asked.base:
        raise OptionError("On which model? Give --base, or --moments with a file that 'calibrate' has written.")
    asked.check()
    together = team(cpu=asked.device == "cpu")
    asked = replace(asked, quiet=asked.quiet or not together.writes)
    denoiser = given.denoiser_of(asked, together, planned.loras)
    with within_memory(asked.resolution or denoiser.resolution, batch_size, 1):
        draw = given.examples_of(asked, denoiser, planned.loras)
        denoiser.release()
        with progress("Calibrating", asked.quiet) as report:
            found = calibrate(
                denoiser.predict,
                denoiser.models,
                planned.loras,
                draw,
                kind=kind,
                batches=batches,
                batch_size=batch_size,
                seed=asked.seed,
                progress=report,
                shard=together.shard,
                identity=given.identity(denoiser, draw.description, together.size),
            )
    together.reduce(found.tensors())
    if not together.writes:
        return None
    if path:
        found.save(path)
    return found


def fit_table(report: "Report", architecture: str | None) -> str:
    """J / J of the base model by block: of the merge, of the sum, of the average."""
    from ..files.architectures.blocks import block

    if not report.fits:
        return "The LoRAs change nothing in the modules that were looked at: the result is their sum."
    kinds = (report.fits, report.sums, report.means)
    blocks: dict[str, list[str]] = {}
    for module in report.fits:
        component = module.partition(".")[0]
        blocks.setdefault(f"{component} {block(module, architecture)}", []).append(module)

    def row(name: str, modules: list[str]) -> list[str]:
        return [name, str(len(modules)), *(f"{sum(k[m] for m in modules) / len(modules):.3f}" for k in kinds)]

    rows = [row(name, modules) for name, modules in blocks.items()]
    head = ["block", "modules", "error", "of the sum", "of the average"]
    return (
        table(head, [*rows, row("all", list(report.fits))])
        + "\nError on each LoRA's own inputs, mean over modules: 0 is what the LoRA alone does, 1 what the base model does."
    )
