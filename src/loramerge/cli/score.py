"""``loramerge score``: the similarity of each setting's pictures to each reference set."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FileError, OptionError, span
from ..files.storage.paths import path_of
from .options import Quiet
from .output import Block, note_left_out, progress, say, spaced, table
from .settings import command

if TYPE_CHECKING:
    from ..scoring.bootstrap import Interval
    from ..scoring.encoders import Encoder
    from ..scoring.scores import Reference, Scores


class PoolName(StrEnum):
    """The tokens that make the embedding."""

    cls = "cls"
    patches = "patches"


class ClusterName(StrEnum):
    """The units that the bootstrap draws."""

    seed = "seed"
    prompt = "prompt"
    image = "image"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge score``."""

    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of pictures, one per setting; or one folder with a folder per setting."),
    ]
    reference: Annotated[
        list[str] | None,
        typer.Option("--reference", "-r", help="NAME=FOLDER, or FOLDER: the pictures of a concept."),
    ] = None
    drift: Annotated[
        str | None,
        typer.Option("--drift", help="Measure how far each setting's pictures are from this one's; mostly 'none'."),
    ] = None
    crop: Annotated[
        list[str] | None,
        typer.Option("--crop", help="NAME=left,top,right,bottom, from 0 to 1: where pictures show the concept."),
    ] = None
    own_crop: Annotated[
        list[str] | None,
        typer.Option("--reference-crop", help="The same for the reference set's own pictures, where it differs."),
    ] = None
    model: Annotated[
        str, typer.Option("--model", "-m", help="A DINOv2: a name on the Hugging Face Hub, or a directory.")
    ] = "facebook/dinov2-base"
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="package.module:function, images → (n, d), in place of the model.")
    ] = None
    pool: Annotated[PoolName, typer.Option("--pool", help="cls, or the mean of the patches.")] = PoolName.cls
    pixels: Annotated[bool, typer.Option("--pixels/--no-pixels", help="Score by bare pixels too, as a baseline.")] = (
        True
    )
    cluster: Annotated[
        ClusterName | None, typer.Option("--cluster", help="What the bootstrap draws; seeds where all have one.")
    ] = None
    against: Annotated[
        str | None, typer.Option("--against", help="Print every setting's difference from this one, paired.")
    ] = None
    by_prompt: Annotated[bool, typer.Option("--by-prompt", help="Print a table by prompt too.")] = False
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A directory for scores.json and CSV tables.")
    ] = None
    cache: Annotated[Path, typer.Option("--cache", help="Where embeddings are kept.", show_default=True)] = Path(
        "~/.cache/loramerge/embeddings"
    )
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no embeddings.")] = False
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures embedded together.")] = 16
    device: Annotated[str | None, typer.Option("--device", help="CUDA where there is one, by default.")] = None
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Score pictures: the cosine of their DINOv2 embeddings with those of each reference set.

    Example: loramerge score out/ -r person=photos/person -r jersey=photos/jersey --crop jersey=0.2,0.4,0.8,1
    """
    from ..scoring import reports, scores
    from ..scoring.drifting import drift

    settings = settings_in(given.folders)
    sets = read_references(given.reference or [], given.crop or [], given.own_crop or [])
    if not sets and given.drift is None:
        raise OptionError("Nothing to score by: give --reference NAME=FOLDER, or --drift SETTING, or both.")
    if given.against is not None and given.against not in settings:
        raise OptionError(f"No setting {given.against!r}. There are: {', '.join(settings)}.")
    if not given.quiet:
        note_left_out(settings.values())
        note_left_out(path_of(folder.files) for folder in sets)  # type: ignore[arg-type]
    shots = scores.shots_of(settings)
    cluster: Any = given.cluster.value if given.cluster else None
    cache = None if given.no_cache else given.cache
    found = []
    for each in _encoders(given):
        with progress(f"Scoring by {each.name}", given.quiet) as report:
            if sets:
                found.append(scores.score(shots, sets, each, cluster=cluster, cache=cache, progress=report))
            if given.drift is not None:
                found.append(drift(shots, each, base=given.drift, cluster=cluster, cache=cache, progress=report))
    written = reports.save_scores(found, given.output) if given.output else []
    if not given.quiet:
        tables = [shown(scores, given.against, given.by_prompt) for scores in found]
        say(spaced(tables))
        for path in written:
            say(f"→ {path}")


def settings_in(folders: list[Path]) -> dict[str, Path]:
    """Return folders by name of the setting: a folder that has folders stands for them, as `generate` drew them.

    Raises:
        FileError: One is missing.
        OptionError: Two have the same name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileError(f"No such directory of images: {folder}.")
        inside = [] if _has_pictures(folder) else _as_drawn(_folders(folder), folder)
        for setting in inside or [folder.resolve()]:
            if setting.name in found:
                raise OptionError(f"Two settings are called {setting.name!r}: {found[setting.name]} and {setting}.")
            found[setting.name] = setting
    return found


def _has_pictures(folder: Path) -> bool:
    """Return whether a folder has pictures itself, besides the contact sheet."""
    from ..scoring.pictures import pictures_in

    return any(path.name != "sheet.png" for path in pictures_in(folder))


def _folders(folder: Path) -> list[Path]:
    return [inside for inside in folder.iterdir() if inside.is_dir() and inside.name[0] != "."]


def _as_drawn(inside: list[Path], folder: Path) -> list[Path]:
    """Sort folders as the contact sheet does, ``none`` first; those that it lacks come last, by name."""
    from ..scoring.png import order_in

    known = {name: i for i, name in enumerate(order_in(folder / "sheet.png"))}
    return sorted(inside, key=lambda f: (f.name != "none", known.get(f.name, len(known)), f.name))


def read_references(given: list[str], crops: list[str], own_crops: list[str]) -> list["Reference"]:
    """Read reference sets as they are typed.

    Raises:
        OptionError: A box belongs to no set, or can't be read.
    """
    from ..scoring.pictures import Box
    from ..scoring.scores import Reference

    folders = _each_once(given)
    boxes = [{name: Box.parse(box) for name, box in _each_once(texts).items()} for texts in (crops, own_crops)]
    for name in [*boxes[0], *boxes[1]]:
        if name not in folders:
            raise OptionError(f"The crop of {name!r}: there is no such reference. There are: {', '.join(folders)}.")
    return [Reference(name, folder, boxes[0].get(name), boxes[1].get(name)) for name, folder in folders.items()]


def _each_once(texts: list[str]) -> dict[str, str]:
    """Read NAME=VALUE; a name that is left out is the last part of the value."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name, value = (name, value) if equals else (Path(text).name, text)
        if name in found:
            raise OptionError(f"The reference {name!r} is given twice: {found[name]} and {value}.")
        found[name] = value
    return found


def _encoders(given: Options) -> list["Encoder"]:
    from ..scoring.dino import dinov2
    from ..scoring.encoders import Encoder, pixels

    if given.encoder:
        from .sweep import load_score

        embed: Any = load_score(given.encoder)
        chosen = Encoder(embed, given.encoder, batch=given.batch)
    else:
        pool: Any = given.pool.value
        chosen = dinov2(given.model, pool=pool, device=given.device, batch=given.batch, quiet=True)
    return [chosen, pixels()] if given.pixels else [chosen]


def shown(scores: "Scores", against: str | None, by_prompt: bool) -> Block:
    """Return the tables for people."""
    from ..scoring.drifting import DRIFT

    drifted = scores.references == (DRIFT,)
    what = "1 − cosine with the base's picture" if drifted else "cosine with the mean embedding"
    pairwise = "" if drifted else " (mean pairwise cosine)"
    parts = [f"{scores.encoder}: {what}{pairwise}, {_clusters(scores)}", _means(scores, pairwise=not drifted)]
    if by_prompt:
        parts += [f"by prompt: {what}", _prompts(scores)]
    if against is not None and against in scores.settings:
        parts += [f"difference from {against}, over pictures of the same prompt and seed", _against(scores, against)]
    return spaced(parts)


def _clusters(scores: "Scores") -> str:
    means = [scores.mean(setting, scores.references[0]) for setting in scores.settings]
    counts = [mean.clusters for mean in means]
    what = f"{span(min(counts), max(counts))} {scores.cluster}s"
    return f"no intervals: {what} are too few" if all(m.low is None for m in means) else f"95 % intervals over {what}"


def _means(scores: "Scores", *, pairwise: bool) -> str:
    def cell(setting: str, reference: str) -> str:
        second = f" ({scores.mean(setting, reference, 'pairwise').mean:.3f})" if pairwise else ""
        return f"{scores.mean(setting, reference):.3f}{second}"

    rows = [
        [
            setting,
            *(cell(setting, reference) for reference in scores.references),
            str(scores.mean(setting, scores.references[0]).values),
        ]
        for setting in scores.settings
    ]
    return table(["setting", *scores.references, "pictures"], rows)


def _prompts(scores: "Scores") -> str:
    asked = {(row.shot.setting, row.shot.prompt) for row in scores.rows}
    rows = [
        [prompt, setting, *(f"{scores.mean(setting, r, prompt=prompt):.3f}" for r in scores.references)]
        for prompt in scores.prompts
        for setting in scores.settings
        if (setting, prompt) in asked
    ]
    return table(["prompt", "setting", *scores.references], rows)


def _against(scores: "Scores", other: str) -> str:
    rows = [
        [setting, *(_signed(scores.difference(setting, other, reference)) for reference in scores.references)]
        for setting in scores.settings
        if setting != other
    ]
    return table(["setting", *scores.references], rows)


def _signed(found: "Interval") -> str:
    return f"{found:+.3f}{' *' if found.excludes_zero else ''}"
