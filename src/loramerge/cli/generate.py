"""``loramerge generate``: pictures of settings × prompts × seeds."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError, need
from ..files.storage.paths import is_there
from .options import ArchOfAll, Quiet, TrustRemoteCode, named
from .output import progress, resumable, say, table
from .settings import command

if TYPE_CHECKING:
    from ..diffusion.composing import Use
    from ..diffusion.composing.running import Composed
    from ..diffusion.generation import Drawn, Setting


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge generate``."""

    base: Annotated[
        str, typer.Option("--base", "-b", help="The model: a diffusers directory, or a name on the Hugging Face Hub.")
    ]
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Repeat once per prompt.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory: SETTING/PROMPT-SEED.png, sheet.png.")]
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            "-l",
            help="Repeat once per setting: FILE, FILE:0.8, NAME=FILE:0.7+FILE:0.5, or a recipe.toml with [compose]. "
            "A weight is 1 by default.",
        ),
    ] = None
    none: Annotated[bool, typer.Option("--none/--no-none", help="Draw without any LoRA too.")] = True
    compose: Annotated[
        list[str] | None,
        typer.Option(
            "--compose",
            help="Draw each setting of several LoRAs with this composition too; repeat once per composition. "
            "'loramerge compositions' lists them.",
        ),
    ] = None
    option: Annotated[list[str] | None, typer.Option("--option", "-O", help="NAME=VALUE of the compositions.")] = None
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words",
            help="What the prompt calls a LoRA, as WORDS or WORDS=NOUN: psq-person=person. Repeat once per LoRA of a "
            "setting, in order; '-' leaves one out. The file's trigger phrase by default.",
        ),
    ] = None
    box: Annotated[
        list[str] | None,
        typer.Option(
            "--box", help="Where a LoRA acts, as left,top,right,bottom from 0 to 1; once per LoRA, like --words."
        ),
    ] = None
    mask: Annotated[
        list[str] | None,
        typer.Option("--mask", help="A picture, white where a LoRA acts; once per LoRA, like --words."),
    ] = None
    curve: Annotated[
        list[str] | None,
        typer.Option("--curve", help="A LoRA's strength over time: 0:1,0.5:0. Once per LoRA, like --words."),
    ] = None
    seeds: Annotated[str, typer.Option("--seeds", "-n", help="How many, from 0; or which: 3,5,8.")] = "8"
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the scheduler.")] = 30
    guidance: Annotated[float | None, typer.Option("--guidance", help="The pipeline's own by default.")] = None
    size: Annotated[str | None, typer.Option("--size", help="512, or WIDTHxHEIGHT; the model's own by default.")] = None
    negative: Annotated[str | None, typer.Option("--negative", help="A negative prompt.")] = None
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=1, help="Frames of a model for videos: 1, a picture, by default; more move."),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="A class of diffusers, such as DPMSolverMultistepScheduler.")
    ] = None
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Pictures drawn together; the number changes only rounding.")
    ] = 4
    device: Annotated[str | None, typer.Option("--device", help="CUDA where there is one, by default.")] = None
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; float16 on CUDA by default.")
    ] = None
    variant: Annotated[str | None, typer.Option("--variant", help="Which of the base's files, such as fp16.")] = None
    trust_remote_code: TrustRemoteCode = False
    architecture: ArchOfAll = None
    side: Annotated[int, typer.Option("--sheet-side", min=16, help="Pixels of a picture on the contact sheet.")] = 192
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Draw pictures with LoRAs: every setting, prompt and seed, each with its recipe inside, and a contact sheet.

    What is there already, with the same recipe, is kept: an interrupted run goes on where it stopped.

    Example: loramerge generate --base stabilityai/stable-diffusion-xl-base-1.0 --lora person.safetensors
    --lora both=person.safetensors:0.7+jersey.safetensors:0.5 -p "a psq-person" --seeds 8 -o out/
    """
    need("Drawing", "diffusers", "transformers", "peft", "accelerate")
    from ..diffusion import drawing, generation, pipelines
    from ..scoring.scores import Shot
    from ..scoring.sheets import save_sheet

    numbers = read_seeds(given.seeds)
    width, height = read_size(given.size)
    sampling = drawing.Sampling(
        steps=given.steps,
        guidance=given.guidance,
        height=height,
        width=width,
        negative_prompt=given.negative,
        frames=given.frames,
    )
    with ExitStack() as loras:
        settings = read_settings(given.lora or [], loras, none=given.none, architecture=given.architecture)
        settings |= read_compositions(settings, given)
        generation.check(settings, given.prompt, numbers)
        pipe = pipelines.load_pipeline(
            given.base,
            device=given.device,
            dtype=given.dtype,
            variant=given.variant,
            scheduler=given.scheduler,
            quiet=True,
            trust_remote_code=given.trust_remote_code,
        )
        with resumable("what was drawn"), progress("Drawing", given.quiet) as report:
            drawn = generation.generate(
                pipe,
                settings,
                given.prompt,
                numbers,
                given.output,
                sampling=sampling,
                batch=given.batch,
                base=given.base,
                progress=report,
            )
    shots = [Shot(d.setting, d.prompt, d.seed, d.path) for d in drawn]
    save_sheet(shots, given.output / "sheet.png", side=given.side)
    if not given.quiet:
        say(_shown(drawn))
        say(f"→ {given.output}: {len(drawn)} pictures, sheet.png")


def read_settings(
    given: list[str], loras: ExitStack, *, none: bool, architecture: str | None = None
) -> dict[str, "Setting"]:
    """Read settings as they are typed, and return them by name; ``loras`` closes what is opened for them.

    Raises:
        OptionError: Two have the same name, or one can't be read.
    """
    found: dict[str, Setting] = {"none": []} if none else {}
    for text in given:
        name, uses = _setting(text, loras, architecture)
        if name in found:
            raise OptionError(f"Two settings are called {name!r}. Name them: --lora NAME={text}.")
        found[name] = uses
    if not found:
        raise OptionError("Nothing to draw: give --lora, or leave out --no-none.")
    return found


def read_compositions(settings: Mapping[str, "Setting"], given: Options) -> dict[str, "Composed"]:
    """Return every setting of several LoRAs in every composition, named ``SETTING+COMPOSITION``.

    Raises:
        OptionError: There is nothing to compose, or an option can't be read or belongs to no composition.
    """
    from ..diffusion.composing import COMPOSITIONS
    from ..diffusion.composing.running import Composed

    places = [*(given.words or ()), *(given.box or ()), *(given.mask or ()), *(given.curve or ())]
    if not given.compose:
        if places or given.option:
            raise OptionError("--words, --box, --mask, --curve and -O are for compositions: give --compose too.")
        return {}
    chosen = [COMPOSITIONS[name] for name in given.compose]
    plain = {name: list(uses) for name, uses in settings.items() if not isinstance(uses, Composed)}
    several = {name: placed(uses, given) for name, uses in plain.items() if len(uses) > 1}
    if not several:
        raise OptionError(
            "Nothing to compose: wanted a setting of two LoRAs or more, --lora a.safetensors+b.safetensors."
        )
    most = max(map(len, several.values()))
    for option, values in (("words", given.words), ("box", given.box), ("mask", given.mask), ("curve", given.curve)):
        if len(values or ()) > most:
            raise OptionError(
                f"--{option} is given {len(values or ())} times, and no setting has more than {most} LoRAs."
            )
    texts = dict(named("option", given.option or ()))
    for name in texts:
        if not any(name in each.options for each in chosen):
            chosen[0].check(texts)
    return {
        f"{name}+{each.name}": Composed(
            uses, each.name, {key: each.options[key].parse(text) for key, text in texts.items() if key in each.options}
        )
        for name, uses in several.items()
        for each in chosen
    }


def placed(uses: Sequence["Use"], given: Options) -> list["Use"]:
    """Return the LoRAs of a setting with their words, places and curves."""
    from ..scoring.pictures import Box

    def own(texts: list[str] | None, i: int) -> str | None:
        return texts[i] if texts and i < len(texts) and texts[i] != "-" else None

    found = []
    for i, use in enumerate(uses):
        words, _, noun = (own(given.words, i) or "").partition("=")
        box, mask, curve = own(given.box, i), own(given.mask, i), own(given.curve, i)
        found.append(
            replace(
                use,
                words=words or None,
                noun=noun or None,
                box=Box.parse(box) if box else None,
                mask=mask,
                curve=read_curve(curve) if curve else (),
            )
        )
    return found


def read_curve(text: str) -> list[tuple[float, float]]:
    """Read keyframes: ``0:1,0.5:0`` fades a LoRA out over the first half."""
    try:
        points = [(float(at), float(factor)) for at, _, factor in (part.partition(":") for part in text.split(","))]
    except ValueError:
        points = []
    if not points:
        raise OptionError(f"Can't read the curve {text!r}: wanted PROGRESS:FACTOR,…, such as 0:1,0.5:0.")
    return points


def _setting(text: str, loras: ExitStack, architecture: str | None) -> tuple[str, "Setting"]:
    name, equals, rest = text.partition("=")
    if not equals or is_there(text):
        name, rest = "", text
    if rest.endswith(".toml"):
        from ..diffusion import read_composed

        described = read_composed(rest, architecture=architecture)
        for use in described:
            loras.enter_context(use.lora)
        return name or Path(rest).stem, described
    uses = [_use(part, loras, architecture) for part in ([rest] if is_there(rest) else rest.split("+"))]
    stems = [Path(use.lora.name).stem + ("" if use.weight == 1 else f"@{use.weight:g}") for use in uses]
    return name or "+".join(stems), uses


def _use(text: str, loras: ExitStack, architecture: str | None) -> "Use":
    from ..diffusion.composing import Use
    from ..files.reading import open

    file, colon, weight = text.rpartition(":")
    try:
        number = float(weight) if colon else 1.0
    except ValueError:  # the colon of hf://
        file, colon, number = "", "", 1.0
    return Use(loras.enter_context(open(file if colon else text, architecture=architecture)), number)


def read_seeds(text: str) -> int | list[int]:
    """Read seeds: ``8`` is a number of them, ``3,5`` lists them, and so does ``3,``."""
    try:
        return [int(seed) for seed in text.split(",") if seed] if "," in text else int(text)
    except ValueError:
        raise OptionError(f"Can't read the seeds {text!r}: wanted a number of them, or 3,5,8.") from None


def read_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Read a width and a height."""
    if text is None:
        return None, None
    parts = text.lower().replace("×", "x").split("x")
    try:
        width, height = (int(parts[0]), int(parts[-1]))
    except ValueError:
        width = height = 0
    if len(parts) > 2 or width < 1 or height < 1:
        raise OptionError(f"Can't read the size {text!r}: wanted 512, or WIDTHxHEIGHT such as 768x1024.")
    return width, height


def _shown(drawn: list["Drawn"]) -> str:
    rows: dict[str, list[Any]] = {}
    for picture in drawn:
        row = rows.setdefault(picture.setting, [picture.setting, 0, 0])
        row[2 if picture.reused else 1] += 1
    return table(
        ["setting", "drawn", "there already"], [[name, str(new), str(old)] for name, new, old in rows.values()]
    )
