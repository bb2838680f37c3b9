"""A recipe: a merge in a TOML file, that can be made again.

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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from . import hub, toml
from .architectures import ARCHITECTURES
from .coefficients import Coefficients
from .dialects import DIALECTS
from .dialects.write import check_writable
from .errors import FileError, LoRAMergeError, MergeError, OptionError
from .files import check_target, open, save
from .lora import LoRA
from .merging import Plan, plan
from .methods import METHODS
from .provenance import LEARNED
from .ranks import Rank, budget, rule
from .tensors import parse_dtype
from .toml import Table
from .weights import SCOPES, Scope, Weight, Weights, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from .merging import Outcome
    from .storage.writer import Progress

BUDGETS = ("max_error", "energy", "max_size")


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where a LoRA of a recipe is: a path, or a repository on the Hugging Face Hub."""

    path: str | None = None
    """Of a file or a directory with an adapter; from the recipe's own directory on."""
    hub: str | None = None
    """``org/repo``."""
    revision: str | None = None
    filename: str | None = None
    sha256: str | None = None
    """Of the tensors, see `LoRA.sha256`: with another, the recipe isn't run unless told to."""
    architecture: str | None = None
    """The model family, where this file leaves it open."""
    dialect: str | None = None
    """The dialect, where this file leaves it open."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub is None):
            raise OptionError("A LoRA of a recipe has either a path or a name on the Hub.")
        if self.path is not None and (self.revision or self.filename):
            raise OptionError("A revision and a filename go with a name on the Hub, not with a path.")

    def source(self, folder: str) -> str:
        """What `open` takes."""
        if self.path is not None:
            return os.path.join(folder, os.path.expanduser(self.path)) if folder else self.path
        return str(hub.Reference(cast(str, self.hub), self.filename, self.revision))


@dataclass(frozen=True, kw_only=True)
class Output:
    """What a recipe writes."""

    path: str | None = None
    """Inside of the recipe's directory."""
    to: str | None = None
    """Name of the dialect; the first LoRA's by default."""
    dtype: str | None = None
    """Of the tensors; the widest of the inputs' by default."""
    allow_lossy: bool = False
    """Whether to leave out what the dialect can't hold."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A merge as a file says it; the names are those of `loramerge.merge`.

    Raises:
        OptionError: An entry that `read` finds is unknown, or of the wrong kind.
    """

    loras: tuple[Input, ...]
    weights: Weights = None
    """One a LoRA, ``"l2"``, ``"uniform"``, a file of learned coefficients, or None for the method's own."""
    scope: Scope = "module"
    method: str = "linear"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: Rank = "sum"
    max_error: float | str | None = None
    energy: float | str | None = None
    max_size: int | str | None = None
    exclude: tuple[str, ...] = ()
    architecture: str | None = None
    """The model family, where the files leave it open."""
    device: str | None = None
    base: str | None = None
    """Path of the base model, for DoRA layers."""
    base_sha256: str | None = None
    """What `Checkpoint.sha256` gave for the base: with another, the recipe isn't run unless told to."""
    ranks: Mapping[str, int] | None = None
    """Every module's rank, as the budget gave it before: it is not spent anew."""
    output: Output = field(default_factory=Output)
    folder: str = field(default="", compare=False)
    """What paths start from; ``""`` where they were typed, as on the command line."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Recipe":
        """The recipe in a TOML file.

        Raises:
            FileError: The file can't be read, or is not TOML.
            OptionError: A key is unknown, or a value is wrong.
        """
        file = Path(path).expanduser()
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileError(f"Can't read {file}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise FileError(f"{file} is not TOML: {error}.") from None
        return _recipe(data, file.name, str(file.parent))

    @classmethod
    def of(cls, lora: LoRA) -> "Recipe":
        """The recipe that a merged LoRA was made by, as its metadata says.

        Raises:
            MergeError: It has none that can be run again.
        """
        from .metadata import RECIPE

        return _from_metadata(lora.metadata.get(RECIPE), lora.name)

    def to_toml(self) -> str:
        """The text that `read` reads as the same recipe."""
        own = ("method", "rank", *BUDGETS, "architecture", "device", "base", "base_sha256")
        head = {name: getattr(self, name) for name in own} | {"exclude": list(self.exclude) or None}
        each: Sequence[Weight | None] = [None] * len(self.loras)
        if isinstance(self.weights, str):
            head |= {"weights": self.weights, "scope": self.scope if self.weights == "l2" else None}
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
        parts += [["[ranks]", *toml.lines(self.ranks)]] if self.ranks else []
        return "\n\n".join("\n".join(part) for part in parts) + "\n"

    def override(self, **changes: Any) -> "Recipe":
        """The recipe with other entries; ``options`` are added, ``to``, ``dtype`` and ``allow_lossy`` are the output's.

        A budget takes the place of another, and weights other than ``"l2"`` that of its scope.
        Options that another method doesn't have are left out with it, and ranks that a budget
        gave, with anything that may change them.
        """
        output = {k: changes.pop(k) for k in ("to", "dtype", "allow_lossy") if k in changes}
        options = {**self.options, **changes.pop("options", {})}
        if any(name in changes for name in BUDGETS):
            changes = dict.fromkeys(BUDGETS) | changes
        if changes.get("weights", "l2") != "l2":
            changes = {"scope": "module"} | changes
        changed = replace(self, **changes, output=replace(self.output, **output))
        if changed.method != self.method:
            known = METHODS[changed.method].options
            options = {name: value for name, value in options.items() if name in known or name not in self.options}
        changed = replace(changed, options=options)
        return changed if changed == self else replace(changed, ranks=changes.get("ranks"))

    def open(self, *, allow_pickle: bool = False) -> tuple[LoRA, ...]:
        """The LoRAs; tensors are read when they are asked for.

        Raises:
            FileError: One is missing or broken.
        """
        return tuple(
            open(
                entry.source(self.folder),
                architecture=entry.architecture or self.architecture,
                dialect=entry.dialect,
                allow_pickle=allow_pickle,
            )
            for entry in self.loras
        )

    def plan(
        self,
        loras: Sequence[LoRA] | None = None,
        *,
        allow_changed: bool = False,
        allow_pickle: bool = False,
        progress: "Progress | None" = None,
    ) -> Plan:
        """The merge as data, in the dialect and dtype in which it will be written.

        Args:
            loras: The LoRAs, where they are open already.
            allow_changed: Whether to take LoRAs with other tensors than the recipe was made with.
            allow_pickle: Whether to read pickles, tensors only.
            progress: Called with the number of modules done and of all, while a budget is spent.

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
            base=None if self.base is None else os.path.join(self.folder, os.path.expanduser(self.base)),
            **self.options,
        )
        if not allow_changed:
            self._check_base(planned)
        dialect, dtype = self.output.to or planned.dialect, self.output.dtype
        check_writable(dialect, planned.dialect)
        planned = replace(planned, dialect=DIALECTS[dialect].name, dtype=parse_dtype(dtype) if dtype else planned.dtype)
        limit = budget(self.max_error, self.energy, self.max_size)
        if self.ranks is not None:
            return planned.at(self._checked_ranks(planned), limit)
        # A budget is spent on what will be written: in that dialect and dtype.
        return planned.within(limit, progress) if limit else planned

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
            output: Where to, anywhere; by default where the recipe says.
            allow_changed: Whether to take LoRAs with other tensors than the recipe was made with.
            allow_pickle: Whether to read pickles, tensors only.
            workers: Processes or threads, as in `loramerge.save`; the bytes are the same for any number.
            progress: Called with the number of modules done and of all.

        Returns:
            The path that was written.

        Raises:
            LoRAMergeError: As `plan`, and as `loramerge.save`.
        """
        target = self.target(output)
        loras = self.open(allow_pickle=allow_pickle)
        check_target(target, self.output.to or loras[0].dialect)
        planned = self.plan(loras, allow_changed=allow_changed, progress=progress)
        return self.write(planned, target, workers=workers, progress=progress)

    def target(self, output: str | os.PathLike[str] | None = None) -> Path:
        """Where the result goes.  A recipe writes below its own directory only; ``output`` may be anywhere.

        Raises:
            OptionError: Neither says where, the recipe's path leads out of its directory, or it is an input.
        """
        target = Path(output) if output is not None else self._own_target()
        for entry in self.loras:
            if entry.path is not None and os.path.realpath(entry.source(self.folder)) == os.path.realpath(target):
                raise OptionError(f"{target} is one of the LoRAs that are merged. Way out: another output.")
        return target

    def _own_target(self) -> Path:
        if self.output.path is None:
            raise OptionError("Where should the merged LoRA go? The recipe's output has no path; give an output.")
        _check_inside(self.output.path, self.folder)
        return Path(self.folder) / self.output.path

    def write(
        self,
        planned: Plan,
        target: str | os.PathLike[str],
        *,
        workers: int = 1,
        progress: "Progress | None" = None,
        record: "Callable[[Outcome], None] | None" = None,
        lost: "Callable[[str], object] | None" = None,
    ) -> Path:
        """Write the recipe's own plan; the arguments are those of `loramerge.save` and `Plan.lora`."""
        return save(
            planned.lora(record),
            target,
            dialect=self.output.to,
            dtype=self.output.dtype,
            allow_lossy=self.output.allow_lossy,
            workers=workers,
            progress=progress,
            lost=lost,
        )

    def _weights(self) -> Weights:
        if isinstance(self.weights, str) and self.weights.endswith(".safetensors"):
            return os.path.join(self.folder, os.path.expanduser(self.weights))
        return self.weights

    def _check_hashes(self, loras: Sequence[LoRA]) -> None:
        for entry, lora in zip(self.loras, loras, strict=True):
            if entry.sha256 is not None and entry.sha256.lower() != lora.sha256:
                raise MergeError(
                    f"{lora.name} has changed: the sha256 of its tensors is {lora.sha256}, the recipe was made with "
                    f"{entry.sha256}. Way out: the file of then, or merge what is there now (--allow-changed, or "
                    "allow_changed=True)."
                )

    def _check_base(self, planned: Plan) -> None:
        if self.base_sha256 is not None and planned.base and self.base_sha256.lower() != planned.base.sha256:
            raise MergeError(
                f"The base {planned.base.name} has changed: its sha256 is {planned.base.sha256}, the recipe was made with "
                f"{self.base_sha256}. Way out: the model of then, or merge on what is there now (--allow-changed, or "
                "allow_changed=True)."
            )

    def _checked_ranks(self, planned: Plan) -> Mapping[str, int]:
        ranks = cast(Mapping[str, int], self.ranks)
        for module in dict.fromkeys((*planned.steps, *ranks)):
            if module not in planned.steps or module not in ranks:
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


KEYS = (
    "method",
    "options",
    "rank",
    *BUDGETS,
    "weights",
    "scope",
    "exclude",
    "architecture",
    "device",
    "base",
    "base_sha256",
)


def _recipe(data: Mapping[str, Any], where: str, folder: str) -> Recipe:
    table = Table(data, where, [*KEYS, "loras", "output", "ranks"])
    entries = table.get("loras", list, wanted="[[loras]], a list of tables", default=[])
    if not entries:
        raise OptionError(f"{where}: no LoRA is named. Wanted: [[loras]] and a path, for each.")
    given = [_input(entry, f"{where}: loras {i}") for i, entry in enumerate(entries, start=1)]
    recipe = Recipe(
        loras=tuple(lora for lora, _ in given),
        weights=_weights(table, [weight for _, weight in given]),
        scope=table.get("scope", str, default="module"),
        method=table.get("method", str, default="linear"),
        options=table.get("options", dict, default={}),
        rank=table.get("rank", int, str, wanted='a number from 1, "sum" or "max"', default="sum"),
        max_error=table.get("max_error", int, float, str),
        energy=table.get("energy", int, float, str),
        max_size=table.get("max_size", int, str),
        exclude=table.texts("exclude"),
        architecture=table.get("architecture", str),
        device=table.get("device", str),
        base=table.get("base", str),
        base_sha256=table.get("base_sha256", str),
        ranks=table.numbers("ranks", int),
        output=_output(data.get("output", {}), f"{where}: output"),
        folder=folder,
    )
    try:
        check(recipe)
    except LoRAMergeError as error:
        raise type(error)(f"{where}: {error}") from None
    return recipe


def _input(data: Any, where: str) -> tuple[Input, Weight | None]:
    names = [f.name for f in fields(Input)]
    table = Table(data, where, [*names, "weight"])
    found = {name: table.get(name, str) for name in names}
    try:
        if found["hub"] is not None:
            found |= _on_the_hub(found["hub"], found["revision"], found["filename"])
        weight = table.get("weight", int, float, str, dict, wanted='a number, a table of patterns or "lbw:…"')
        table.numbers("weight", int, float) if isinstance(weight, dict) else None
        return Input(**found), parse(weight) if isinstance(weight, str) else weight
    except OptionError as error:
        raise error if str(error).startswith(where) else OptionError(f"{where}: {error}") from None


def _on_the_hub(text: str, revision: str | None, filename: str | None) -> dict[str, str | None]:
    """``org/repo``, or all in one as the command line has it: ``org/repo/file.safetensors@revision``."""
    parsed = hub.parse(f"hf://{text.removeprefix('hf://')}")
    if parsed is None or (parsed.revision and revision) or (parsed.file and filename):
        raise OptionError(f"hub: got {text!r}, wanted org/repo, with the revision and the filename named once.")
    return {"hub": parsed.repo, "revision": parsed.revision or revision, "filename": parsed.file or filename}


def _weights(table: Table, each: Sequence[Weight | None]) -> Weights:
    weights = table.get("weights", str, wanted='"l2" or "uniform"; numbers go to each LoRA, as its weight')
    given = [weight for weight in each if weight is not None]
    if weights is not None and given:
        raise OptionError(f"{table.where}: give either weights = {weights!r}, or each LoRA's weight, not both.")
    if weights not in (None, "l2", "uniform") and not weights.endswith(".safetensors"):
        raise OptionError(
            f"{table.where}: weights: got {weights!r}, wanted 'l2', 'uniform' or a file of learned coefficients "
            "(.safetensors)."
        )
    if weights is not None or not given:
        return cast(Weights, weights)
    if len(given) != len(each):
        without = each.index(None) + 1
        raise OptionError(f"{table.where}: loras {without} has no weight, others have: wanted one each, or none.")
    return tuple(given)


def _output(data: Any, where: str) -> Output:
    table = Table(data, where, [f.name for f in fields(Output)])
    return Output(
        path=table.get("path", str),
        to=table.get("to", str),
        dtype=table.get("dtype", str),
        allow_lossy=table.get("allow_lossy", bool, default=False),
    )


def check(recipe: Recipe) -> None:
    """Refuse what can be seen to be wrong without opening a LoRA.

    Raises:
        OptionError: A name or a value is wrong.
    """
    METHODS[recipe.method].check(recipe.options)
    rule(recipe.rank)
    budget(recipe.max_error, recipe.energy, recipe.max_size)
    if recipe.scope not in SCOPES:
        raise OptionError(f"Unknown scope {recipe.scope!r}. Available: {', '.join(SCOPES)}.")
    if recipe.scope != "module" and recipe.weights != "l2":
        raise OptionError(f"The scope {recipe.scope!r} goes with weights = 'l2' only.")
    if recipe.architecture is not None:
        ARCHITECTURES[recipe.architecture]
    if recipe.output.to is not None:
        DIALECTS[recipe.output.to]
    if recipe.output.dtype is not None:
        parse_dtype(recipe.output.dtype)
    if recipe.output.path is not None:
        _check_inside(recipe.output.path, recipe.folder)


def _check_inside(path: str, folder: str) -> None:
    """A recipe may come from anyone: what it names as output stays below its own directory."""
    base = Path(folder).resolve()
    target = (base / path).resolve()
    if base not in target.parents or Path(path).is_absolute() or path.startswith("~") or ".." in Path(path).parts:
        raise OptionError(
            f"output: path: {path!r} is not below the recipe's directory. Way out: say where on the command line "
            "(--output, or run(output=…)), which may be anywhere."
        )


def _from_metadata(text: str | None, name: str) -> Recipe:
    """The recipe of a merged file; a file from elsewhere may say anything, so it is checked as a recipe is."""
    import json

    if not text:
        raise MergeError(f"{name} has no recipe: it was not merged by loramerge.")
    try:
        found = json.loads(text)
        learned = LEARNED.get(found["method"])
        entries = [_entry(entry) for entry in found["inputs"]]
        data = {
            key: found[key]
            for key in (
                "method",
                "options",
                "weights",
                "scope",
                "rank",
                "exclude",
                "device",
                "base",
                "base_sha256",
                "ranks",
            )
            if key in found
        }
        data |= {**found.get("budget", {}), "loras": entries}
        data["output"] = {("to" if key == "dialect" else key): value for key, value in found["output"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MergeError(f"{name} has no recipe that can be run again: an older loramerge made it.") from None
    if learned:
        raise MergeError(
            f"{name} has no recipe that 'loramerge merge' can run again: it was learned on a model, by 'loramerge {learned}' "
            f"or loramerge.learned. Ways out: 'loramerge {learned}' with the settings that 'loramerge inspect --json' "
            "shows, or 'loramerge merge --weights' with its coefficients, if they were saved."
        )
    missing = [entry["name"] for entry in found["inputs"] if not entry.get("source")]
    if missing:
        raise MergeError(
            f"{name} has no recipe that can be run again: {' and '.join(map(str, missing))} came from memory, not from a file. "
            "Way out: save them first, then merge the files."
        )
    return _recipe(data, f"the recipe of {name}", "")


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: entry[key] for key in ("sha256", "weight", "architecture", "dialect") if key in entry}
    source = entry.get("source") or ""
    if source.startswith("hf://"):
        return {"hub": source.removeprefix("hf://"), **kept}
    return {"path": source, **kept}
