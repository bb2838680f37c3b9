"""A study's protocol: what is trained, merged, drawn and scored, as plain data."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from loramerge.errors import OptionError
from loramerge.files import PICKLES
from loramerge.scoring import Box

Learned = Literal["ziplora", "lsq"]
STUDY = "study"
"""The family of the settings that the study compared, and the name of its prompts."""
FAMILIES = (STUDY, "methods", "many", "weights")
"""What settings are for: the study's seven; other methods; more LoRAs than two; other weights."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that LoRAs change."""

    model: str
    """A directory, or a name on the Hugging Face Hub."""
    miniature: bool = False
    """Whether `examples.virtual_tryon.model` loads it."""
    architecture: str = "sdxl"
    """The LoRAs' family: tiny models can't be told by their shapes."""
    variant: str | None = None
    """Which of the model's files, such as ``fp16``, which are half as large."""
    dtype: str | None = None
    """For drawing: float16 on CUDA and float32 elsewhere by default.  Training is in bfloat16 on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """The encoder of the scores."""

    model: str
    attributes: bool = False
    """Whether it is the miniature's judge, which also tells attributes."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the pictures of the concepts come from."""

    source: Literal["drawn", "folders"]
    folder: str = ""
    """Of ``folders``: it holds a directory of captioned pictures for each concept."""
    count: int = 12
    """Of ``drawn``: pictures of a concept."""
    truths: int = 8
    """Of ``drawn``: true pictures of a prompt."""
    seed: int = 42

    def __post_init__(self) -> None:
        _at_least_one("data", count=self.count, truths=self.truths)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a LoRA is trained; most names are those of ``TrainSettings`` of `loramerge.diffusion`."""

    rank: int = 8
    alpha: float | None = None
    steps: int = 400
    batch_size: int = 1
    learning_rate: float = 1e-4
    seed: int = 42
    resolution: int | None = None
    flip: bool = True
    checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn."""

    steps: int = 30
    guidance: float | None = None
    scheduler: str | None = None
    seeds: int = 8
    batch: int = 4

    def __post_init__(self) -> None:
        _at_least_one("drawing", steps=self.steps, seeds=self.seeds, batch=self.batch)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What a LoRA teaches, and a reference set of the scores."""

    name: str
    identifier: str
    """The rare words that prompts call it."""
    crop: Box | None = None
    """Where generated pictures show it."""
    own_crop: Box | None = None
    """Where the set's own pictures show it; as ``crop`` by default."""
    lora: str | None = None
    """A LoRA of it that is there already, in any dialect, a file or on the Hub: none is trained."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A set of one concept's pictures and some of another's."""

    name: str
    own: str
    other: str
    borrowed: int = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is compared: the base with LoRAs merged in one way."""

    name: str
    label: str
    loras: tuple[str, ...] = ()
    """Names of the sets that they are trained on, or LoRAs that are there already: see `is_source`."""
    family: str = STUDY
    method: str = "linear"
    """As `loramerge.merge` takes it: a name, or ``package.module:name``."""
    weights: tuple[float, ...] | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learn: Learned | None = None
    """A merge that is learned on the base, in place of a method."""
    prompts: str = STUDY
    """Name of a list of prompts."""
    seeds: int | None = None
    """Fewer than the protocol's."""

    @property
    def merges(self) -> bool:
        """Whether a LoRA is made: neither the base alone nor one LoRA as it is."""
        return len(self.loras) > 1 or (bool(self.loras) and (self.weights, self.learn) != (None, None))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A whole study."""

    name: str
    title: str
    base: Base
    scorer: Scorer
    data: Data
    training: Training
    drawing: Drawing
    concepts: tuple[Concept, ...]
    mixed: tuple[Mixed, ...]
    prompts: Mapping[str, tuple[str, ...]]
    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()
    """Lines of the report, such as where it departs from the study, and why."""

    def __post_init__(self) -> None:
        _no_doubles("setting", (setting.name.lower() for setting in self.settings))
        sets = [*(concept.name for concept in self.concepts), *(mixed.name for mixed in self.mixed)]
        _no_doubles("set", sets)
        for name in (*sets, *(setting.name for setting in self.settings)):
            if not re.fullmatch(PLAIN, name):
                raise OptionError(
                    f"The name {name!r}: files and folders are called by it. Wanted letters, digits and - _ . + alone, "
                    "with a letter or digit in front."
                )
        known = set(sets)
        for mixed in self.mixed:
            for name in (mixed.own, mixed.other):
                self.concept(name)
        for setting in self.settings:
            self._check(setting, known)
        for name in self.prompts:
            if not self.shown(name):
                raise OptionError(
                    f"The prompts {name} call no concept by its identifier. Identifiers: "
                    f"{', '.join(concept.identifier for concept in self.concepts)}."
                )

    def _check(self, setting: Setting, sets: set[str]) -> None:
        own = [name for name in setting.loras if is_source(name)]
        unknown = [name for name in setting.loras if name not in sets and name not in own]
        count = len(setting.weights) if isinstance(setting.weights, tuple) else len(setting.loras)
        wrong = ""
        if unknown:
            wrong = (
                f"no set is called {unknown[0]!r}. Sets: {', '.join(sorted(sets))}. A LoRA of your own is named by its file, "
                "such as './mine.safetensors', or by its repository on the Hub, org/repo"
            )
        elif own and setting.learn:
            wrong = (
                f"a learned merge needs the pictures that each LoRA is for, and {own[0]} comes without. "
                "Way out: lora = … in [[concepts]], and the concept's name here"
            )
        elif setting.prompts not in self.prompts:
            wrong = f"no prompts are called {setting.prompts!r}. There are: {', '.join(self.prompts)}"
        elif count != len(setting.loras):
            wrong = f"{count} weights for {len(setting.loras)} LoRAs"
        elif setting.family not in FAMILIES:
            wrong = f"unknown family {setting.family!r}. Known: {', '.join(FAMILIES)}"
        if wrong:
            raise OptionError(f"The setting {setting.name}: {wrong}.")

    def concept(self, name: str) -> Concept:
        """A concept by its name."""
        for concept in self.concepts:
            if concept.name == name:
                return concept
        raise OptionError(f"No concept is called {name!r}. Concepts: {', '.join(c.name for c in self.concepts)}.")

    def setting(self, name: str) -> Setting:
        """A setting by its name."""
        return next(setting for setting in self.settings if setting.name == name)

    def shown(self, prompts: str) -> tuple[Concept, ...]:
        """The concepts that prompts ask for: what their pictures are scored against."""
        said = " ".join(self.prompts[prompts])
        return tuple(concept for concept in self.concepts if concept.identifier in said)

    def of(self, families: Iterable[str]) -> tuple[Setting, ...]:
        """The settings of some families, in order."""
        wanted = set(families)
        return tuple(setting for setting in self.settings if setting.family in wanted)


def grid(loras: tuple[str, ...], values: Iterable[float], *, prompts: str, seeds: int | None) -> list[Setting]:
    """A setting for every combination of weights of some LoRAs."""
    return [
        Setting(
            name="weights-" + "-".join(f"{weight:g}" for weight in weights),
            label=" / ".join(f"{weight:g}" for weight in weights),
            loras=loras,
            family="weights",
            weights=weights,
            prompts=prompts,
            seeds=seeds,
        )
        for weights in product(values, repeat=len(loras))
    ]


def is_source(name: str) -> bool:
    """Whether a setting's LoRA is one that is there already, by its file or its name on the Hub, and no set's."""
    return "/" in name or "\\" in name or name.endswith((".safetensors", *PICKLES))


PLAIN = r"\w[\w.+-]*"
"""Names of sets and settings."""


def located(model: str, folder: Path) -> str:
    """A model's directory from the protocol's own on, where it is one; a Hub's name stays what it is."""
    return str((folder / model).resolve()) if model.startswith(".") else model


def located_lora(source: str, folder: Path) -> str:
    """A LoRA's file from the protocol's folder on, where it is one; a name on the Hub stays what it is."""
    path = folder / Path(source).expanduser()
    return str(path.resolve()) if source[:1] in ("", ".", "~") or path.exists() else source


def _at_least_one(what: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{what}: {name}: got {number}, wanted a number from 1.")


def _no_doubles(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise OptionError(f"Two {what}s are called {name!r}.")
        seen.add(name)
