"""Read protocols from TOML files strictly: every error says where in the file it is."""

from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from loramerge.errors import FileError, OptionError
from loramerge.files import read_text
from loramerge.learned import settings
from loramerge.merging import Table, parse_toml
from loramerge.merging.methods import find
from loramerge.scoring import Box

from .protocol import (
    STUDY,
    Base,
    Beside,
    Concept,
    Data,
    Drawing,
    Drift,
    Learned,
    Mixed,
    Protocol,
    Scorer,
    Setting,
    Training,
    grid,
    is_source,
    located,
    located_lora,
)

PRESETS = Path(__file__).parents[1] / "presets"
TOP = (
    "title",
    "notes",
    "base",
    "scorer",
    "second",
    "data",
    "training",
    "drawing",
    "drift",
    "concepts",
    "mixed",
    "beside",
    "prompts",
    "settings",
    "sensitivity",
)

T = TypeVar("T")


def preset(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        OptionError: There is none of that name.
    """
    known = sorted(file.stem for file in PRESETS.glob("*.toml"))
    if name not in known:
        raise OptionError(f"Unknown preset {name!r}. Available: {', '.join(known)}.")
    return PRESETS / f"{name}.toml"


def read(path: Path) -> Protocol:
    """Read the protocol in a TOML file.

    Raises:
        FileError: It can't be read, or is not TOML.
        OptionError: A key is unknown or missing, or a value is wrong.
    """
    try:
        data = parse_toml(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not TOML: {error}.") from None
    return protocol(data, path.stem, path.parent, path.name)


def protocol(data: Any, name: str, folder: Path, where: str) -> Protocol:
    """Make a protocol from the entries of a TOML file in ``folder``."""
    top = Table(data, where, TOP)

    def one(key: str, kind: type[T]) -> T:
        return _filled(kind, top.get(key, dict, default={}), f"{where}: {key}")

    def each(key: str, make: Callable[[Any, str], T]) -> tuple[T, ...]:
        found = top.get(key, list, wanted="tables", default=[])
        return tuple(make(entry, f"{where}: {key}, entry {i}") for i, entry in enumerate(found, 1))

    base, scorer, source = one("base", Base), one("scorer", Scorer), one("data", Data)
    if source.source not in ("drawn", "folders"):
        raise OptionError(f"{where}: data: source: got {source.source!r}, wanted 'drawn' or 'folders'.")
    prompts = Table(top.get("prompts", dict, default={}), f"{where}: prompts", top.data.get("prompts", {}))
    if STUDY not in prompts.data:
        raise OptionError(f"{where}: prompts: there is no list called {STUDY!r}.")
    compared = each("settings", lambda entry, place: _setting(entry, place, folder))
    return Protocol(
        name=name,
        title=top.get("title", str, default=name),
        base=_moved(base, folder),
        scorer=_moved(scorer, folder),
        second=_moved(one("second", Scorer), folder) if "second" in top.data else None,
        data=source,
        training=one("training", Training),
        drawing=one("drawing", Drawing),
        drift=_drift(top.data["drift"], f"{where}: drift") if "drift" in top.data else None,
        concepts=each("concepts", lambda entry, place: _concept(entry, place, folder)),
        mixed=each("mixed", lambda entry, place: _filled(Mixed, entry, place)),
        beside=each("beside", lambda entry, place: _filled(Beside, entry, place)),
        prompts={key: prompts.texts(key) for key in prompts.data},
        settings=(*compared, *_sensitivity(top.data.get("sensitivity"), f"{where}: sensitivity", folder)),
        notes=top.texts("notes"),
    )


def _moved(part: Any, folder: Path) -> Any:
    return replace(part, model=located(part.model, folder))


KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
}


def _filled(kind: type[T], data: Any, where: str) -> T:
    """Fill a dataclass of plain fields from a table with the same keys."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    table = Table(data, where, known)
    missing = [n for n, f in known.items() if _required(f) and n not in table.data]
    if missing:
        raise OptionError(f"{where}: {missing[0]} is missing.")
    return kind(**{name: table.get(name, *_kinds(known[name])) for name in table.data})


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _kinds(field: Any) -> tuple[type, ...]:
    named = getattr(field.type, "__name__", str(field.type))
    for part in (named, *(getattr(t, "__name__", "") for t in get_args(field.type))):
        if part in KINDS:
            return KINDS[part]
    return (str,)  # literals, which are checked by name


def _drift(data: Any, where: str) -> Drift:
    table = Table(data, where, ("prompts", "seeds"))
    return Drift(prompts=table.texts("prompts"), seeds=table.get("seeds", int, default=2))


def _concept(data: Any, where: str, folder: Path) -> Concept:
    table = Table(data, where, ("name", "identifier", "noun", "crop", "own_crop", "lora"))
    boxes = {key: _box(table, key) for key in ("crop", "own_crop")}
    name, identifier = (_text(table, key) for key in ("name", "identifier"))
    lora = table.get("lora", str)
    return Concept(
        name=name,
        identifier=identifier,
        noun=table.get("noun", str),
        lora=located_lora(lora, folder) if lora else None,
        **boxes,
    )


def _box(table: Table, key: str) -> Box | None:
    found = table.get(key, list, wanted="[left, top, right, bottom]")
    if found is None:
        return None
    if len(found) != 4 or not all(isinstance(value, int | float) for value in found):
        raise OptionError(
            f"{table.where}: {key}: got {found}, wanted [left, top, right, bottom] as shares from 0 to 1."
        )
    return Box(*map(float, found))


def _text(table: Table, key: str) -> str:
    if key not in table.data:
        raise OptionError(f"{table.where}: {key} is missing.")
    return str(table.get(key, str))


LSQ = ("granularity", "ridge", "prior", "solver", "batches", "batch_size", "seed")
"""Options of a least-squares merge: those of `lsq` and of its calibration."""
SETTING = (
    "name",
    "label",
    "family",
    "lora",
    "loras",
    "method",
    "weights",
    "options",
    "learn",
    "compose",
    "prompts",
    "seeds",
)


def _setting(data: Any, where: str, folder: Path) -> Setting:
    table = Table(data, where, SETTING)
    name = _text(table, "name")
    learn = table.get("learn", str)
    if learn is not None and learn not in get_args(Learned):
        raise OptionError(f"{where}: learn: got {learn!r}, wanted one of {', '.join(get_args(Learned))}.")
    method, options = table.get("method", str, default="linear"), table.get("options", dict, default={})
    compose = table.get("compose", str)
    try:
        if compose is not None:
            _check_composed(table, compose, learn, options)
        elif learn is None:
            find(method).check(options)
        else:
            _check_learned(table, learn, options)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None
    return Setting(
        name=name,
        label=table.get("label", str, default=name),
        loras=_loras(table, folder),
        family=table.get("family", str, default=STUDY),
        method=method,
        weights=_weights(table),
        options=options,
        learn=learn,
        compose=compose,
        prompts=table.get("prompts", str, default=STUDY),
        seeds=table.get("seeds", int),
    )


def _loras(table: Table, folder: Path) -> tuple[str, ...]:
    """Read ``loras``, or a single ``lora``: names of sets stay as they are, files are resolved."""
    if {"lora", "loras"} <= table.data.keys():
        raise OptionError(f"{table.where}: lora and loras: wanted one of them.")
    given = (_text(table, "lora"),) if "lora" in table.data else table.texts("loras")
    return tuple(located_lora(name, folder) if is_source(name) else name for name in given)


def _check_composed(table: Table, compose: str, learn: str | None, options: dict[str, Any]) -> None:
    from loramerge.diffusion import COMPOSITIONS

    gated = learn == "ziplora" and compose == "mole"
    idle = ["method"] * ("method" in table.data) + ["learn"] * (learn is not None and not gated)
    idle += ["weights"] * isinstance(_weights(table), str)
    if idle:
        raise OptionError(f"{idle[0]} has no effect on a composition.")
    if not gated:
        COMPOSITIONS[compose].check(options)
    elif settings(**options).gates != "input":
        raise OptionError("The composition mole needs gates that follow the picture: options = { gates = 'input', … }.")


def _check_learned(table: Table, learn: Learned, options: dict[str, Any]) -> None:
    """Check the options of a learned merge before hours of training."""
    idle = [key for key in ("method", "weights") if key in table.data]
    if idle:
        raise OptionError(f"{idle[0]} has no effect on a merge that is learned.")
    if learn == "ziplora" and settings(**options).gates == "input":
        raise OptionError("Gates that follow the picture fit in no file. Way out: compose = 'mole' beside learn.")
    unknown = [key for key in options if learn == "lsq" and key not in LSQ]
    if unknown:
        raise OptionError(f"Unknown option {unknown[0]!r}. Available: {', '.join(LSQ)}.")


def _weights(table: Table) -> tuple[float, ...] | str | None:
    found = table.get("weights", list, str, wanted="a list of numbers, 'l2' or 'uniform'")
    if isinstance(found, list):
        if not all(type(value) in (int, float) for value in found):
            raise OptionError(f"{table.where}: weights: got {found}, wanted numbers.")
        return tuple(map(float, found))
    if found not in (None, "l2", "uniform"):
        raise OptionError(f"{table.where}: weights: got {found!r}, wanted a list of numbers, 'l2' or 'uniform'.")
    return found  # type: ignore[no-any-return]


def _sensitivity(data: Any, where: str, folder: Path) -> list[Setting]:
    if data is None:
        return []
    table = Table(data, where, ("loras", "values", "prompts", "seeds"))
    values = table.get("values", list, wanted="a list of numbers", default=[])
    if not values or not all(type(value) in (int, float) for value in values):
        raise OptionError(f"{where}: values: got {values}, wanted a list of numbers.")
    prompts, seeds, loras = table.get("prompts", str, default=STUDY), table.get("seeds", int), _loras(table, folder)
    if len(loras) != 2:
        raise OptionError(f"{where}: loras: got {len(loras)}, wanted two: the rows and the columns of a grid.")
    return grid(loras, [float(value) for value in values], prompts=prompts, seeds=seeds)
