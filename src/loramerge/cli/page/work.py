"""The actions of the page's buttons: functions of a visitor's files and choices, which return what is shown."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...comparing import advice, compare
from ...errors import OptionError, size
from ...files.writing import check_growth
from ...merging import Plan, Recipe
from ...merging.running import Kept
from ..compare import as_text
from ..merge import kept_lines, plan_lines, planned_size
from ..options import opened
from ..output import joined, note_lines
from . import shown
from .choices import Choices
from .shelf import Shelf

if TYPE_CHECKING:
    from ...files.storage.writer import Progress

LATER = (
    "The ranks are chosen from what each module keeps, which takes about as long as the merge: press 'Show the plan'."
)


@dataclass(frozen=True)
class Shown:
    """The parts of the page that depend on its state."""

    plan: str = ""
    command: str = ""
    python: str = ""
    file: Path | None = None
    """The merged file, once it is there."""


@dataclass
class Choice:
    """A visitor's choices besides the LoRAs and their weights, by the names of `Choices`."""

    shelf: Shelf
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def choices(self) -> Choices:
        """The state of the page.

        Raises:
            OptionError: There is no LoRA, or the base model is elsewhere.
        """
        entries = self.shelf.entries
        if not entries:
            raise OptionError("There is no LoRA on the page yet. Drop a file above, or name one.")
        return Choices(
            names=tuple(entry.name for entry in entries),
            weights=tuple(entry.typed() for entry in entries),
            **self.given | {"base": self.shelf.base(self.given.get("base") or "")},
        )


def looked_at(choice: Choice) -> Shown:
    """Return the plan, the command and the Python of the state of the page; a plan that takes long is left for later."""
    if not choice.shelf.entries:
        return Shown()
    return _answered(choice, lambda choices: shown.note(LATER) if choices.budgeted else _plan(choice, choices))


def planned(choice: Choice, progress: "Progress") -> Shown:
    """Return the same, with the plan of whatever was chosen."""
    return _answered(choice, lambda choices: _plan(choice, choices, progress))


def merged(choice: Choice, progress: "Progress") -> Shown:
    """Merge, as the command does, and return the file with the rest."""
    files: list[Path] = []

    def made(choices: Choices) -> str:
        recipe, target = choices.recipe(choice.shelf.paths), choice.shelf.output(choices.output)
        with _planned(recipe, progress, target) as (plan, lines):
            kept = Kept(plan.steps)
            lost: list[str] = []
            noted: list[str] = []
            recipe.write(plan, target, progress=progress, kept=kept, lost=lost.append, noted=noted.append)
            told = [*lines, *kept_lines(kept, plan), *note_lines(noted, lost)]
        files.append(target)
        ready = f"{target.name} is ready: {size(target.stat().st_size)}, names of {plan.dialect}."
        return shown.note(ready) + shown.lines(joined(told))

    found = _answered(choice, made)
    return Shown(found.plan, found.command, found.python, files[0] if files else None)


def compared(shelf: Shelf, base: str, progress: "Progress") -> str:
    """Return what the LoRAs share: a sentence of advice, a heat map, a table."""
    with Reported(shelf) as problems, opened(shelf.paths, architecture=None) as loras:
        if len(loras) < 2:
            raise OptionError("A comparison needs two LoRAs or more.")
        found = compare(loras, base=shelf.base(base), progress=progress)
        return shown.comparison(found, advice(found), as_text(found, [], None))
    return shown.problem(*problems)


def added(shelf: Shelf, files: Sequence[tuple[str, str]]) -> str:
    """Take uploaded files, each a path and its own name; return what was wrong with those that were refused."""
    problems = []
    for path, name in files:
        with Reported(shelf) as found:
            shelf.take(path, name)
        last = name.replace("\\", "/").rpartition("/")[2]
        problems += [said if last in said else f"{last}: {said}" for said in found]
    return shown.problem(*problems)


def named(shelf: Shelf, text: str) -> str:
    """Add a LoRA by its name; return what was wrong."""
    with Reported(shelf) as found:
        shelf.find(text)
    return shown.problem(*found)


class Reported:
    """Collects the message of an error that is raised inside of a block; whatever it is, the page goes on."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.found: list[str] = []

    def __enter__(self) -> list[str]:
        """Return the list that a message is added to."""
        return self.found

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Add the message, unless the error ends the program."""
        if not isinstance(error, Exception):
            return False
        self.found.append(self.shelf.without_places(shown.message(error)))
        return True


def _answered(choice: Choice, plan: Callable[[Choices], str]) -> Shown:
    command = python = ""
    with Reported(choice.shelf) as problems:
        choices = choice.choices
        command, python = choices.command, choices.python
        return Shown(plan(choices), command, python)
    return Shown(shown.problem(*problems), command, python)


def _plan(choice: Choice, choices: Choices, progress: "Progress | None" = None) -> str:
    with _planned(choices.recipe(choice.shelf.paths), progress) as (_, lines):
        return shown.lines(joined(lines))


@contextmanager
def _planned(
    recipe: Recipe, progress: "Progress | None", target: Path | None = None
) -> Iterator[tuple[Plan, list[str]]]:
    """Open a recipe's LoRAs and yield its plan, and the lines that are printed of it; refuse what can't be written."""
    with ExitStack() as stack:
        loras = [stack.enter_context(lora) for lora in recipe.open()]
        if target is not None:
            recipe.check_target(target, loras)
        plan = recipe.plan(loras, progress=progress)
        if plan.dialect == "peft":
            raise OptionError(
                "The first LoRA is PEFT's, whose layout is a directory: a page can't hand that out. Ways out: another choice "
                "of 'For which tool', or the command below."
            )
        made = plan.lora()
        length = planned_size(plan, made)
        check_growth(made, length, made.dialect)
        yield plan, plan_lines(recipe, plan, made, length)
