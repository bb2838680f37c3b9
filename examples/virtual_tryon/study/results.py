"""The results, read from the stages' files."""

from dataclasses import dataclass
from functools import cached_property

from loramerge.scoring import Interval, Scores, Shot

from . import drift, scores, truth
from .job import Job
from .protocol import STUDY, Concept, Setting
from .sets import TRUE
from .truth import Findings


@dataclass(frozen=True)
class Group:
    """The results of the settings that share prompts."""

    job: Job
    name: str

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        return tuple(setting for setting in self.job.settings if setting.prompts == self.name)

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return self.job.protocol.shown(self.name)

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.job.protocol.prompts[self.name]

    @cached_property
    def true(self) -> tuple[str, ...]:
        """List the kinds of true pictures, such as ``:true``."""
        kinds = scores.truth_kinds(self.job, self.name) if self.job.drawn else []
        return tuple(f":{kind}" for kind in kinds)

    @cached_property
    def views(self) -> dict[str, Scores]:
        """Read the scores of settings and true pictures, by view."""
        return scores.read(self.job, self.name, [*(setting.name for setting in self.settings), *self.true])

    @property
    def whole(self) -> Scores:
        return self.views[scores.WHOLE]

    @cached_property
    def findings(self) -> Findings | None:
        """Read the judge's findings; None without a judge."""
        if not (self.job.drawn and self.job.protocol.scorer.attributes):
            return None
        return truth.read(self.job, self.name, [*(setting.name for setting in self.settings), *self.true])

    @cached_property
    def drift(self) -> dict[str, Interval]:
        """Read how far each setting changes pictures that ask for no concept; empty if that wasn't measured."""
        return drift.read(self.job, self.name)

    def family(self, name: str) -> tuple[Setting, ...]:
        return tuple(setting for setting in self.settings if setting.family == name)

    def label(self, name: str) -> str:
        """Return the label of a setting, or of a kind of true pictures, in tables."""
        if not name.startswith(":"):
            return self.job.protocol.setting(name).label
        what = name[1:]
        if what == TRUE:
            return "True pictures: all concepts"
        return f"True pictures: {what} only" if what in self.references else "True pictures: none of the concepts"

    def first_shots(self, name: str) -> list[Shot]:
        """List each prompt's picture of the lowest seed."""
        found = scores.shots_of(self.job, (self.name, name))
        return [min((s for s in found if s.prompt == p), key=lambda s: s.seed or 0) for p in self.prompts]


def groups(job: Job) -> list[Group]:
    """List the groups of results, the study's first."""
    names = sorted(job.groups, key=lambda name: name != STUDY)
    return [Group(job, name) for name in names]
