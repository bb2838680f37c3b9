"""A recipe: a merge described in a TOML file, so that it can be made again.

method = "ties"
rank = 16

[options]
density = 0.3

[[loras]]
path = "person.safetensors"
weight = 0.7

[[loras]]
hub = "someone/barca-lora-sdxl"
weight = { "*" = 0.5, text_encoder = 0 }

[output]
path = "both.safetensors"
to = "kohya"
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import FileError, LoRAMergeError, MergeError, OptionError
from ..files import hub
from ..files.architectures import ARCHITECTURES
from ..files.architectures.names import COMPONENTS
from ..files.dialects import DIALECTS, written_dialect
from ..files.dialects.write import check_writable
from ..files.lora import LoRA
from ..files.reading import open
from ..files.storage.paths import path_of
from ..files.storage.pickles import PICKLES
from ..files.storage.reader import SafetensorsFile
from ..files.storage.texts import read_text
from ..files.writing import check_apart, check_target, peft_folder, save
from ..tensors import written_dtype
from . import toml
from .coefficients import Coefficients
from .methods import METHODS, Method, check_name as check_method, check_options, find
from .methods.options import TAKEN
from .plans import Plan
from .provenance import from_metadata
from .ranks import BUDGETS, Rank, budget, rule
from .recipe_text import Input, Output, entries
from .rules import Scope
from .running import Kept
from .spending import spent
from .verbs import plan
from .weights import PlainWeights, Weight, check_scope, takes_scope

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..files.storage.writer import Progress

MAX_RECIPE = 1_000_000
"""Largest recipe file in bytes: several times what a rank per module of the largest model takes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A merge described in a file; the names are those of the arguments of `loramerge.merge`.

    `read` and `of` check the entries; the constructor doesn't.
    """

    loras: tuple[Input, ...]
    weights: PlainWeights = None
    """One per LoRA, the name of a rule, a file of learned coefficients, or None for the method's default."""
    weights_sha256: str | None = None
    """`Coefficients.sha256` of learned coefficients; others are refused, unless changes are allowed."""
    scope: Scope | None = None
    """The modules over which a rule on norms takes them; None for the rule's own choice."""
    method: Method | str = "linear"
    """A name, ``package.module:name``, or the method itself."""
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: Rank = "sum"
    max_error: float | str | None = None
    energy: float | str | None = None
    max_size: int | str | None = None
    exclude: tuple[str, ...] = ()
    architecture: str | None = None
    """The model family, if the files leave it open."""
    device: str | None = None
    base: str | None = None
    """Path of the base model, for DoRA layers."""
    base_sha256: str | None = None
    """`Checkpoint.sha256` of the base; a base with another hash is refused, unless changes are allowed."""
    ranks: Mapping[str, int] | None = None
    """The rank of every module, as chosen for the budget before; the ranks are then not chosen again."""
    output: Output = field(default_factory=Output)
    folder: str = field(default="", compare=False)
    """The directory that paths are relative to; ``""`` for paths that were typed, as on the command line."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read the recipe in a TOML file.

        Raises:
            FileError: The file can't be read, or is not TOML.
            OptionError: A key is unknown, or a value is wrong.
        """
        file = path_of(path)
        try:
            text = read_text(file, MAX_RECIPE)
        except FileError as error:
            if not _is_lora(file):
                raise
            raise FileError(
                f"{file} is a LoRA, not a recipe. Way out: a recipe.toml that names it; 'loramerge merge' takes it as it is."
            ) from error
        return _recipe(_data(text, str(file)), file.name, str(file.parent))

    @classmethod
    def parse(cls, text: str, name: str = "the recipe") -> "Recipe":
        """Read a recipe from TOML text; its paths are relative to the working directory.

        Args:
            text: The content of a recipe's file.
            name: The recipe's name in errors.

        Raises:
            FileError: The text is not TOML, or too long.
            OptionError: A key is unknown, or a value is wrong.
        """
        if len(text) > MAX_RECIPE:
            raise FileError(f"{name} is too long: got {len(text)} characters, wanted at most {MAX_RECIPE}.")
        return _recipe(_data(text, name), name, "")

    @classmethod
    def of(cls, lora: LoRA) -> "Recipe":
        """Read the recipe of a merged LoRA from its metadata.

        Raises:
            MergeError: It has none that can be run again.
        """
        from ..files.metadata import RECIPE

        data = from_metadata(lora.metadata.get(RECIPE), lora.name)
        return _recipe(data, f"the recipe of {lora.name}", "")

    def to_toml(self) -> str:
        """Write the recipe as TOML, which `read` reads as the same recipe."""
        own = ("method", "rank", *BUDGETS, "architecture", "device", "base", "base_sha256")
        head = {name: getattr(self, name) for name in own} | {"exclude": list(self.exclude) or None}
        head["method"] = self.method if isinstance(self.method, str) else _name(self.method)
        each: Sequence[Weight | None] = [None] * len(self.loras)
        if isinstance(self.weights, str):
            head |= {"weights": self.weights, "weights_sha256": self.weights_sha256, "scope": self.scope}
        elif isinstance(self.weights, Coefficients):
            raise OptionError("Learned coefficients in memory have no place in a recipe. Way out: save them first.")
        elif self.weights is not None:
            each = self.weights
        parts = [toml.lines(head)]
        parts += [["[options]", *toml.lines(self.options)]] if self.options else []
        for lora, weight in zip(self.loras, each, strict=True):
            entries = {f.name: getattr(lora, f.name) for f in fields(lora)}
            parts.append(["[[loras]]", *toml.lines({**entries, "weight": weight})])
        written = {f.name: getattr(self.output, f.name) or None for f in fields(self.output)}
        parts += [["[output]", *toml.lines(written)]] if any(written.values()) else []
        parts += [["[ranks]", *toml.lines(self.ranks)]] if self.ranks is not None else []
        return "\n\n".join("\n".join(part) for part in parts) + "\n"

    def override(self, **changes: Any) -> "Recipe":
        """Return a copy with some entries replaced.

        ``options`` are added to those of the recipe; ``to``, ``dtype``, ``allow_lossy`` and ``allow_growth`` go to
        `output`, and a new ``to`` cuts weights as it joins them.  A new budget replaces the old one, and weights that take no scope reset it.  A new
        method drops the options that it doesn't have.  Ranks chosen for a budget are dropped by any change.
        """
        named = ("to", "dtype", "allow_lossy", "allow_growth")
        output: dict[str, Any] = {name: changes.pop(name) for name in named if name in changes}
        output |= {"cut_as": None} if "to" in output else {}
        options = {**self.options, **changes.pop("options", {})}
        if any(name in changes for name in BUDGETS):
            changes = dict.fromkeys(BUDGETS) | changes
        if "weights" in changes:
            changes = {"weights_sha256": None} | changes
        if not takes_scope(changes.get("weights", self.weights)):
            changes = {"scope": None} | changes
        changed = replace(self, **changes, output=replace(self.output, **output))
        if changed.method != self.method:
            known = find(changed.method).options
            options = {name: value for name, value in options.items() if name in known or name not in self.options}
        changed = replace(changed, options=options)
        return changed if changed == self else replace(changed, ranks=changes.get("ranks"))

    def for_file(self, planned: Plan, folder: str | os.PathLike[str], target: Path | None = None) -> "Recipe":
        """Return the recipe as a file in a directory has it: with paths from there, commits on the Hub, and hashes.

        Args:
            planned: The plan that it gave, whose tensors are read for the hashes.
            folder: The directory of the file.
            target: The merged file; one outside of the directory has no place in a recipe, and is left out.
        """

        def from_there(path: Path) -> str:
            found = Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()
            return f"./{found}" if found.startswith("~") else found

        def entry(given: Input, lora: LoRA) -> Input:
            source = lora.origin.source if lora.origin else None
            there = hub.parse(source) if source and source.startswith("hf://") else None
            if there:
                place = {"hub": there.repo, "revision": there.revision, "filename": there.file}
            else:
                place = {"path": from_there(path_of(given.path or "", self.folder))}
            return replace(given, **{"path": None, **place}, sha256=lora.sha256)

        weights, output = self._weights(), None if target is None else from_there(target)
        if isinstance(weights, str) and weights.endswith(".safetensors"):
            weights = from_there(Path(weights))
        return replace(
            self,
            loras=tuple(entry(given, lora) for given, lora in zip(self.loras, planned.given, strict=True)),
            weights=weights,
            weights_sha256=planned.weights.sha256,
            base=None if self.base is None else from_there(self._base_path()),
            base_sha256=planned.base.sha256 if planned.base and planned.on_base else None,
            output=replace(self.output, path=None if output and output.startswith("..") else output),
            folder=os.fspath(folder),
        )

    def open(self, *, allow_pickle: bool = False) -> tuple[LoRA, ...]:
        """Open the LoRAs; tensors are read when they are asked for.

        Raises:
            FileError: One is missing or broken.
        """
        with ExitStack() as stack:
            loras = tuple(
                stack.enter_context(
                    open(
                        entry.source(self.folder),
                        architecture=entry.architecture or self.architecture,
                        dialect=entry.dialect,
                        adapter=entry.adapter,
                        allow_pickle=allow_pickle,
                    )
                )
                for entry in self.loras
            )
            stack.pop_all()  # all are open: closing them is the caller's
        return loras

    def plan(
        self,
        loras: Sequence[LoRA] | None = None,
        *,
        allow_changed: bool = False,
        allow_pickle: bool = False,
        progress: "Progress | None" = None,
    ) -> Plan:
        """Plan the merge, in the dialect and dtype in which it will be written.

        Args:
            loras: The LoRAs, if they are open already.
            allow_changed: Take LoRAs whose tensors have changed since the recipe was made.
            allow_pickle: Read pickles, tensors only.
            progress: Called with the number of modules done and of all, while ranks are chosen for a budget.

        Raises:
            FileError: A LoRA is missing or broken.
            MergeError: A LoRA has changed, or the LoRAs can't be merged.
            OptionError: An entry is wrong.
        """
        opened = self.open(allow_pickle=allow_pickle) if loras is None else tuple(loras)
        if not allow_changed:
            self._check_hashes(opened)
        planned = plan(
            opened,
            weights=self._weights(),
            method=self.method,
            rank=self.rank,
            scope=self.scope,
            exclude=self.exclude,
            device=self.device,
            base=None if self.base is None else self._base_path(),
            allow_growth=self.output.allow_growth,
            **self.options,
        )
        if not allow_changed:
            self._check_weights(planned)
            self._check_base(planned)
        dialect, dtype = self.output.to or planned.dialect, self.output.dtype
        check_writable(dialect, planned.dialect)
        planned = replace(
            planned,
            dialect=DIALECTS[dialect].name,
            cut_as=DIALECTS[self.output.cut_as or dialect].name,
            dtype=written_dtype(dtype) if dtype else planned.dtype,
            allow_lossy=self.output.allow_lossy,
        )
        limit = budget(self.max_error, self.energy, self.max_size)
        if self.ranks is not None:
            return planned.at(self._checked_ranks(planned), limit)
        # A budget is spent on what will be written: in that dialect and dtype.
        return spent(planned, limit, progress) if limit else planned

    def run(
        self,
        output: str | os.PathLike[str] | None = None,
        *,
        allow_changed: bool = False,
        allow_pickle: bool = False,
        workers: int = 1,
        progress: "Progress | None" = None,
    ) -> Path:
        """Merge and write.

        Args:
            output: The file or directory to write, anywhere; by default the path in the recipe.
            allow_changed: Take LoRAs whose tensors have changed since the recipe was made.
            allow_pickle: Read pickles, tensors only.
            workers: Processes or threads, as in `loramerge.save`; the bytes are the same for any number.
            progress: Called with the number of modules done and of all.

        Returns:
            The path that was written.

        Raises:
            LoRAMergeError: As `plan`, and as `loramerge.save`.
        """
        target = self.target(output)
        with ExitStack() as stack:
            loras = [stack.enter_context(lora) for lora in self.open(allow_pickle=allow_pickle)]
            self.check_target(target, loras)
            planned = self.plan(loras, allow_changed=allow_changed, progress=progress)
            return self.write(planned, target, workers=workers, progress=progress)

    def target(self, output: str | os.PathLike[str] | None = None) -> Path:
        """Return the path of the result.  A recipe writes below its own directory only; ``output`` may be anywhere.

        Raises:
            OptionError: Neither gives a path, the recipe's path leads out of its directory, or it is an input.
        """
        target = path_of(output) if output is not None else self._own_target()
        weights = self._weights()
        read: dict[Any, str] = {
            path_of(entry.path, self.folder): "one of the LoRAs that are merged" for entry in self.loras if entry.path
        }
        read |= {self._base_path(): "the base model"} if self.base is not None else {}
        read |= {weights: "the file of the weights"} if str(weights).endswith(".safetensors") else {}
        for source, what in read.items():
            if os.path.realpath(source) == os.path.realpath(target):
                raise OptionError(f"{target} is {what}. Way out: another output.")
        return target

    def check_target(self, target: str | os.PathLike[str], loras: Sequence[LoRA], dialect: str | None = None) -> Path:
        """Return the path that will be written, once it is sure that it can be and that no LoRA is read from there.

        Args:
            target: The path of the result, see `target`.
            loras: The recipe's LoRAs, opened.
            dialect: The dialect of the result, if it is known; by default that of the recipe, or of the first LoRA.

        Raises:
            OptionError: The path isn't of the dialect's kind, or a LoRA is read from there.
            FileError: The directory is missing, or a file that would be replaced is read-only.
        """
        place = check_target(target, dialect or self.output.to or loras[0].dialect)
        for entry, lora in zip(self.loras, loras, strict=True):
            given = [path_of(entry.path, self.folder)] if entry.path else []
            check_apart([*given, *lora.paths], place, "one of the LoRAs that are merged")
        return place

    def _base_path(self) -> Path:
        return path_of(self.base or "", self.folder)

    def _own_target(self) -> Path:
        if self.output.path is None:
            raise OptionError("Where should the merged LoRA go? The recipe's output has no path; give an output.")
        return _inside(self.output.path, self.folder)

    def write(
        self,
        planned: Plan,
        target: str | os.PathLike[str],
        *,
        workers: int = 1,
        progress: "Progress | None" = None,
        kept: Kept | None = None,
        lost: "Callable[[str], object] | None" = None,
        noted: "Callable[[str], object] | None" = None,
    ) -> Path:
        """Write a plan of this recipe; the arguments are those of `loramerge.save` and `Plan.lora`."""
        return save(
            planned.lora(kept),
            target,
            dialect=self.output.to,
            dtype=self.output.dtype,
            allow_lossy=self.output.allow_lossy,
            workers=workers,
            progress=progress,
            lost=lost,
            noted=noted,
        )

    def _weights(self) -> PlainWeights:
        if isinstance(self.weights, str) and self.weights.endswith(".safetensors"):
            return str(path_of(self.weights, self.folder))
        return self.weights

    def _check_hashes(self, loras: Sequence[LoRA]) -> None:
        for entry, lora in zip(self.loras, loras, strict=True):
            if entry.sha256 is not None and entry.sha256.lower() != lora.sha256:
                raise MergeError(
                    f"{lora.name} has changed: the sha256 of its tensors is {lora.sha256}, the recipe was made with "
                    f"{entry.sha256}. Way out: use the original file, or merge what is there now (--allow-changed, or "
                    "allow_changed=True)."
                )

    def _check_weights(self, planned: Plan) -> None:
        found = planned.weights.sha256
        if self.weights_sha256 is not None and found and self.weights_sha256.lower() != found:
            raise MergeError(
                f"The coefficients in {self.weights} have changed: their sha256 is {found}, the recipe was made with "
                f"{self.weights_sha256}. Way out: use the original file, or merge with what is there now (--allow-changed, "
                "or allow_changed=True)."
            )

    def _check_base(self, planned: Plan) -> None:
        if self.base_sha256 is not None and planned.base and self.base_sha256.lower() != planned.base.sha256:
            raise MergeError(
                f"The base {planned.base.name} has changed: its sha256 is {planned.base.sha256}, the recipe was made with "
                f"{self.base_sha256}. Way out: use the original model, or merge on what is there now (--allow-changed, or "
                "allow_changed=True)."
            )

    def _checked_ranks(self, planned: Plan) -> Mapping[str, int]:
        ranks = cast(Mapping[str, int], self.ranks)
        ranked = [module for module, step in planned.steps.items() if not step.rankless]
        for module in dict.fromkeys((*ranked, *ranks)):
            if module not in ranked or module not in ranks:
                what = "has a rank but is not merged" if module in ranks else "has no rank"
                raise OptionError(f"ranks: {module} {what}. Way out: remove the table, and the budget is spent anew.")
            most = planned.rank_of(module)
            if not 1 <= ranks[module] <= most:
                raise OptionError(f"ranks: {module}: got {ranks[module]}, wanted a number from 1 to {most}.")
        for join in planned.joins.values():
            if len({ranks[module] for module in join.modules}) > 1:
                raise OptionError(
                    f"ranks: {' and '.join(join.modules)} are one weight in the dialect {planned.dialect}, and have "
                    "different ranks. Way out: one rank for all of them."
                )
        return ranks


def _data(text: str, where: str) -> Mapping[str, Any]:
    """Parse a recipe's TOML.

    Raises:
        FileError: It isn't TOML.
    """
    try:
        return toml.parse_toml(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is not TOML: {error}.") from None


def _is_lora(path: Path) -> bool:
    """Return whether a path that holds no recipe is a directory, a pickle or a safetensors file."""
    with suppress(FileError):
        SafetensorsFile(path).close()
        return True
    return os.path.isdir(path) or (os.path.isfile(path) and path.suffix in PICKLES)


def _recipe(data: Mapping[str, Any], where: str, folder: str) -> Recipe:
    recipe = Recipe(**entries(data, where), folder=folder)
    try:
        check(recipe)
    except LoRAMergeError as error:
        raise type(error)(f"{where}: {error}") from None
    return recipe


def check(recipe: Recipe) -> None:
    """Check what can be checked without opening a LoRA.

    Raises:
        OptionError: A name or a value is wrong.
    """
    _check_method(recipe.method, recipe.options)
    rule(recipe.rank)
    budget(recipe.max_error, recipe.energy, recipe.max_size)
    check_scope(recipe.weights, recipe.scope)
    if recipe.architecture is not None:
        ARCHITECTURES[recipe.architecture]
    if recipe.output.to is not None:
        written_dialect(recipe.output.to)
    if recipe.output.cut_as is not None:
        DIALECTS[recipe.output.cut_as]
    if recipe.output.dtype is not None:
        written_dtype(recipe.output.dtype)
    if recipe.output.path is not None:
        _inside(recipe.output.path, recipe.folder)


def _check_method(method: Method | str, options: Mapping[str, Any]) -> None:
    """Check a method's name, and the options if it is loramerge's own.

    A recipe may come from anyone, so reading it imports nothing: the options of other methods are checked by `plan`.
    """
    for name in options:
        if name in TAKEN:
            raise OptionError(f"options: {name!r} is not an option of a method. Way out: leave it out of [options].")
    if isinstance(method, Method) or method in METHODS:
        check_options(find(method), options)
    else:
        check_method(method)


def _name(method: Method) -> str:
    """Return the name of a method in a recipe.

    Raises:
        OptionError: The method can't be imported by a name.
    """
    found = find(method)
    if found.name in METHODS:
        return found.name
    if found.reference is None:
        raise OptionError(
            f"The method {found.name!r} has no place in a recipe: no module that can be imported holds it under a name. "
            "Way out: put it into a file of its own, and import it from there."
        )
    return found.reference


def _inside(path: str, folder: str) -> Path:
    """Return the path of an output if all that is written there is below the recipe's directory: it may come from anyone."""
    base, given, target = Path(folder).resolve(), Path(path), path_of(path, folder)
    places = [target, *(peft_folder(target) / component for component in ("", *COMPONENTS))]
    apart = any(base not in place.resolve().parents for place in places)
    if apart or given.is_absolute() or str(given).startswith("~") or ".." in given.parts:
        raise OptionError(
            f"output: path: {path!r} is not below the recipe's directory. Way out: say where on the command line "
            "(--output, or run(output=…)), which may be anywhere."
        )
    return target
