"""Matching the stems of a file to the family in which all of them have a name and the right shape."""

import math
import re
from collections import Counter
from collections.abc import Set
from functools import cache

from ...errors import FamilyError, LayerError, OptionError, counted
from ...tensors import Shape, same_weight
from ..architectures import ARCHITECTURES, Architecture, last_numbers, titles
from ..architectures.hints import Named
from ..architectures.names import INPUTS, Parts, flat, whole
from . import DIALECTS
from .base import Dialect, table
from .forms import MASK, form, having, is_text, path_of, wanted
from .records import Record
from .repairs import repaired

INSIDE = re.compile(r"attn|attention|\.ff|mlp|ffn|feed_forward")
"""Matches modules whose inputs and outputs are both hidden widths of the model."""

STRAYS = 20
"""At most one layer in 20 may belong to a part that the family lacks: some trainers add one."""

WIDENED = 2
"""At most so many input layers of one model are widened."""

ENOUGH = 8
"""With fewer modules, having every module of a family doesn't rule out a larger family."""


UNKNOWN = "of no model family that loramerge knows"
"""The beginning of the note on a file of such a family."""


class Matcher:
    """Working state while one file's key stems are matched to an architecture and dialect."""

    def __init__(self, records: dict[str, Record], extras: list[str]) -> None:
        self.records = records
        self.shapes = {stem: record.layer.shape for stem, record in records.items() if record.layer is not None}
        self.meant: dict[str, str] = {}
        """The stems that were meant, by repaired stem, in the family that was found."""
        self._repairs: dict[str, dict[str, str]] = {}
        self._fitting: dict[str, dict[str, Parts]] = {}
        self.extras = extras
        self.forms: dict[str, list[str]] = {}
        """The stems that differ in their numbers only, by one with ``#`` for every digit."""
        for stem in records:
            self.forms.setdefault(stem.translate(MASK), []).append(stem)
        first = [stems[0] for stems in self.forms.values()]
        self.text = {stem for stems in self.forms.values() if is_text(stems[0]) for stem in stems}
        self.inputs = [math.prod(shape[1:]) for shape in spread([*self.shapes.values()]) if len(shape) > 1]
        heads = {stem[:48] for stem in first}
        meant = {fix[0] for head in heads if (fix := repaired(head))}
        self.candidates = [
            d for d in DIALECTS.values() if any(h.startswith(d.begins) for h in heads | meant) and d.name != "other"
        ]

    def families(self, said: Named) -> list[Architecture]:
        """Return the families in which every layer has a name and the right shape, the likeliest first.

        Raises:
            FamilyError: The metadata names another family.
        """
        some = self.likely()
        fits = [a for a in some if (a.text_encoders or not self.text) and self.has_all(a)]
        fits = fits or [a for a in some if self.has_all(a)]
        fits = fits or [a for a in some if self.has_all(a, beside=len(self.records) // STRAYS)]
        hinted = [a for a in fits if a.name in said.families]
        if fits and not hinted and (said.families or said.unknown):
            raise FamilyError(self.contradiction(fits, said))
        fits = self.most_own(hinted or fits)
        denoised = len(self.text) < len(self.records)  # text encoders don't tell of which of their models they are
        return [a for a in fits if denoised and self.covers(a)] or fits if len(fits) > 1 else fits

    def told(self, name: str) -> Architecture:
        """Return the family that the caller names, or the size of it that fits.

        Raises:
            OptionError: Most layers have no name in it or another shape, or all fit another family.
        """
        a = ARCHITECTURES[name]
        sizes = [] if a.name == name else [b for b in ARCHITECTURES.values() if {*a.hints} & {*b.hints}]
        a = next((b for b in sizes if self.has_all(b)), a)
        if not self.has_all(a):
            others = [b.name for b in self.likely() if self.has_all(b)]
            if others:
                raise OptionError(
                    f"This isn't a LoRA of {a.name}: the names and shapes of all {len(self.records)} layers are those of "
                    f"{titles(others[:3])}. Way out: --architecture {others[0]}, or leave it out."
                )
        count, known = len(self.records), self.known(a)
        if 2 * known <= count:
            raise OptionError(f"This isn't a LoRA of {a.name}: of {count} layers {known} have a name in it.")
        fits = len(self.fitting(a)) + sum(self.beside(a, stem) for stem in self.records if stem not in self.fitting(a))
        if 2 * fits <= count and not all(self.proportions(a)):
            stem = next(stem for stem in self.records if stem not in self.fitting(a) and self.lookup(a, stem))
            weight = wanted(self.lookup(a, stem) or (), a)
            raise OptionError(
                f"This isn't a LoRA of {a.name}: of {count} layers {fits} have the shape of its weight; {stem} is for one "
                f"of {self.shapes[stem]}, and {a.name} has {weight} there."
            )
        return a

    def likely(self) -> list[Architecture]:
        """Return the families that the layers' names and shapes may be of: a quick test before any table is built.

        If there is none, the nearest is returned, if it has most of the layers.
        """
        every = list(ARCHITECTURES.values())
        if any(d.numbered for d in self.candidates) or len(self.text) == len(self.records):
            return [a for a in every if self.sized(a)]
        denoiser = [stems for stems in self.forms.values() if stems[0] not in self.text]
        forms = [form((repaired(stems[0]) or stems)[0]) for stems in denoiser]
        layers = [(name, self.shapes.get(s, ())) for name, stems in zip(forms, denoiser, strict=True) for s in stems]
        counts = having(layers)
        least = len(layers) - len(self.records) // STRAYS - WIDENED
        some = [a for a in every if counts.get(a.name, 0) >= max(1, least)]
        if len(some) > 1:
            paths = (flat(s[len(stems[0]) - len(path_of(stems[0])) + 1 :]) for stems in denoiser for s in stems)
            last = last_numbers(paths)
            some = [a for a in some if all(number <= a.outline.last.get(name, number) for name, number in last.items())]
        nearest = max(counts, key=counts.__getitem__, default="")
        return some or [a for a in every if a.name == nearest and 2 * counts[nearest] > len(layers)]

    def sized(self, a: Architecture) -> bool:
        """Return whether weights of the family have as many inputs as a sample of the layers: nearly all have."""
        return 4 * sum(count not in a.outline.inputs for count in self.inputs) <= len(self.inputs)

    def has_all(self, a: Architecture, beside: int = 0) -> bool:
        """Return whether every layer is one of a family's, or may be there beside them.

        Args:
            a: The family.
            beside: Number of layers that may be of parts that a model of the family doesn't have.
        """
        fitting = self.fitting(a)
        for stem in self.records:
            if stem in fitting or self.beside(a, stem):
                continue
            if beside == 0 or self.lookup(a, stem) or path_of(stem).startswith(_heads(a)):
                return False
            beside -= 1
        return bool(fitting)

    def beside(self, a: Architecture, stem: str) -> bool:
        """Return whether a layer may be in a LoRA of the family though the family doesn't list it.

        It may be that of a widened input (FLUX control has 128 channels), or of a text encoder that the family
        doesn't list.
        """
        parts = self.lookup(a, stem)
        if parts is None:
            return stem in self.text and len(self.text) < len(self.records)
        return _is_widened(self.shapes[stem], parts, a)

    def most_own(self, families: list[Architecture]) -> list[Architecture]:
        """Keep the families in which most layers have the very names that a dialect would write.

        A transformer's layers aren't counted: some tools put diffusers' names behind kohya's prefix.
        """
        stems = set(self.records) if all(a.denoiser == "unet" for a in families) else self.text
        if len(families) < 2 or not stems:
            return families
        own = {a.name: self.own(a, stems) for a in families}
        return [a for a in families if own[a.name] == max(own.values())]

    def covers(self, a: Architecture) -> bool:
        """Return whether the file has all modules of the family whose last names it has at all, and many of them.

        Some blocks of a large model can be all of a small one's, and a file with few layers fits both.
        """
        return len({part.module for parts in self.fitting(a).values() for part in parts}) >= ENOUGH and (
            self.coverage(a) == 1.0
        )

    def stated(self, said: Named) -> Architecture | None:
        """Return the family that the file says it is for, if that has all its names: a model with widths of its own."""
        hinted = [ARCHITECTURES[name] for name in said.families]
        known = [a for a in hinted if self.known(a) == len(self.records)]
        return next((a for a in known if any(fits := self.proportions(a)) and all(fits)), None)

    def proportions(self, a: Architecture) -> list[bool]:
        """Compare the proportions of layers with the family's, layer by layer: square if that is square, and so on."""
        pairs = [
            (shape, wanted(parts, a))
            for stem, shape in self.shapes.items()
            if len(shape) > 1 and (parts := self.lookup(a, stem)) and INSIDE.search(parts[0].module)
        ]
        even = [(shape, weight) for shape, weight in pairs if max(weight[:2]) % min(weight[:2]) == 0]
        return [shape[0] * weight[1] == shape[1] * weight[0] for shape, weight in even]

    def contradiction(self, fits: list[Architecture], said: Named) -> str:
        """Say that the metadata names another family than the layers do."""
        stated = ", ".join(ARCHITECTURES[name].title for name in said.families) or said.unknown
        return (
            f"The metadata says {stated} ({said.said}), and the names and shapes of all {len(self.records)} layers are "
            f"those of {titles(a.name for a in fits[:3])}. Way out: say which is right, --architecture {fits[0].name} "
            f"(in Python architecture={fits[0].name!r})."
        )

    def coverage(self, a: Architecture) -> float:
        """Return the share that the file has of the family's modules whose last names it has at all."""
        modules = {part.module for parts in self.fitting(a).values() for part in parts}
        counts = _leaves(a.name)
        return len(modules) / max(1, sum(counts[leaf] for leaf in {_leaf(module) for module in modules}))

    def fitting(self, a: Architecture) -> dict[str, Parts]:
        """Return the modules of every stem that has a name and the right shape in a family."""
        if a.name not in self._fitting:
            self._fitting[a.name] = self._fit(a)
        return self._fitting[a.name]

    def _fit(self, a: Architecture) -> dict[str, Parts]:
        found: dict[str, Parts] = {}
        left = set(self.records)
        for dialect in self.candidates:
            for names in dialect.tables:
                if not left:
                    return found
                known = table(names, a)
                here = {s: self.rows(a, s, known[s]) for s in left if s in known and _fits(self.shapes[s], known[s], a)}
                if dialect.numbered and len(here) < len(self.records):
                    continue
                found |= here
                left -= here.keys()
        for stem in left:
            fix = repaired(stem)
            parts = fix and self.lookup(a, fix[0])
            if fix and parts and _fits(self.shapes[stem], parts, a):
                found[stem] = parts
                self._repairs.setdefault(a.name, {})[stem] = fix[0]
        return found

    def rows(self, a: Architecture, stem: str, parts: Parts) -> Parts:
        """Return the modules with the rows that they have in this tool's weight."""
        fused = len(parts) > 1 and self.records[stem].style == "peft-named"
        return a.alternating.get(parts[0].module, parts) if fused else parts

    def known(self, a: Architecture) -> int:
        """Count the stems that have a name in a family, whatever their shape."""
        return sum(self.lookup(a, stem) is not None for stem in self.records)

    def own(self, a: Architecture, stems: Set[str]) -> int:
        """Count which of `stems` have the very name that a dialect would write for the family."""
        left = set(stems & self.fitting(a).keys())
        count = len(left)
        for dialect in self.candidates:
            left -= table(dialect.recognised_by or dialect.names, a).keys()
        return count - len(left)

    def lookup(self, a: Architecture, stem: str) -> Parts | None:
        """Return the modules that a stem, or the one that it is a mistake for, has in a family, whatever its shape."""
        for name in (stem, *(fix[:1] if (fix := repaired(stem)) else ())):
            for dialect in self.candidates:
                for names in dialect.tables:
                    if parts := table(names, a).get(name):
                        return parts
        return None

    def resolve(self, a: Architecture | None, chosen: Dialect) -> list[str]:
        """Give every record its modules; a stem without any in the family keeps its own name. Return notes."""
        notes: list[str] = []
        taken: dict[str, str] = {}
        unknown = []
        fitting = self.fitting(a) if a else {}
        for stem, record in self.records.items():
            parts = (fitting.get(stem) or self.misfit(a, stem)) if a else None
            if parts is None:
                unknown.append(stem)
                fix = repaired(stem)
                self.meant |= {stem: fix[0]} if fix else {}
                parts = whole(chosen.free_module(self.meant.get(stem, stem)))
            for part in parts:
                if part.module in taken:
                    raise LayerError(f"{taken[part.module]} and {stem} both update the module {part.module}")
                taken[part.module] = stem
            record.parts = parts
        reasons = Counter(fix[1] for stem in self.meant if (fix := repaired(stem)))
        notes += [f"repaired {count} names: {why}" for why, count in reasons.items()]
        if a and unknown:
            notes.append(
                f"{counted(len(unknown), 'module')} that {a.name} doesn't list, kept under their names: {unknown[0]} …"
            )
        return notes

    def unknown(self, said: Named) -> str:
        """Say that a file is of no known family, and which is nearest."""
        titles = [ARCHITECTURES[name].title for name in said.families] or [said.unknown] * bool(said.unknown)
        stated = f"; its metadata says {', '.join(titles)} ({said.said})" if titles else ""
        near = max(self._fitting.values(), key=len, default={})
        closest = ""
        if 2 * len(near) > len(self.records):
            name = next(name for name, fits in self._fitting.items() if fits is near)
            strange = next(stem for stem in self.records if stem not in near)
            closest = (
                f". Nearest is {ARCHITECTURES[name].title}, which has {len(near)} of them, and not {strange} "
                f"{self.shapes.get(strange, ())}"
            )
        return (
            f"{UNKNOWN}{stated}: its {counted(len(self.records), 'module')} keep the names of the "
            f"file, and merge with those of files of the same tool{closest}"
        )

    def misfit(self, a: Architecture, stem: str) -> Parts | None:
        """Return the modules of a known name with another shape: a widened input, or a model with widths of its own."""
        if any(d.numbered for d in self.candidates):
            return None
        parts = self.lookup(a, stem)
        return parts and _scaled(parts, self.shapes[stem], a)

    def dialect(self, a: Architecture | None) -> Dialect:
        """Return the dialect that has most of the names in the right style."""
        best, chosen = 0, DIALECTS["other"]
        self.meant = self._repairs.get(a.name, {}) if a else {}
        for dialect in self.candidates:
            score = self.score(dialect, a)
            if score > best:
                best, chosen = score, dialect
            if best == 2 * len(self.records):  # the largest score there is
                break
        return chosen

    def score(self, dialect: Dialect, a: Architecture | None) -> int:
        """Count the names that a dialect has, twice those that it would write itself."""
        styled = [s for s, r in self.records.items() if not r.style or r.style in dialect.styles]
        if a is None:
            return sum((repaired(stem) or (stem,))[0].startswith(dialect.begins) for stem in styled)
        own = table(dialect.recognised_by or dialect.names, a)
        points = 2 * sum(stem in own for stem in styled)
        if points < 2 * len(styled):
            others = [own, *(table(names, a) for names in dialect.also_names)]
            for stem in (stem for stem in styled if stem not in own):
                points += any(name in other for other in others for name in (stem, self.meant.get(stem)))
        return points


def spread(listed: list[Shape]) -> list[Shape]:
    """Return up to about 16 of the shapes, from all over the file."""
    return listed[:: max(1, len(listed) // 16)]


@cache
def _heads(a: Architecture) -> tuple[str, ...]:
    return tuple(f"{head}_" for head in (*a.outline.own, *a.outline.others))


@cache
def _leaves(architecture: str) -> Counter[str]:
    return Counter(_leaf(module) for module in ARCHITECTURES[architecture].shapes)


@cache
def _leaf(module: str) -> str:
    """Return a module's last names without its block: ``attn1.to_q``."""
    return ".".join(module.split(".")[-3:]) if module[-1].isdigit() else ".".join(module.split(".")[-2:])


def _is_widened(shape: Shape, parts: Parts, a: Architecture) -> bool:
    """Return whether a layer is for a model's input with more channels than the family's."""
    module = parts[0].module
    if len(parts) > 1 or module.partition(".")[2] not in INPUTS:
        return False
    weight = a.shapes[module]
    return len(shape) > 1 and shape[0] == weight[0] and math.prod(shape[1:]) > math.prod(weight[1:])


def _scaled(parts: Parts, shape: Shape, a: Architecture) -> Parts | None:
    """Scale the rows of a weight's modules to a model with widths of its own; None if they don't divide evenly."""
    if all(part.rows is None for part in parts) or not shape:
        return parts
    rows = sum(a.shapes[part.module][0] for part in parts)
    if any(n * shape[0] % rows for part in parts for pair in part.rows or () for n in pair):
        return None
    ranges = [tuple((i * shape[0] // rows, j * shape[0] // rows) for i, j in part.rows or ()) for part in parts]
    return tuple(part._replace(rows=scaled or None) for part, scaled in zip(parts, ranges, strict=True))


def _fits(shape: Shape, parts: Parts, a: Architecture) -> bool:
    """Return whether a layer of a shape, its kernel maybe flattened, updates the weights of these modules."""
    weight = wanted(parts, a)
    if not shape or shape == weight:
        return True
    if len(parts) == 1 and parts[0].module in a.other_sizes:
        return any(_is_of(shape, known) for known in a.sizes(parts[0].module))
    return _is_of(shape, weight)


def _is_of(shape: Shape, weight: Shape) -> bool:
    if len(shape) == 1:
        return shape[0] == weight[0]
    return len(weight) > 1 and same_weight(shape, weight)
