"""The stages of a run, in order; each does only what isn't done yet."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import drawing, drift, loras, noise, report, scores, sets, truth
from .job import Job
from .pool import in_turn, one_thread, workers

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """A named list of pieces of work."""

    name: str
    work: Callable[[Job, Any], bool]
    pieces: Callable[[Job], Sequence[Any]]
    shared: bool = True
    """True if several processes may do it, because its pieces don't depend on each other."""


def _once(work: Callable[[Job], bool]) -> Callable[[Job, Any], bool]:
    return lambda job, _: work(job)


STAGES = (
    Stage("data", _once(sets.make), lambda job: ("sets and true pictures" if job.drawn else "folders",), shared=False),
    Stage("train", loras.train, loras.trainings),
    Stage("beside", loras.train, loras.later_trainings),
    Stage("merge", loras.merge, loras.merges),
    Stage("generate", drawing.draw, lambda job: job.settings),
    Stage("drift", drift.run, drift.pieces),
    Stage("score", scores.run, scores.subjects, shared=False),
    Stage(
        "truth",
        truth.run,
        lambda job: scores.subjects(job) if job.drawn and job.protocol.scorer.attributes else (),
        shared=False,
    ),
    Stage(
        "report", _once(report.make), lambda job: ("report.html, report.md, scores.csv, pictures.csv",), shared=False
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


NOISE = Stage("noise", noise.run, noise.pieces)
"""A stage of the leaderboard."""


def run(
    job: Job,
    *,
    only: Sequence[str] = (),
    processes: int = 1,
    say: Say = lambda _: None,
    stages: Sequence[Stage] = STAGES,
) -> None:
    """Run the stages, or only some of them."""
    for line in sets.left_out(job):
        say(line)
    with one_thread(), workers(processes) as shared:
        for stage in stages:
            if not only or stage.name in only:
                pieces = list(stage.pieces(job))
                log = _Log(stage.name, len(pieces), say)
                (shared if stage.shared else in_turn)(stage.work, job, pieces, log)


class _Log:
    """Prints a line per piece of work, and the number of pieces that were done already."""

    def __init__(self, stage: str, total: int, say: Say) -> None:
        self.stage, self.total, self.say = stage, total, say
        self.done = self.reused = 0
        self.begun = time.monotonic()
        if total > 1:
            say(f"{stage:9}   0/{total}")

    def __call__(self, piece: Any, worked: bool) -> None:
        self.done += 1
        self.reused += not worked
        if worked:
            seconds = time.monotonic() - self.begun
            self.say(f"{self.stage:9} {self.done:3}/{self.total}  {_called(piece)}  {seconds:.0f} s")
        if self.done == self.total and self.reused:
            self.say(f"{self.stage:9} {self.reused} of {self.total} there already")


def _called(piece: Any) -> str:
    if isinstance(piece, tuple):
        what, part = piece
        if isinstance(part, str):
            return f"{what} {part}"
        return f"{_called(what)}, training {part + 1}" if part else _called(what)
    return str(getattr(piece, "name", piece))
