"""One run of a protocol: its settings, and the paths of its results."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loramerge.diffusion import slug
from loramerge.errors import FileError
from loramerge.scoring import Shot

from .ledger import Ledger, model_digest
from .protocol import Beside, Protocol, Setting, is_source


@dataclass(frozen=True, kw_only=True)
class Job:
    """A protocol with a directory to work in; picklable, so that any process can do a part."""

    protocol: Protocol
    out: Path
    families: tuple[str, ...]
    device: str = "cpu"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.out / "ledger")

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return the settings of this run."""
        return self.protocol.of(self.families)

    @property
    def sets(self) -> tuple[str, ...]:
        """List the sets that this run's LoRAs are trained on, in the order of the settings."""
        return tuple(name for name in self.loras if not is_source(name))

    @property
    def loras(self) -> tuple[str, ...]:
        """List what the settings merge: names of sets, and existing LoRAs."""
        return tuple(dict.fromkeys(name for setting in self.settings for name in setting.loras))

    @property
    def groups(self) -> tuple[str, ...]:
        """List the names of this run's lists of prompts."""
        return tuple(dict.fromkeys(setting.prompts for setting in self.settings))

    @property
    def drawn(self) -> bool:
        """True if the world is drawn, so that the truth is known."""
        return self.protocol.data.source == "drawn"

    def seeds(self, setting: Setting) -> list[int]:
        most = self.protocol.drawing.seeds
        return list(range(most if setting.seeds is None else min(most, setting.seeds)))

    def turns(self, setting: Setting) -> list[tuple[int, list[int]]]:
        """Return the number of each training and the seeds of the pictures that are drawn with its LoRAs."""
        seeds = self.seeds(setting)
        used = self.repeats if setting.loras else range(1)
        return [(repeat, mine) for repeat in used if (mine := seeds[repeat :: len(used)])]

    def shots(self, setting: Setting) -> list[Shot]:
        """List the pictures of a setting, by prompt and seed."""
        return [
            Shot(setting.name, prompt, seed, self.pictures / setting.name / f"{slug(prompt)}-{seed}.png")
            for prompt in self.protocol.prompts[setting.prompts]
            for seed in self.seeds(setting)
        ]

    def set_folder(self, name: str) -> Path:
        """Return the folder of a set's captioned pictures."""
        name = one.own if (one := self.beside(name)) else name
        concepts = [concept.name for concept in self.protocol.concepts]
        own = not self.drawn and name in concepts
        return Path(self.protocol.data.folder).expanduser() / name if own else self.out / "sets" / name

    @property
    def untrained(self) -> tuple[str, ...]:
        """List the sets whose LoRA must be trained, those that others are trained beside among them."""
        found = [name for name in self.sets if not self.given(name)]
        firsts = [one.first for name in found if (one := self.beside(name)) and not self.given(one.first)]
        return tuple(dict.fromkeys([*firsts, *found]))

    def beside(self, name: str) -> Beside | None:
        """Return how a LoRA is trained beside another, or None for one that is trained alone."""
        return next((one for one in self.protocol.beside if one.name == name), None)

    def given(self, name: str) -> str | None:
        """Return the file or Hub name of a LoRA that the protocol names, or None for one that is trained."""
        if is_source(name):
            return name
        return next((concept.lora for concept in self.protocol.concepts if concept.name == name), None)

    @property
    def repeats(self) -> range:
        """Number the trainings of each set, from 0."""
        return range(self.protocol.training.repeats)

    def lora_file(self, name: str, repeat: int = 0) -> Path:
        """Return the path of the LoRA that is trained on a set."""
        return self.out / "loras" / f"{name}{_again(repeat)}.safetensors"

    def merge_file(self, setting: Setting, repeat: int = 0) -> Path:
        return self.out / "merges" / f"{setting.name}{_again(repeat)}.safetensors"

    @property
    def pictures(self) -> Path:
        return self.out / "pictures"

    def truth_folder(self, prompts: str, what: str) -> Path:
        return self.out / "truth" / prompts / what

    def drift_file(self, prompts: str, repeat: int) -> Path:
        return self.out / "drift" / f"{prompts}{_again(repeat)}.json"

    def score_file(self, prompts: str, setting: str) -> Path:
        return self.out / "scores" / prompts / f"{_plain(setting)}.json"

    def judged_file(self, prompts: str, setting: str) -> Path:
        return self.out / "judged" / prompts / f"{_plain(setting)}.json"

    @cached_property
    def base_digest(self) -> str:
        base = self.protocol.base
        return model_digest(base.model) + (f" {base.variant}" if base.variant else "")

    @cached_property
    def scorer_digest(self) -> str:
        return model_digest(self.protocol.scorer.model)

    @cached_property
    def second_digest(self) -> str:
        return model_digest(self.protocol.second.model) if self.protocol.second else ""


def _again(repeat: int) -> str:
    """Return what the names of a repeated training's files end with."""
    return f"@{repeat + 1}" if repeat else ""


def _plain(setting: str) -> str:
    """Turn the name of a setting, or of a kind of true pictures such as ``:true``, into a file's name."""
    return setting.replace(":", "true-")


def needed(path: Path, stage: str) -> Path:
    """Return the path of an earlier stage's result, if it exists.

    Raises:
        FileError: It is missing.
    """
    if not path.exists():
        raise FileError(f"{path} is missing. The stage {stage!r} makes it: run that first, or leave out --only.")
    return path


def cleared(folder: Path) -> None:
    """Remove a directory of ours, if it exists.

    Raises:
        OSError: It can't be removed.
    """
    if folder.exists():
        shutil.rmtree(folder)
