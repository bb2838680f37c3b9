"""Scores of generated pictures: how similar each setting's pictures are to sets of references.

The study's score of a picture is the cosine of its embedding with the mean embedding of a
reference set; a second score is the mean of its cosines with every picture of the set.  A
setting's score is the mean over its pictures.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import FileError, OptionError, check_callable
from ..files.storage.paths import path_of
from ..files.storage.writer import Progress
from ..tensors import Array
from .bootstrap import Interval, interval
from .encoders import Embed, Encoder, embed, encoder_of
from .pictures import Box, images_in
from .png import recipe_in

Metric = Literal["cosine", "pairwise"]
Cluster = Literal["seed", "prompt", "image"]
Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A folder of pictures, or the pictures themselves."""

NAMED = re.compile(r"(?P<prompt>.+)-(?P<seed>\d+)")
"""The file name of a picture without a recipe inside: ``PROMPT-SEED.png``."""


@dataclass(frozen=True)
class Shot:
    """A generated picture: its setting, prompt and seed, and its file."""

    setting: str
    prompt: str
    seed: int | None
    path: Path

    @classmethod
    def of(cls, setting: str, path: Path, recipe: Mapping[str, Any] | None) -> "Shot":
        """Describe a picture by the recipe in it, or by its name."""
        if recipe:
            return cls(setting, str(recipe["prompt"]), int(recipe["seed"]), path)
        match = NAMED.fullmatch(path.stem)
        return cls(setting, match["prompt"], int(match["seed"]), path) if match else cls(setting, path.stem, None, path)


@dataclass(frozen=True)
class Reference:
    """A set of pictures of one concept."""

    name: str
    files: Files
    crop: Box | None = None
    """The part of generated pictures that shows the concept; the whole picture by default."""
    own_crop: Box | None = None
    """The part of the set's own pictures that shows it; as ``crop`` by default."""


@dataclass(frozen=True)
class Row:
    """The scores of one picture against one reference set, in [−1, 1]."""

    shot: Shot
    reference: str
    cosine: float
    """Cosine with the mean embedding of the set."""
    pairwise: float
    """Mean of the cosines with each embedding of the set."""


@dataclass(frozen=True)
class Scores:
    """Every picture's scores by one encoder, and the means and differences of settings."""

    encoder: str
    rows: tuple[Row, ...]
    cluster: Cluster
    """The unit that the bootstrap draws: all pictures of a seed, all of a prompt, or single ones."""

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """Every setting, in the order of the pictures."""
        return tuple(dict.fromkeys(row.shot.setting for row in self.rows))

    @cached_property
    def references(self) -> tuple[str, ...]:
        """Every reference set's name."""
        return tuple(dict.fromkeys(row.reference for row in self.rows))

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt, in the order of the pictures."""
        return tuple(dict.fromkeys(row.shot.prompt for row in self.rows))

    def mean(self, setting: str, reference: str, metric: Metric = "cosine", *, prompt: str | None = None) -> Interval:
        """Return a setting's score with its 95 % interval, over all prompts or for one."""
        rows = [row for row in self._of(setting, reference) if prompt in (None, row.shot.prompt)]
        return interval([_value(row, metric) for row in rows], [self._cluster(row.shot) for row in rows])

    def difference(self, setting: str, other: str, reference: str, metric: Metric = "cosine") -> Interval:
        """Return how much higher a setting scores than another, over the pictures of equal prompt and seed.

        Raises:
            OptionError: The two have no such pictures.
        """
        mine, theirs = ({key_of(r.shot): r for r in self._of(name, reference)} for name in (setting, other))
        both = [key for key in mine if key in theirs]
        if not both:
            raise OptionError(
                f"{setting} and {other} have no pictures of the same prompt and seed: they can't be paired."
            )
        values = [_value(mine[key], metric) - _value(theirs[key], metric) for key in both]
        return interval(values, [self._cluster(mine[key].shot) for key in both])

    def paired(self) -> list[tuple[str, str]]:
        """List the pairs of settings that have pictures of the same prompt and seed."""
        keys = {s: {key_of(row.shot) for row in self.rows if row.shot.setting == s} for s in self.settings}
        return [(a, b) for a, b in combinations(self.settings, 2) if keys[a] & keys[b]]

    @cached_property
    def _rows(self) -> Mapping[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.shot.setting, row.reference), []).append(row)
        return found

    def _of(self, setting: str, reference: str) -> list[Row]:
        if (setting, reference) not in self._rows:
            raise OptionError(
                f"No score of {setting!r} against {reference!r}. Settings: {', '.join(self.settings)}; "
                f"references: {', '.join(self.references)}."
            )
        return self._rows[setting, reference]

    def _cluster(self, shot: Shot) -> Any:
        return {"seed": shot.seed, "prompt": shot.prompt, "image": key_of(shot)}[self.cluster]


def score(
    settings: Mapping[str, Files] | Iterable[Shot],
    references: Mapping[str, Files] | Iterable[Reference],
    encoder: Encoder | Embed,
    *,
    cluster: Cluster | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score pictures against reference sets.

    Args:
        settings: Folders of pictures by setting, or shots.  A picture's prompt and seed come from its recipe
            (`loramerge.diffusion.generation`) or its name, ``PROMPT-SEED.png``.
        references: Folders of pictures by concept, or `Reference` with boxes.
        encoder: `loramerge.scoring.dino.dinov2`, or any function from pictures to an array ``(n, d)``.
        cluster: What the bootstrap draws; seeds if every picture has one, single pictures otherwise.
        cache: A directory for embeddings.
        progress: Called with the number of pictures done and of all.

    Raises:
        FileError: A folder is missing or empty, a picture can't be read, or two of a setting have the same
            prompt and seed.
        OptionError: There is nothing to score, or a picture has no seed and ``cluster`` is ``"seed"``.
    """
    check_callable(progress=progress)
    known = encoder_of(encoder)
    shots = list(shots_of(settings) if isinstance(settings, Mapping) else settings)
    sets = (
        [Reference(name, files) for name, files in references.items()]
        if isinstance(references, Mapping)
        else list(references)
    )
    if not shots or not sets:
        raise OptionError(f"Nothing to score: {len(shots)} pictures, {len(sets)} reference sets.")
    names = [reference.name for reference in sets]
    if len(set(names)) < len(names):
        raise OptionError(f"Two reference sets have the same name: {', '.join(names)}.")
    check_shots(shots)
    vectors = Vectors(known, None if cache is None else path_of(cache), progress)
    vectors.expect(shots, sets)
    rows = [row for reference in sets for row in _against(reference, shots, vectors)]
    return Scores(known.name, tuple(rows), clustering(cluster, shots))


def shots_of(settings: Mapping[str, Files]) -> list[Shot]:
    """List the pictures of every setting."""
    found = []
    for name, files in settings.items():
        recipes = {path: recipe_in(path) for path in _paths(files)}
        if isinstance(files, str | os.PathLike):
            _check_drawn_alike(recipes)
        found += [Shot.of(name, path, recipe) for path, recipe in recipes.items()]
    return found


def _check_drawn_alike(recipes: Mapping[Path, Mapping[str, Any] | None]) -> None:
    """Refuse pictures of several recipes in one folder, as stay there when fewer are drawn again by another one.

    Raises:
        FileError: Two recipes differ in more than prompt and seed.
    """
    known = [(path, recipe) for path, recipe in recipes.items() if recipe is not None]
    for path, recipe in known[1:]:
        first, other = known[0]
        names = [n for n in {**recipe, **other} if n not in ("prompt", "seed") and recipe.get(n) != other.get(n)]
        if names:
            raise FileError(
                f"{first} and {path} are in one folder and were drawn with other {' and '.join(names)}. Way out: remove "
                "the pictures that the last drawing left there, or give the folders one by one."
            )


def _paths(files: Files) -> list[Path]:
    if isinstance(files, str | os.PathLike):
        return images_in(path_of(files))
    return list(map(path_of, files))


def check_shots(shots: Sequence[Shot]) -> None:
    """Refuse two pictures of the same setting, prompt and seed."""
    seen: dict[Any, Path] = {}
    for shot in shots:
        other = seen.setdefault((shot.setting, key_of(shot)), shot.path)
        if other != shot.path:
            raise FileError(f"{other} and {shot.path} are of the same setting, prompt and seed. Remove one of them.")


def clustering(wanted: Cluster | None, shots: Sequence[Shot]) -> Cluster:
    """Return what the bootstrap draws: what is wanted, or seeds if every picture has one, or single pictures."""
    without = [shot for shot in shots if shot.seed is None]
    if wanted not in (None, *get_args(Cluster)):
        raise OptionError(f"Unknown cluster {wanted!r}. Available: {', '.join(get_args(Cluster))}.")
    if wanted == "seed" and without:
        raise OptionError(f"{without[0].path} has no seed, in its name or inside: wanted PROMPT-SEED.png.")
    return wanted or ("image" if without else "seed")


def _against(reference: Reference, shots: Sequence[Shot], vectors: "Vectors") -> list[Row]:
    """Score every picture against one set."""
    import numpy as np

    theirs = vectors(_paths(reference.files), reference.own_crop or reference.crop)
    ours = unit(vectors([shot.path for shot in shots], reference.crop))
    middle = theirs.mean(0)
    if not np.any(middle):
        raise FileError(f"The mean embedding of {reference.name} is zero: it has no direction.")
    cosine, pairwise = ours @ unit(middle), (ours @ unit(theirs).T).mean(1)
    return [Row(shot, reference.name, float(c), float(p)) for shot, c, p in zip(shots, cosine, pairwise, strict=True)]


def unit(vectors: Array) -> Array:
    """Return the vectors at length one."""
    import numpy as np

    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Vectors:
    """Embeddings by picture and box, each computed once, with one progress for all of them."""

    def __init__(self, encoder: Encoder, cache: Path | None, progress: Progress | None) -> None:
        self.encoder, self.cache, self.progress = encoder, cache, progress
        self.made: dict[tuple[Path, Box | None], Array] = {}
        self.total = 0

    def expect(self, shots: Sequence[Shot], sets: Sequence[Reference]) -> None:
        wanted = {(shot.path, reference.crop) for reference in sets for shot in shots}
        wanted |= {(path, r.own_crop or r.crop) for r in sets for path in _paths(r.files)}
        self.total = len(wanted)

    def __call__(self, files: Sequence[Path], box: Box | None) -> Array:
        import numpy as np

        missing = [file for file in dict.fromkeys(files) if (file, box) not in self.made]
        if missing:
            found = embed(self.encoder, missing, box=box, cache=self.cache, progress=self._report)
            self.made.update({(file, box): vector for file, vector in zip(missing, found, strict=True)})
        return np.stack([self.made[file, box] for file in files])

    def _report(self, done: int, total: int) -> None:
        if self.progress:
            self.progress(len(self.made) + done, self.total)


def _value(row: Row, metric: Metric) -> float:
    return row.cosine if metric == "cosine" else row.pairwise


def key_of(shot: Shot) -> tuple[str, int | None]:
    """Return a picture's prompt and seed, by which settings are paired."""
    return shot.prompt, shot.seed
