"""A study's protocol as plain data: base, concepts, training, settings, prompts and scorer."""

import os
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
FAMILIES = (STUDY, "methods", "many", "composed", "weights")
"""Groups of settings: the study's seven; other methods; more than two LoRAs; other weights."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that LoRAs change."""

    model: str
    """A directory, or a name on the Hugging Face Hub."""
    miniature: bool = False
    """True if `examples.virtual_tryon.model` loads it."""
    architecture: str = "sdxl"
    """The LoRAs' family: tiny models can't be recognised by their shapes."""
    variant: str | None = None
    """Variant of the model's files, such as ``fp16``, which are half as large."""
    dtype: str | None = None
    """For drawing: float16 on CUDA and float32 elsewhere by default.  Training is in bfloat16 on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """The encoder of the scores."""

    model: str
    attributes: bool = False
    """True for the miniature's judge, which also classifies attributes."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The source of the concepts' pictures."""

    source: Literal["drawn", "folders"]
    folder: str = ""
    """For ``folders``: a directory that holds a folder of captioned pictures per concept."""
    count: int = 12
    """For ``drawn``: pictures per concept."""
    truths: int = 8
    """For ``drawn``: true pictures per prompt."""
    seed: int = 42

    def __post_init__(self) -> None:
        _at_least_one("data", count=self.count, truths=self.truths)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training options; most names are those of ``TrainSettings`` of `loramerge.diffusion`."""

    rank: int = 8
    alpha: float | None = None
    steps: int = 400
    batch_size: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    """The learning rate over the steps: ``constant``, ``linear`` or ``cosine``, down to 0."""
    seed: int = 42
    repeats: int = 1
    """LoRAs of each set, of consecutive seeds; pictures take them in turn, so that intervals cover training too."""
    targets: str = "attention"
    """The layers that LoRAs change: ``attention``, or ``all``, which adds the convolutions."""
    resolution: int | None = None
    flip: bool = True
    checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        _at_least_one("training", repeats=self.repeats)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Sampling options of the pictures."""

    steps: int = 30
    guidance: float | None = None
    scheduler: str | None = None
    seeds: int = 8
    batch: int = 4

    def __post_init__(self) -> None:
        _at_least_one("drawing", steps=self.steps, seeds=self.seeds, batch=self.batch)


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Prompts without identifiers, by which the stage ``drift`` measures what a merge changes elsewhere."""

    prompts: tuple[str, ...] = ()
    seeds: int = 2
    """Pictures of each prompt."""

    def __post_init__(self) -> None:
        _at_least_one("drift", seeds=self.seeds, prompts=len(self.prompts))


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A concept that a LoRA teaches, and a reference set of the scores."""

    name: str
    identifier: str
    """Its trigger words in prompts."""
    noun: str | None = None
    """A common noun for it, such as ``person``, for compositions that draw with prompts without its identifier."""
    crop: Box | None = None
    """The box in which generated pictures show it."""
    own_crop: Box | None = None
    """The box in which the set's own pictures show it; ``crop`` by default."""
    lora: str | None = None
    """An existing LoRA of it, in any dialect, a file or on the Hub, to use instead of training one."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A set of one concept's pictures and some of another's."""

    name: str
    own: str
    other: str
    borrowed: int = 3


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A LoRA that is trained on a concept's set after another one, so that their plain sum is the merge."""

    name: str
    own: str
    """The concept whose set it is trained on."""
    first: str
    """The concept whose LoRA is there already."""
    off_rows: bool = False
    """True to keep it off the inputs that the first acts on, instead of training it with the first active."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the comparison: the base with LoRAs merged in one way."""

    name: str
    label: str
    loras: tuple[str, ...] = ()
    """Names of the sets that they are trained on, or existing LoRAs: see `is_source`."""
    family: str = STUDY
    method: str = "linear"
    """The ``method`` of `loramerge.merge`: a name, or ``package.module:name``."""
    weights: tuple[float, ...] | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learn: Learned | None = None
    """A merge that is learned on the base, instead of a method; beside ``compose``, the gates of that composition."""
    compose: str | None = None
    """A composition of the LoRAs while pictures are drawn, instead of a merge; ``options`` are its options."""
    prompts: str = STUDY
    """Name of a list of prompts."""
    seeds: int | None = None
    """Number of seeds, if it is fewer than the protocol's."""

    @property
    def merges(self) -> bool:
        """True if a LoRA or gates are made: it is neither the base alone, nor unchanged LoRAs."""
        if self.compose:
            return self.learn is not None
        return len(self.loras) > 1 or (bool(self.loras) and (self.weights, self.learn) != (None, None))

    @property
    def passes(self) -> int:
        """Passes of the denoiser per step, which is nearly all that a picture costs."""
        if not self.compose:
            return 1
        from loramerge.diffusion import COMPOSITIONS

        terms = COMPOSITIONS[self.compose].passes.replace("N", str(len(self.loras))).split("+")
        return sum(map(int, terms))


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
    beside: tuple[Beside, ...] = ()
    prompts: Mapping[str, tuple[str, ...]]
    settings: tuple[Setting, ...]
    drift: Drift | None = None
    """The prompts that drift is measured on; None measures none."""
    second: Scorer | None = None
    """Another encoder, whose scores stand beside those of the first."""
    notes: tuple[str, ...] = ()
    """Lines for the report, such as differences from the study and their reasons."""

    def __post_init__(self) -> None:
        _no_doubles("setting", (setting.name.lower() for setting in self.settings))
        sets = [*(concept.name for concept in self.concepts), *(mixed.name for mixed in self.mixed)]
        sets += [beside.name for beside in self.beside]
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
        for beside in self.beside:
            for name in (beside.own, beside.first):
                self.concept(name)
        for setting in self.settings:
            self._check(setting, known)
        for prompt in self.drift.prompts if self.drift else ():
            called = [concept.identifier for concept in self.concepts if concept.identifier in prompt]
            if called:
                raise OptionError(
                    f"drift: the prompt {prompt!r} asks for {called[0]}; drift is measured where none is."
                )
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
        elif setting.compose and not {concept.name for concept in self.concepts} >= set(setting.loras):
            wrong = f"a composition needs what prompts call each LoRA, so wanted concepts: {', '.join(c.name for c in self.concepts)}"
        elif setting.prompts not in self.prompts:
            wrong = f"no prompts are called {setting.prompts!r}. There are: {', '.join(self.prompts)}"
        elif count != len(setting.loras):
            wrong = f"{count} weights for {len(setting.loras)} LoRAs"
        elif setting.family not in FAMILIES:
            wrong = f"unknown family {setting.family!r}. Known: {', '.join(FAMILIES)}"
        if wrong:
            raise OptionError(f"The setting {setting.name}: {wrong}.")

    def concept(self, name: str) -> Concept:
        """Find a concept by its name."""
        for concept in self.concepts:
            if concept.name == name:
                return concept
        raise OptionError(f"No concept is called {name!r}. Concepts: {', '.join(c.name for c in self.concepts)}.")

    def setting(self, name: str) -> Setting:
        """Find a setting by its name."""
        return next(setting for setting in self.settings if setting.name == name)

    def shown(self, prompts: str) -> tuple[Concept, ...]:
        """List the concepts whose identifiers are in the prompts; their pictures are scored against these."""
        said = " ".join(self.prompts[prompts])
        return tuple(concept for concept in self.concepts if concept.identifier in said)

    def of(self, families: Iterable[str]) -> tuple[Setting, ...]:
        """List the settings of some families, in order."""
        wanted = set(families)
        return tuple(setting for setting in self.settings if setting.family in wanted)


def grid(loras: tuple[str, ...], values: Iterable[float], *, prompts: str, seeds: int | None) -> list[Setting]:
    """Make a setting for every combination of weights of some LoRAs."""
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
    """Return whether a setting's LoRA is a file or a name on the Hub, not the name of a set."""
    return "/" in name or "\\" in name or name.endswith((".safetensors", *PICKLES))


PLAIN = r"\w[\w.+-]*"
"""Pattern of the names of sets and settings."""


def located(model: str, folder: Path) -> str:
    """Resolve a model's relative directory against the protocol's; leave a name on the Hub unchanged."""
    return str((folder / model).resolve()) if model.startswith(".") else model


def located_lora(source: str, folder: Path) -> str:
    """Resolve a LoRA's file against the protocol's folder; leave a name on the Hub unchanged."""
    path = folder / os.path.expanduser(source)
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
