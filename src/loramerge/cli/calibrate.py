"""``loramerge calibrate``: the least-squares merge, in closed form from the inputs of the base model's modules."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .model_options import Data, Learning, Prompt, identity
from .options import Output
from .output import Block, joined, progress, say, table
from .settings import command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..learned.least_squares import Report
    from ..learned.moments import Moments
    from ..merging import Plan


class Granularity(StrEnum):
    """The unknowns that are solved for."""

    whole = "global"
    layer = "layer"
    rank = "rank"
    core = "core"
    column = "column"
    full = "full"


class Prior(StrEnum):
    """The value of directions that no input has shown."""

    sum = "sum"
    mean = "mean"


@dataclass(frozen=True, kw_only=True)
class Options(Learning):
    """The options of ``loramerge calibrate``."""

    output: Output
    base: Annotated[str | None, typer.Option("--base", "-b", help="The model, unless --moments has its answers.")] = (
        None
    )
    prompt: Prompt = None
    data: Data = None
    granularity: Annotated[Granularity, typer.Option("--granularity", "-g", help="What is solved for.")] = (
        Granularity.core
    )
    ridge: Annotated[
        float | None, typer.Option("--ridge", min=0, help="Pull to the prior; the default depends on --granularity.")
    ] = None
    prior: Annotated[Prior, typer.Option("--prior", help="What unseen directions get.")] = Prior.sum
    moments: Annotated[
        Path | None, typer.Option("--moments", help="Keep what the modules saw; if it is there, no model is needed.")
    ] = None
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches per LoRA.")] = 16
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples per batch.")] = 1
    seed: Annotated[int, typer.Option("--seed", help="Seed of the examples.")] = 0


@command
def run(given: Options) -> None:
    """Merge LoRAs by least squares on what the base model's modules see: no gradients, an ordinary LoRA comes out.

    Example: loramerge calibrate person.safetensors jersey.safetensors -b stabilityai/stable-diffusion-xl-base-1.0
    -p "a psq-person" -p "a barca24_jersey" -o merged.safetensors
    """
    planned = given.plan()
    if given.moments and given.moments.exists():
        from ..learned.moments import Moments

        kept = Moments.load(given.moments)
        _check_same(kept.identity, given, given.moments)
        taken: Moments | None = kept
    else:
        taken = _taken(given, planned)
    if taken is None:
        return
    from ..learned.least_squares import lsq

    merged, report = lsq(
        planned.loras, taken, granularity=given.granularity.value, ridge=given.ridge, prior=given.prior.value
    )
    if not given.quiet:
        say(fit_table(report, planned.architecture))
    given.write(merged)


def _check_same(said: "Mapping[str, Any]", given: Options, path: Path) -> None:
    """Refuse moments that were taken of something else, where --base asks for a calibration again.

    Raises:
        OptionError: The base model, its precision, the examples or their number are others.
    """
    from ..diffusion.denoiser import called, dtype_called

    if not given.base or "base" not in said:
        return
    calibration = {"batches": given.batches, "batch_size": given.batch_size, "seed": given.seed}
    wanted = {"base": called(given.base), "text_encoders": given.text_encoders, "calibration": calibration}
    types = {"precision": given.precision, "autocast": given.autocast}
    wanted |= {name: dtype_called(value) for name, value in types.items() if value}
    found = {**said, **said["data"]}
    others = [name for name, value in (wanted | given.described()).items() if found.get(name) != value]
    if others:
        raise OptionError(
            f"The moments in {path} were taken with other {' and '.join(others)}. Ways out: another file for --moments, "
            "or no --base, which takes them as they are."
        )


def _taken(given: Options, planned: "Plan") -> "Moments | None":
    """Take moments of what the model's modules see; return None in processes that leave the rest to the first."""
    if not given.base:
        raise OptionError("On which model? Give --base, or --moments with a file that 'calibrate' has written.")
    given.check()
    from ..diffusion import team, within_memory
    from ..learned.calibration import calibrate

    together = team(cpu=given.device == "cpu")
    given = replace(given, quiet=given.quiet or not together.writes)
    denoiser = given.load(given.base or "", together)
    denoiser.check(planned.loras)
    with within_memory(given.resolution or denoiser.resolution, given.batch_size, 1):
        draw = given.examples(denoiser, planned.loras, seed=given.seed)
        denoiser.release()
        with progress("Calibrating", given.quiet) as report:
            found = calibrate(
                denoiser.predict,
                denoiser.models,
                planned.loras,
                draw,
                kind="gram" if given.granularity in ("column", "full") else "core",
                batches=given.batches,
                batch_size=given.batch_size,
                seed=given.seed,
                progress=report,
                shard=together.shard,
                identity=identity(denoiser, draw.description, together.size),
            )
    together.reduce(found.tensors())
    if not together.writes:
        return None
    if given.moments:
        found.save(given.moments)
    return found


def fit_table(report: "Report", architecture: str | None) -> Block:
    """Return a table by block of J / J of the base model: for the merge, the sum and the average."""
    from ..files.architectures.blocks import block

    if not report.fits:
        return joined(["The LoRAs change nothing in the modules that were looked at: the result is their sum."])
    kinds = (report.fits, report.sums, report.means)
    blocks: dict[str, list[str]] = {}
    for module in report.fits:
        component = module.partition(".")[0]
        blocks.setdefault(f"{component} {block(module, architecture)}", []).append(module)

    def row(name: str, modules: list[str]) -> list[str]:
        return [name, str(len(modules)), *(f"{sum(k[m] for m in modules) / len(modules):.3f}" for k in kinds)]

    rows = [row(name, modules) for name, modules in blocks.items()]
    head = ["block", "modules", "error", "of the sum", "of the average"]
    return joined(
        [
            table(head, [*rows, row("all", list(report.fits))]),
            "Error on each LoRA's own inputs, mean over modules: 0 is what the LoRA alone does, 1 what the base model does.",
        ]
    )
